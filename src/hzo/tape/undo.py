"""What a failed step must put back: tensors that were there before and were written to, random states, mode flags."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hzo.tape.state import everybodys_back_to_now, own_back_to_now

_NUMBERS = (bool, int, float, str, type(None))


class Undo:
    """Remembers, from its making on, how things were; ``restore`` puts them back.

    Tensors are copied when the recording sees the first write to them, and only those that existed before it: buffers,
    and whatever else the user's code keeps.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._generators: dict[int, Callable[[], object]] = {}
        self._modules: list[tuple[nn.Module, bool, dict[str, Any], dict[str, Any]]] = []
        self._counters: list[tuple[nn.Module, dict[str, Any]]] = []
        self._torch = torch.get_rng_state()
        used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if used else []
        self._sources = everybodys_back_to_now()
        self._contents: list[tuple[nn.Parameter, Tensor]] = []

    def remember(self, tensor: Tensor) -> None:
        """Copy a tensor that is about to be written to, the first time."""
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = (tensor, (tensor.detach() if tensor.requires_grad else tensor).clone())

    def remember_generator(self, generator: torch.Generator) -> None:
        """Note the state of a generator of the model's own before it is drawn from."""
        if id(generator) not in self._generators:
            self._generators[id(generator)] = partial(generator.set_state, generator.get_state())

    def remember_modules(self, modules: Iterable[nn.Module]) -> None:
        """Note mode flags, which tensors modules hold under which name, numbers that they count with, generators."""
        # TorchScript's own hold their tensors elsewhere, under names that cannot change.
        own = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        self._modules += [(m, m.training, dict(m._parameters), dict(m._buffers)) for m in own]
        self._counters += [(m, {k: v for k, v in vars(m).items() if type(v) in _NUMBERS}) for m in own]
        self._contents += [(p, p.data) for m in own for p in m._parameters.values() if type(p) is nn.Parameter]
        self._sources += own_back_to_now(own)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for module, training, parameters, buffers in self._modules:
            module.training = training
            for held, before in ((module._parameters, parameters), (module._buffers, buffers)):
                if held.keys() != before.keys() or any(held[k] is not v for k, v in before.items()):
                    held.clear()
                    held.update(before)
        for module, numbers in self._counters:
            vars(module).update(numbers)
        for parameter, content in self._contents:
            if parameter.data_ptr() != content.data_ptr() or parameter.shape != content.shape:
                parameter.data = content  # which the model replaced
        for tensor, copy in reversed(self._tensors.values()):  # the last copied first: views may show the same memory
            if tensor.shape == copy.shape:
                tensor.copy_(copy)
            else:
                tensor.set_(copy)  # type: ignore[call-overload]
        for back in (*self._sources, *self._generators.values()):
            back()
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)

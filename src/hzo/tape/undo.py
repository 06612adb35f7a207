"""What a failed step must put back: tensors that were there before and were written to, random states, mode flags."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hzo.tape.attributes import Attributes
from hzo.tape.state import random_state, set_random_state, shared_restorers, used_devices


class Undo:
    """Remembers, from its making on, how things were; ``restore`` puts them back.

    Tensors are copied when the recording sees the first write to them, and only those that existed before it: buffers,
    and whatever else the user's code keeps.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor, bool]] = {}
        self._generators: dict[int, Callable[[], object]] = {}
        self._torch = random_state(used_devices())
        self._sources = shared_restorers()
        self._attributes = Attributes()

    def remember(self, tensor: Tensor) -> None:
        """Copy a tensor that is about to be written to, the first time."""
        if id(tensor) not in self._tensors:
            held = tensor.requires_grad
            self._tensors[id(tensor)] = (tensor, (tensor.detach() if held else tensor).clone(), held)

    def remember_generator(self, generator: torch.Generator) -> None:
        """Note the state of a generator of the model's own before it is drawn from."""
        if id(generator) not in self._generators:
            self._generators[id(generator)] = partial(generator.set_state, generator.get_state())

    def remember_attributes(self, things: Iterable[Any]) -> None:
        """Note what modules and other objects hold: attributes, flags, containers, generators, memory of parameters."""
        self._attributes.note(things)

    def remember_called(self, module: nn.Module) -> None:
        """The same of a module that is about to run, and of all below it, where they are not known yet."""
        if not self._attributes.knows(module):
            self._attributes.note(module.modules())

    def forget(self) -> None:
        """The step succeeded: what it would have been put back to may go."""
        self._tensors, self._generators, self._attributes = {}, {}, Attributes()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        self._attributes.restore()
        # The last copied first: views may show the same memory.
        for tensor, copy, required in reversed(self._tensors.values()):
            if tensor.requires_grad and not required and not tensor._is_view():
                tensor.detach_()  # a write gave it a history
            if tensor.shape == copy.shape:
                tensor.copy_(copy)
            else:
                tensor.set_(copy)  # type: ignore[call-overload]
        for back in (*self._sources, *self._generators.values()):
            back()
        set_random_state(self._torch)

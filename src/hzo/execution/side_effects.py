"""Everything that running a model changes besides its result, in one place: save it, put it back.

Queries, traces and checks run a model many times where its user asked for one forward pass or none. Buffers (the
statistics of BatchNorm move even under ``no_grad``), numbers and tensors that modules keep as attributes, random state
and training flags are put back from copies; adding and subtracting a perturbation would drift in low precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo.tape.attributes import Attributes
from hzo.tape.state import RandomState, random_state, set_random_state, shared_restorers, used_devices


def devices_of(tensors: Iterable[object]) -> tuple[torch.device, ...]:
    """The devices on which tensors among these objects live, each once."""
    return tuple(dict.fromkeys(item.device for item in tensors if isinstance(item, Tensor)))


@dataclass(frozen=True)
class Snapshot:
    """Copies of what a model may change while it runs."""

    random: RandomState
    buffers: tuple[tuple[nn.Module, str, Tensor, Tensor], ...]  # owner, name, the tensor itself, a copy
    tensors: tuple[tuple[Tensor, Tensor], ...]  # those that modules keep as attributes, and copies
    training: tuple[tuple[nn.Module, bool], ...]
    generators: tuple[Callable[[], object], ...]  # what puts Python's and NumPy's back
    held: Attributes  # which attributes modules have, what containers hold, flags, generators


def take_snapshot(modules: Iterable[nn.Module], gradients: bool = False) -> Snapshot:
    """Copy buffers, training flags and random state of these modules and all below them; with ``gradients``, note which
    tensors their ``.grad`` are."""
    unique = list(dict.fromkeys(inner for module in modules for inner in module.modules()))
    buffers = tuple(
        (module, name, buffer, buffer.clone())
        for module in unique
        for name, buffer in module.named_buffers(recurse=False)
    )
    tensors = tuple(
        (value, value.detach().clone())
        for module in unique
        if not isinstance(module, torch.jit.ScriptModule)
        for value in vars(module).values()
        if isinstance(value, Tensor) and _can_be_copied(value)
    )
    training = tuple((module, module.training) for module in unique)
    held = Attributes(gradients)
    held.note(unique)
    return Snapshot(random_state(used_devices()), buffers, tensors, training, tuple(shared_restorers()), held)


def _can_be_copied(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    followed = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # by a transform: it has no memory of its own
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel() or followed:
        return True
    # Wrappers free the memory of parameters that they gather, and keep views of it.
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return end <= tensor.untyped_storage().nbytes()


@torch.no_grad()
def restore_snapshot(snapshot: Snapshot) -> None:
    """Put everything back as it was, the identity of the buffers included."""
    snapshot.held.restore()
    for module, name, buffer, copy in snapshot.buffers:
        # Writing only what differs keeps version counters, and with them a graph that autograd holds, intact.
        if buffer.shape != copy.shape:
            buffer.set_(copy)  # type: ignore[call-overload]
        elif not torch.equal(buffer, copy):
            buffer.copy_(copy)
        module._buffers[name] = buffer
    for tensor, copy in snapshot.tensors:
        if tensor.shape == copy.shape and not torch.equal(tensor, copy):
            tensor.copy_(copy)
    for module, training in snapshot.training:
        module.training = training
    set_random_state(snapshot.random)
    for back in snapshot.generators:
        back()


def copied(batch: Any) -> Any:
    """A batch that code may write to: its tensors copied, without a history; one that stands twice is copied once."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    return pytree.tree_map_only(Tensor, copy, batch)


@contextmanager
def contained(modules: Iterable[nn.Module], others: Iterable[Any] = ()) -> Iterator[None]:
    """Nothing that runs inside leaves a trace in the modules, in attributes of other objects, or the random state."""
    back = _restorer(modules, others)
    try:
        yield
    finally:
        back()


@contextmanager
def undone_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What runs inside takes effect, unless it raises: then everything is as before."""
    back = _restorer(modules)
    try:
        yield
    except BaseException:
        back()
        raise


def _restorer(modules: Iterable[nn.Module], others: Iterable[Any] = ()) -> Callable[[], None]:
    modules = [*modules]
    snapshot, attributes = take_snapshot(modules, gradients=True), Attributes()
    attributes.note(others)

    def back() -> None:
        attributes.restore()
        restore_snapshot(snapshot)

    return back

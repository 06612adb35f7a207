"""Callables that are one operation of a tape, whatever they do inside: declared modules, black boxes, NumPy code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo.errors import TapeError
from hzo.tape.history import requires_grad
from hzo.tape.marks import ignores_parameters
from hzo.tape.memory import storage_of
from hzo.tape.operations import ref
from hzo.tape.state import OperationState, random_state

if TYPE_CHECKING:
    from hzo.tape.record import Recorder


@dataclass(frozen=True)
class Form:
    """How tensors stand among the arguments of a call: the structure, with None in the place of every tensor."""

    structure: Any
    rest: tuple[Any, ...]

    def __repr__(self) -> str:
        return "(…)"

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Form, list[Tensor]]:
        """The form of a call's arguments, and the tensors among them in order."""
        flat, structure = pytree.tree_flatten((args, kwargs))
        rest = tuple(None if isinstance(leaf, Tensor) else _Constant(leaf) for leaf in flat)
        return cls(structure, rest), [leaf for leaf in flat if isinstance(leaf, Tensor)]

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors."""
        given = iter(tensors)
        flat = [next(given) if leaf is None else leaf.value for leaf in self.rest]
        args, kwargs = pytree.tree_unflatten(flat, self.structure)
        return args, kwargs


@dataclass(frozen=True)
class _Constant:
    value: Any


class Opaque:
    """Runs a callable as one operation: ``(form, tensors, parameters)`` to the tensors that it returns.

    It gets copies, since code out of sight may write where no version counter looks.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and other.function is self.function

    def __hash__(self) -> int:
        return id(self.function)

    def __repr__(self) -> str:
        return self.name

    def __call__(self, form: Form, tensors: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """The tensors that the callable returns, with these in the place of its trainable parameters."""
        return tuple(t for t in pytree.tree_leaves(self.run(form, tensors, parameters)) if isinstance(t, Tensor))

    def run(self, form: Form, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Any:
        """What the callable returns."""
        args, kwargs = form.filled([t.detach().clone() for t in tensors])
        own = self.parameters()
        replaced = {id(p): q for p, q in zip(own, parameters, strict=True) if q is not p} if parameters else {}
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if replaced and isinstance(self.function, nn.Module):
                stack.enter_context(with_parameters(self.function, replaced))
            result = self.function(*args, **kwargs)
            # A copy: a simulator may use its memory again for the next result.
            return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), result)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of its module, that it answers for."""
        if not isinstance(self.function, nn.Module) or ignores_parameters(self.function):
            return []
        return [p for p in self.function.parameters() if p.requires_grad]

    def buffers(self) -> list[Tensor]:
        """The buffers of its module."""
        return list(self.function.buffers()) if isinstance(self.function, nn.Module) else []


@contextlib.contextmanager
def with_parameters(module: nn.Module, replaced: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, other tensors stand for some parameters of a module, wherever in it those stand.

    Not by ``torch.func.functional_call``: where a module is registered twice, that leaves the others in its place.

    Args:
        replaced: by the identity of the parameter.
    """
    slots = [
        (inner, name, parameter)
        for inner in module.modules()
        for name, parameter in inner._parameters.items()
        if parameter is not None and id(parameter) in replaced
    ]
    try:
        for inner, name, parameter in slots:
            inner._parameters[name] = replaced[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for inner, name, parameter in slots:
            inner._parameters[name] = parameter


def call_opaque(
    recorder: Recorder, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a callable out of the recorder's sight, and append it to the tape as one operation.

    Raises:
        TapeError: it uses trainable tensors that are not parameters of its own.
    """
    target = Opaque(function, name)
    form, tensors = Form.of(args, kwargs)
    parameters = target.parameters()
    read = tuple([ref(recorder.read(t)) for t in tensors])
    own = tuple([ref(recorder.read(p)) for p in parameters])
    state = OperationState(
        random_state(dict.fromkeys(t.device for t in (*tensors, *parameters))),
        tuple((buffer, buffer.clone()) for buffer in target.buffers()),
    )
    recorder.paused, recorder.touched = True, {}
    try:
        with _without_hooks():
            result = target.run(form, tensors, parameters)
    finally:
        recorder.paused = False
    _check_touched(recorder, target, parameters)
    after = random_state(torch.device(d) for d in state.random)
    state = replace(
        state,
        drew=any(not torch.equal(after[d], before) for d, before in state.random.items()),
        moved=any(not torch.equal(buffer, copy) for buffer, copy in state.buffers),
    )
    op = recorder.operation(target, (form, read, own), {})
    recorder.tape.states[op.index] = state
    flat, structure = pytree.tree_flatten(result)
    writes: list[int] = []
    tainted = recorder.taint is not None and any(storage_of(t) in recorder.taint for t in tensors)
    for k, leaf in enumerate(flat):
        if not isinstance(leaf, Tensor):
            continue
        made = leaf if recorder.altered is None else recorder.altered(op.index, leaf)
        if made.dtype.is_floating_point or made.dtype.is_complex:
            recorder.paused = True
            try:  # no leaf, since code may write to what it is given
                made = made.requires_grad_().clone()
            finally:
                recorder.paused = False
        flat[k] = made
        writes.append(recorder.new_value(made, requires_grad(made), op.index, False))
        if tainted and recorder.taint is not None:
            recorder.taint[storage_of(made)] = made
    op.writes = tuple(writes)
    return pytree.tree_unflatten(flat, structure)


def _check_touched(recorder: Recorder, target: Opaque, parameters: list[nn.Parameter]) -> None:
    """Trainable tensors inside that the operation does not answer for would lose their gradient."""
    if ignores_parameters(target.function):
        return
    known = {id(p) for p in parameters}
    for key, tensor in recorder.touched.items():
        if key not in known and (isinstance(tensor, nn.Parameter) or key in recorder.tape._index):
            raise TapeError(
                f"{target.name} uses a trainable tensor of shape {tuple(tensor.shape)} that it does not hold, so "
                "its gradient would be lost; register it as an nn.Parameter of the module that uses it, freeze "
                "it, or see to its gradient yourself and put its part into hzo.blackbox(f, parameters='ignored')"
            )


def hooks_allowed() -> bool:
    """Whether autograd takes hooks on what it saves; transforms of ``torch.func`` do not."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


def _without_hooks() -> contextlib.AbstractContextManager[Any]:
    if not hooks_allowed():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor

"""The sweep: operations in reverse order, each by its rule, from the cotangent of the loss to those of the leaves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor

from hzo.errors import TapeError
from hzo.execution import counting
from hzo.rules.base import Call, Cotangents, Engine, Key
from hzo.rules.registry import LEAN, find_rule, kind_of
from hzo.tape import Operation, Recorder, Tape
from hzo.tape.memory import alone
from hzo.tape.operations import Ref
from hzo.tape.record import flat
from hzo.tape.surroundings import recording


def sweep(
    tape: Tape,
    seeds: dict[int, Tensor],
    hooks: dict[int, Callable[[Tensor], Tensor]],
    engine: Engine | None = None,
    counted: bool = True,
    *,
    free: bool = False,
) -> dict[int, Tensor]:
    """Carry cotangents from some values back through all operations.

    Args:
        seeds: the cotangents to begin with, by value.
        hooks: for some values, what replaces their cotangent once it is complete.
        engine: what rules measure with; None runs operations and counts them. counted: whether adjoints are counted.
        free: release what the tape holds as soon as nothing reads it any more.

    Returns what reached the leaves, by value. Cost: one rule an operation on the path; where a rule measures a weight,
    the queries that it needs.

    Raises:
        TapeError: the path leads through a function that was not recorded.
    """
    walk = _Walk(tape, dict(seeds), hooks, engine or ENGINE)
    operations, end = tape.operations, len(tape.values)
    for op in reversed(operations):
        walk.through(op, counted)
        if free:
            # What was written down since the operation before this one had run, no operation before this one reads.
            before = [v for v in operations[op.index - 1].writes if v is not None] if op.index else [-1]
            begin = max(before) + 1 if before else end
            for v in range(begin, end):
                tape.tensors[v] = None
            end = min(begin, end)
    return walk.leaves()


def sweep_end(
    tape: Tape, start: int, seeds: dict[int, Tensor], hooks: dict[int, Callable[[Tensor], Tensor]]
) -> dict[int, Tensor]:
    """Carry gradients back through the last operations alone, those from ``start`` on, and stop there.

    Arguments as of ``sweep``. Returns what reached the values that were there before, by value.
    """
    walk = _Walk(tape, dict(seeds), hooks, ENGINE)
    for op in reversed(tape.operations[start:]):
        walk.through(op, counted=False)
    walk.leaves()
    return walk.cotangents


def carry_back(
    tape: Tape, op: Operation, grads: list[Tensor | None], wanted: frozenset[int] | None, engine: Engine
) -> Iterator[tuple[int, Tensor]]:
    """What one operation's rule adds to the cotangents of its operands: pairs of value and cotangent.

    Args:
        grads: of its results. wanted: the operands asked for; None for all that require a gradient.
    """
    found = find_rule(op.target).vjp(Call(tape, op, grads, engine, wanted))
    for key, grad in found.items():
        template = op.kwargs[key] if isinstance(key, str) else op.args[key]
        if type(template) is Ref:
            if grad is not None and (wanted is None or template.value in wanted):
                yield template.value, grad
        elif grad is not None:
            for leaf, g in zip(template, grad, strict=True):
                if type(leaf) is Ref and g is not None and (wanted is None or leaf.value in wanted):
                    yield leaf.value, g


def measurements_of(tape: Tape, op: Operation, wanted: frozenset[int]) -> list[tuple[tuple[int, ...], bool]]:
    """How large the probes are that measure an operation's weights, found by a run on shapes alone where that can be.

    Returns the size of every probe, and whether it grows with the batch because it is made of an activation.
    """
    kind = kind_of(op.target)
    if kind == "custom Function" or (kind == "rule" and not find_rule(op.target).measures):
        return []
    if kind != "rule":
        return _seen(tape, op, wanted, kind)
    shapes = copy(tape)
    shapes.tensors = _OnMeta(tape.tensors)
    try:
        return _seen(shapes, op, wanted, kind)
    except Exception:  # a rule that looks at numbers, or an operator that PyTorch cannot run on shapes alone
        return _seen(tape, op, wanted, kind)


class _OnMeta(list[Tensor | None]):
    """Contents of a tape as shapes and dtypes, made when they are read: a rule reads a few of many."""

    def __init__(self, held: list[Tensor | None]) -> None:
        super().__init__()
        self.held = held

    def __getitem__(self, index: Any) -> Any:
        tensor = self.held[index]
        return tensor.detach().to("meta") if isinstance(tensor, Tensor) else tensor


def _seen(tape: Tape, op: Operation, wanted: frozenset[int], kind: str) -> list[tuple[tuple[int, ...], bool]]:
    found: list[tuple[tuple[int, ...], bool]] = []

    def measure(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], size: Tensor | tuple[int, ...]) -> Any:
        of_batch = any(size is g for g in call.grads) or kind == "slope"
        found.append((tuple(size if isinstance(size, tuple) else size.shape), of_batch))
        return call.op.target(*args, **kwargs)

    grads = [_ones(tape, v) for v in op.writes]
    with torch.no_grad():
        for _ in carry_back(tape, op, grads, wanted, Engine(measure, again)):
            pass
    return found


def _ones(tape: Tape, value: int | None) -> Tensor | None:
    tensor = None if value is None else tape.tensors[value]
    differentiable = tensor is not None and (tensor.is_floating_point() or tensor.is_complex())
    return torch.ones_like(tensor) if differentiable else None  # type: ignore[arg-type]


def _references(held: dict[int, Any], value: int) -> int:
    return sys.getrefcount(held[value])


_ONE_REFERENCE = _references({0: object()}, 0)  # the dict's, and as many as this version of Python takes to count


def _is_nobody_elses(held: dict[int, Tensor], value: int) -> bool:
    """Whether only this dict knows a cotangent, so that it may be added to in place.

    One contribution may have gone to several operands, and hooks, rules and the user's code may keep what they gave.
    """
    if _references(held, value) > _ONE_REFERENCE:
        return False
    tensor = held[value]
    return (
        type(tensor) is Tensor
        and alone(tensor)
        and not tensor.is_inference()
        and torch._debug_has_internal_overlap(tensor) == 0
    )


class _Walk:
    def __init__(
        self,
        tape: Tape,
        cotangents: dict[int, Tensor],
        hooks: dict[int, Callable[[Tensor], Tensor]],
        engine: Engine,
    ) -> None:
        self.tape = tape
        self.cotangents = cotangents
        self.hooks = hooks
        self.engine = engine

    def through(self, op: Operation, counted: bool = True) -> None:
        cotangents = self.cotangents
        grads: list[Tensor | None] = [None if v is None else cotangents.pop(v, None) for v in op.writes]
        if all(g is None for g in grads):
            return
        if self.hooks:
            grads = [self._hooked(v, g) for v, g in zip(op.writes, grads, strict=True)]
        counting.add(adjoints=int(counted))
        for value, grad in carry_back(self.tape, op, grads, None, self.engine):
            self.add(value, grad)

    def _hooked(self, value: int | None, grad: Tensor | None) -> Tensor | None:
        hook = self.hooks.get(value) if value is not None else None
        return grad if hook is None or grad is None else hook(grad)

    def add(self, value: int, grad: Tensor | None) -> None:
        """Another contribution to the cotangent of a value."""
        about = self.tape.values[value]
        if grad is None or not about.requires:
            return
        if grad.shape != about.shape:  # an operand that was broadcast
            grad = grad.sum_to_size(about.shape)
        if grad.dtype != about.dtype:
            grad = grad.real if grad.is_complex() and not about.dtype.is_complex else grad
            grad = grad.to(about.dtype)
        cotangents = self.cotangents
        if value not in cotangents:
            cotangents[value] = grad
        elif cotangents[value].is_sparse:  # of a table; PyTorch adds it to a dense one, and not the other way round
            cotangents[value] = grad + cotangents[value]
        elif _is_nobody_elses(cotangents, value):
            cotangents[value] += grad
        else:
            cotangents[value] = cotangents[value] + grad

    def leaves(self) -> dict[int, Tensor]:
        for value in self.cotangents:
            foreign = self.tape.values[value].foreign
            if foreign is not None:
                raise TapeError(f"the gradient leads into {foreign}")
        return {v: g for v, g in self.cotangents.items() if v in self.tape.leaves}


def _measured(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], size: Tensor | tuple[int, ...]) -> Any:
    """Run an operator on a probe; counted as so many queries as the probe has rows."""
    shape = size if isinstance(size, tuple) else size.shape
    samples = shape[0] if shape else 1
    counting.add(queries=samples, stage_evaluations=samples)
    return call.op.target(*args, **kwargs)


def again(call: Call, function: Callable[..., Any]) -> Cotangents:
    """The gradients of a call's operands, taken of a function that computes the same by other operators."""
    leaves: list[tuple[Key, int | None, Tensor]] = []

    def leaf(key: Key, k: int | None, tensor: Any, asked: bool) -> Any:
        if not isinstance(tensor, Tensor) or not asked:
            return tensor
        made = tensor.detach().requires_grad_()
        leaves.append((key, k, made))
        return made

    def fill(key: Key, given: Any) -> Any:
        if isinstance(given, Tensor):
            return leaf(key, None, given, call.needs(key))
        if isinstance(given, tuple) and call.needs(key):
            return tuple(leaf(key, k, t, asked) for k, (t, asked) in enumerate(zip(given, call.each(key), strict=True)))
        return given

    args = [fill(k, a) for k, a in enumerate(call.args)]
    kwargs = {k: fill(k, a) for k, a in call.kwargs.items()}
    recorder = Recorder(lean=LEAN)
    with recording(recorder):
        for key, k, made in leaves:
            value = recorder.read(made)
            recorder.tape.values[value].weight = call.weight(key) if k is None else False
        results = flat(function(*args, **kwargs))
        seeds: dict[int, Tensor] = {}
        for result, grad in zip(results, call.grads, strict=True):
            if grad is not None and isinstance(result, Tensor) and result.requires_grad:
                value = recorder.read(result)
                seeds[value] = seeds[value] + grad if value in seeds else grad
    with torch.no_grad():
        found = sweep(recorder.tape, seeds, {}, call.engine, counted=False)
    cotangents: dict[Key, Any] = {}
    for key, k, made in leaves:
        value_of = recorder.tape.value_of(made)
        grad = found.get(value_of) if value_of is not None else None
        if k is None:
            if grad is not None:
                cotangents[key] = grad
        else:
            given = call.kwargs[key] if isinstance(key, str) else call.args[key]
            cotangents.setdefault(key, [None] * len(given))[k] = grad
    return cotangents


ENGINE = Engine(_measured, again, divides=True)

"""Running one operation: its arguments filled in, its random numbers and buffers those of the base pass.

Operations that draw random numbers run copy by copy, each time from the random state of the base pass, so that every
query sees the same dropout mask. Nothing here counts: passes.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hzo.execution.side_effects import RandomState, set_random_state
from hzo.tracing import Attribute, Extent, Graph, Operation, Ref, map_arguments, tensors_in


@dataclass
class Activities:
    """What the base pass leaves for the queries: values, and the states that operations started from."""

    batch: int
    values: dict[int, Tensor] = field(default_factory=dict)
    random: dict[int, RandomState] = field(default_factory=dict)
    buffers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    layouts: dict[int, Tensor] = field(default_factory=dict)  # of what random operations read; without memory

    def let_go(self, graph: Graph, values: Iterable[int]) -> None:
        """Free the memory of these values; a tensor that takes none keeps their shape, dtype and device.

        Whoever reads one by mistake gets NaN, which no estimate survives, or the least integer, which is no index.
        """
        for value in values:
            tensor, about = self.values[value], graph.values[value]
            if about.batched:
                integer = torch.iinfo(tensor.dtype).min if not about.floating and tensor.dtype != torch.bool else False
                nothing = float("nan") if about.floating else integer
                self.values[value] = tensor.new_full((), nothing).expand(tensor.shape)


def resolve(op: Operation, lookup: Callable[[int], Tensor], batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with values, parameters and batch sizes filled in."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return lookup(leaf.value)
        if isinstance(leaf, Attribute):
            return leaf.get()
        if isinstance(leaf, Extent):
            return leaf.per_sample * batch
        return leaf

    # Few arguments are nested and few calls have keywords; walking them would take longer than a small call.
    args = tuple([lookup(arg.value) if isinstance(arg, Ref) else map_arguments(fill, arg) for arg in op.args])
    return args, map_arguments(fill, op.kwargs) if op.kwargs else {}


def call(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Run one operation; what it would change in place is a copy, returned behind its results."""
    changed: list[Tensor] = []
    if op.mutates:
        position = -1

        def copy(leaf: Any) -> Any:
            nonlocal position
            position += 1
            if position in op.mutates:
                leaf = leaf.clone()
                changed.append(leaf)
            return leaf

        args, kwargs = map_arguments(copy, (args, kwargs))
    result = op.target(*args, **kwargs)
    if isinstance(result, Tensor) and not changed:
        return (result,)
    results = tensors_in(result)
    return (*results, *(c for c in changed if all(c is not r for r in results)))


def query(
    graph: Graph,
    op: Operation,
    activities: Activities,
    lookup: Callable[[int], Tensor],
    batch: int,
    copies: int,
) -> tuple[Tensor, ...]:
    """One operation inside a query: same random numbers and same buffers as in the base pass, none of them moved."""
    if not op.random and not op.stateful:
        return processed(graph, op, call(op, *resolve(op, lookup, batch)))
    with _as_in_base_pass(op, activities):
        drawn = _drawn_again(graph, op, activities, lookup, copies) if op.random else None
        return processed(graph, op, call(op, *resolve(op, lookup, batch)) if drawn is None else drawn)


def _drawn_again(
    graph: Graph, op: Operation, activities: Activities, lookup: Callable[[int], Tensor], copies: int
) -> tuple[Tensor, ...]:
    """One operation that draws random numbers, copy by copy: each copy sees those of the base pass."""
    parts = []
    for copy in range(copies):
        set_random_state(activities.random[op.index])

        def one(value: int, copy: int = copy) -> Tensor:
            tensor, base = lookup(value), activities.layouts[value]
            dim = graph.values[value].batch_dim
            if dim is None:
                return tensor
            size = tensor.shape[dim] // copies
            return _laid_out(tensor.narrow(dim, copy * size, size), base)

        parts.append(call(op, *resolve(op, one, activities.batch)))
    if copies == 1:
        return parts[0]
    dims = [graph.values[value].batch_dim for value in op.writes]
    return tuple(
        part[0] if dim is None else torch.cat(part, dim)
        for dim, part in zip(dims, zip(*parts, strict=True), strict=True)
    )


def _laid_out(tensor: Tensor, base: Tensor) -> Tensor:
    """With the strides of the base pass: random numbers are drawn in the order of the memory."""
    if tensor.shape != base.shape or tensor.stride() == base.stride():
        return tensor
    return torch.empty_like(base, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@contextmanager
def _as_in_base_pass(op: Operation, activities: Activities) -> Iterator[None]:
    """Buffers that the operation moves hold, inside, what they held when the base pass reached it."""
    if not op.stateful:
        yield
        return
    current = tuple(buffer.get().clone() for buffer in op.stateful)
    for buffer, saved in zip(op.stateful, activities.buffers[op.index], strict=True):
        buffer.get().copy_(saved)
    try:
        yield
    finally:
        for buffer, after in zip(op.stateful, current, strict=True):
            buffer.get().copy_(after)


def processed(graph: Graph, op: Operation, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an operation hands on, with the noise of its stage where it is the stage's result."""
    if graph.noise is None:
        return results
    stage, source = graph.stage_of[op.index], graph.noise
    return tuple(
        source.processed(tensor, stage) if graph.handed_on[value] else tensor
        for value, tensor in zip(op.writes, results, strict=True)
    )


def read(graph: Graph, tensor: Tensor, stage: int) -> Tensor:
    """What a query returns of a tensor behind a stage."""
    return tensor if graph.noise is None else graph.noise.read(tensor, stage)

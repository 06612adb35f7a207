"""Running a graph: the base pass, and slices of it at perturbed states. Counting happens here and nowhere else.

A slice runs on ``copies`` perturbed copies of the batch at once, folded into the batch dimension, copy-major: the rows
of copy 0 come first. Values that a slice reads and does not compute are those of the base pass, tiled alike.
Operations that draw random numbers run copy by copy, each time from the random state of the base pass, so that every
query sees the same dropout mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from hzo import queries
from hzo.errors import InputError
from hzo.graph import Attribute, Extent, Graph, Operation, ParameterUse, Ref, leaves, map_arguments, tensors_in
from hzo.side_effects import RandomState, devices_of, random_state, set_random_state, with_parameters


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


def base_pass(graph: Graph, inputs: Sequence[Tensor], let_go: Sequence[Iterable[int]] | None = None) -> Activities:
    """Run the whole graph once, as an ordinary forward pass does, and keep what queries will need.

    Args:
        let_go: for every operation the values to let go after it. None keeps all.

    Cost: one forward pass (``base_evaluations``). Buffers and random state move as in one ordinary forward pass.
    """
    devices = devices_of(inputs)
    activities = Activities(batch=batch_of(graph, inputs))
    values = activities.values
    buffers: dict[int, Attribute] = {}  # values that a buffer has come to hold
    for index, tensor in zip(graph.inputs, inputs, strict=True):
        values[index] = tensor.detach()
    for op in graph.operations:
        if op.random:
            activities.random[op.index] = random_state(devices)
            activities.layouts.update({v: torch.empty_like(values[v], device="meta") for v in op.reads})
        if op.stateful:
            activities.buffers[op.index] = tuple(buffer.get().clone() for buffer in op.stateful)
        args, kwargs = resolve(op, values.__getitem__, activities.batch)
        for value, tensor in zip(op.writes, _processed(graph, op, call(op, args, kwargs)), strict=True):
            values[value] = tensor
        write_back(op, values, buffers)
        if let_go is not None:
            activities.let_go(graph, let_go[op.index])
    queries.add(base_evaluations=activities.batch * len(graph.stages))
    return activities


def run_again(
    graph: Graph, activities: Activities, start: int, stop: int, stages: int, let_go: Sequence[Iterable[int]]
) -> None:
    """Run operations [start, stop) again, as the base pass did, from activities still stored.

    Args:
        stages: how many these operations make up. let_go: for every operation the values to let go after it.

    Cost: ``stages`` base evaluations a sample. Random numbers and buffers are those of the base pass, and none of them
    moves; values without a batch dimension are still there and are not made again.
    """
    values = activities.values
    for op, gone in zip(graph.operations[start:stop], let_go, strict=True):
        if op.batched:
            results = query(graph, op, activities, values.__getitem__, activities.batch, copies=1)
            values.update(zip(op.writes, results, strict=True))
            del results  # or it would be held while the next operation runs
        activities.let_go(graph, gone)
    queries.add(base_evaluations=activities.batch * stages)


def batch_of(graph: Graph, inputs: Sequence[Tensor]) -> int:
    """The batch size that these inputs have, all of them alike."""
    sizes = set()
    for index, tensor in zip(graph.inputs, inputs, strict=True):
        value = graph.values[index]
        if value.batch_dim is not None:
            sizes.add(tensor.shape[value.batch_dim])
    if len(sizes) != 1:
        raise InputError(f"expected inputs with one batch size, got {sorted(sizes)}; give every input the same samples")
    return sizes.pop()


def write_back(op: Operation, values: dict[int, Tensor], buffers: dict[int, Attribute]) -> None:
    """A function that changed a buffer in place changed a copy; carry it over, as one forward pass does."""
    if not op.mutates:
        return
    all_leaves = list(leaves((op.args, op.kwargs)))
    changed = [all_leaves[position] for position in op.mutates]
    for leaf, value in zip(reversed(changed), reversed(op.writes), strict=False):
        buffer = buffers.get(leaf.value) if isinstance(leaf, Ref) else leaf
        if isinstance(buffer, Attribute):
            buffer.get().copy_(values[value])
            buffers[value] = buffer


def run_slice(
    graph: Graph,
    operations: Sequence[int],
    activities: Activities,
    perturbed: dict[int, Tensor],
    outputs: Sequence[int],
    copies: int,
    tiles: dict[int, Tensor],
) -> list[Tensor]:
    """Run some operations with some values replaced by ``copies`` perturbed copies; return the values ``outputs``.

    ``tiles`` keeps base values repeated ``copies`` times from one call to the next, as long as ``copies`` is the same.
    Cost: ``copies × batch`` queries.
    """
    batch = activities.batch * copies
    local = dict(perturbed)
    last_use = {value: k for k in operations for value in graph.operations[k].reads}

    def lookup(value: int) -> Tensor:
        if value in local:
            return local[value]
        if copies == 1 or not graph.values[value].batched:
            return activities.values[value]
        base, dim = activities.values[value], graph.values[value].batch_dim or 0
        if value not in tiles or tiles[value].shape[dim] != copies * base.shape[dim]:
            tiles[value] = tile(base, dim, copies)
        return tiles[value]

    for k in operations:
        op = graph.operations[k]
        results = query(graph, op, activities, lookup, batch, copies)
        local.update(zip(op.writes, results, strict=True))
        for value in op.reads:  # what no later operation reads is freed at once
            if last_use[value] == k and value not in outputs:
                local.pop(value, None)
    queries.add(
        queries=batch,
        stage_evaluations=batch * graph.stages_in(operations),
        forward_equivalents=Fraction(copies * graph.cost_of(operations), graph.cost),
        boxes=graph.boxes_in(operations),
    )
    stage = graph.stage_of[operations[-1]] if operations else 0
    return [read(graph, lookup(value), stage) for value in outputs]


def read(graph: Graph, tensor: Tensor, stage: int) -> Tensor:
    """What a query returns of a tensor behind a stage."""
    return tensor if graph.noise is None else graph.noise.read(tensor, stage)


def _processed(graph: Graph, op: Operation, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an operation hands on, with the noise of its stage where it is the stage's result."""
    if graph.noise is None:
        return results
    stage, source = graph.stage_of[op.index], graph.noise
    return tuple(
        source.processed(tensor, stage) if graph.handed_on[value] else tensor
        for value, tensor in zip(op.writes, results, strict=True)
    )


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
        return _processed(graph, op, call(op, *resolve(op, lookup, batch)))
    with _as_in_base_pass(op, activities):
        drawn = _drawn_again(graph, op, activities, lookup, copies) if op.random else None
        return _processed(graph, op, call(op, *resolve(op, lookup, batch)) if drawn is None else drawn)


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


def tile(tensor: Tensor, dim: int, copies: int) -> Tensor:
    """Repeat along the batch dimension, copy-major."""
    shape = list(tensor.shape)
    expanded = tensor.unsqueeze(dim).expand(*shape[:dim], copies, *shape[dim:])
    return expanded.reshape(*shape[:dim], copies * shape[dim], *shape[dim + 1 :])


def run_alone(graph: Graph, op: Operation, activities: Activities, value: int, probe: Tensor) -> tuple[Tensor, ...]:
    """Run one operation with one operand replaced by a probe of its own size, to measure the operation.

    Cost: one query for each sample of the probe; operations in proportion to its elements.
    """
    values = {**activities.values, value: probe}
    results = query(graph, op, activities, values.__getitem__, probe.shape[0], copies=1)
    queries.add(
        queries=probe.shape[0],
        stage_evaluations=probe.shape[0],
        forward_equivalents=graph.cost_alone(op.index, value, probe.numel()) / activities.batch,
        boxes=graph.boxes_in([op.index]),
    )
    return tuple(read(graph, tensor, graph.stage_of[op.index]) for tensor in results)


def run_with_parameter(
    graph: Graph, op: Operation, activities: Activities, use: ParameterUse, parameter: Tensor
) -> tuple[Tensor, ...]:
    """Run one operation on the batch with one of its parameters replaced.

    Cost: one query per sample.
    """
    values = activities.values
    if isinstance(use.where, Ref):
        values = {**values, use.where.value: parameter}
    elif op.module is not None:
        module, changed = op.module, {id(use.where.get()): parameter}

        def run(*args: Any, **kwargs: Any) -> Any:
            with with_parameters(module, changed):
                return module(*args, **kwargs)

        op = replace(op, target=run)
    else:
        op = replace(op, args=_substitute(op.args, use.where, parameter))
        op = replace(op, kwargs=_substitute(op.kwargs, use.where, parameter))
    results = query(graph, op, activities, values.__getitem__, activities.batch, copies=1)
    queries.add(
        queries=activities.batch,
        stage_evaluations=activities.batch,
        forward_equivalents=Fraction(op.cost, graph.cost),
        boxes=graph.boxes_in([op.index]),
    )
    return tuple(read(graph, tensor, graph.stage_of[op.index]) for tensor in results)


def _substitute(arguments: Any, where: Attribute, tensor: Tensor) -> Any:
    return map_arguments(lambda leaf: tensor if leaf == where else leaf, arguments)

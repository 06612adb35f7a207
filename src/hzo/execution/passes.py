"""Running a graph: the base pass, and slices of it at perturbed states. Counting happens here and nowhere else.

A slice runs on ``copies`` perturbed copies of the batch at once, folded into the batch dimension, copy-major: the rows
of copy 0 come first. Values that a slice reads and does not compute are those of the base pass, tiled alike.
How one operation runs inside a query is operation.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from hzo.errors import InputError
from hzo.execution import counting
from hzo.execution.operation import Activities, call, processed, query, read, resolve
from hzo.execution.side_effects import devices_of, random_state, with_parameters
from hzo.tracing import Attribute, Graph, Operation, ParameterUse, Ref, leaves, map_arguments


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
        for value, tensor in zip(op.writes, processed(graph, op, call(op, args, kwargs)), strict=True):
            values[value] = tensor
        write_back(op, values, buffers)
        if let_go is not None:
            activities.let_go(graph, let_go[op.index])
    counting.add(base_evaluations=activities.batch * len(graph.stages))
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
    counting.add(base_evaluations=activities.batch * stages)


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
    counting.add(
        queries=batch,
        stage_evaluations=batch * graph.stages_in(operations),
        forward_equivalents=Fraction(copies * graph.cost_of(operations), graph.cost),
        boxes=graph.boxes_in(operations),
    )
    stage = graph.stage_of[operations[-1]] if operations else 0
    return [read(graph, lookup(value), stage) for value in outputs]


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
    counting.add(
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
    counting.add(
        queries=activities.batch,
        stage_evaluations=activities.batch,
        forward_equivalents=Fraction(op.cost, graph.cost),
        boxes=graph.boxes_in([op.index]),
    )
    return tuple(read(graph, tensor, graph.stage_of[op.index]) for tensor in results)


def _substitute(arguments: Any, where: Attribute, tensor: Tensor) -> Any:
    return map_arguments(lambda leaf: tensor if leaf == where else leaf, arguments)

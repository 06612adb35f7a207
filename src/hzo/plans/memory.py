"""What activations and cotangents take while a gradient is estimated, and how a plan stores them within a budget."""

from __future__ import annotations

from dataclasses import replace

import torch

from hzo.errors import InputError, PlanError
from hzo.finite_differences import accumulation_dtype
from hzo.plans.activation_schedule import Schedule, schedule
from hzo.plans.plan import Node, Plan
from hzo.plans.storage import Storage, stages_run_again
from hzo.tracing import Graph


def with_storage(graph: Graph, plan: Plan, memory: int | None) -> Plan:
    """The plan with its activations stored as the budget allows, and with what that takes.

    Raises:
        InputError: a budget that is none. PlanError: not even a path fits.
    """
    if memory is not None and not memory > 0:
        raise InputError(f"expected memory in bytes, a number > 0, or None for no limit; got {memory}")
    everything = stored(graph, plan, "all")
    if memory is None or everything.activation_bytes <= memory:
        return everything
    path = stored(graph, plan, "path")
    if path.activation_bytes > memory:
        raise PlanError(
            f"activations and cotangents of {plan.batch} samples take {everything.activation_bytes:,} bytes if all are "
            f"stored and {path.activation_bytes:,} on a path, and memory={memory:,} allows neither; allow more, trace "
            "a smaller batch (gradients of several add up), or cut large stages into smaller ones"
        )
    return path


def stored(graph: Graph, plan: Plan, storage: Storage) -> Plan:
    """The plan with its activations stored this way, and with what that takes."""
    chosen = replace(plan, storage=storage)
    return replace(
        chosen,
        activation_bytes=activation_bytes(graph, schedule(graph, chosen)),
        recomputed=plan.batch * stages_run_again(len(graph.stages), storage),
    )


def activation_bytes(graph: Graph, steps: Schedule) -> int:
    """The most that activations and pending cotangents of the batch traced take at once, in bytes.

    Follows the schedule as a gradient does. A view counts like a copy, although the two share memory. What does not
    count: the model's inputs (the caller's), values without a batch dimension (they play the role of parameters),
    parameter gradients, and what one operation or one chunk of queries takes while it runs.
    """
    end = len(graph.operations)
    activations: dict[int, int] = {}
    cotangents: Pending = {}
    held = highest = 0

    def run(operation: int, released: tuple[int, ...]) -> None:
        nonlocal held
        for value in graph.operations[operation].writes:
            if graph.values[value].batched:
                activations[value] = _size(graph, value, graph.values[value].dtype)
                held += activations[value]
        after(released)

    def after(released: tuple[int, ...]) -> None:
        nonlocal held, highest
        pending = {made: size for at in cotangents.values() for made, size in at.values()}
        highest = max(highest, held + sum(pending.values()))
        held -= sum(activations.pop(value, 0) for value in released)

    for k, released in enumerate(steps.base_pass):
        run(k, released)
    cotangents[end] = {v: ((end, v), _cotangent(graph, v)) for v in graph.outputs if graph.values[v].floating}
    after(steps.after_loss)
    for step in range(end, -1, -1):
        for rerun in steps.again[step]:
            for k, released in zip(range(rerun.start, rerun.stop), rerun.released, strict=True):
                run(k, released)
        for node in steps.nodes[step]:
            _take(graph, node, cotangents)
        after(steps.activations[step])
        for position in steps.cotangents[step]:
            cotangents.pop(position, None)
    return highest


Pending = dict[int, dict[int, tuple[tuple[int, int], int]]]
"""By position and value the cotangents that are held: where they were made, which tells one from another, and bytes."""


def _take(graph: Graph, node: Node, cotangents: Pending) -> None:
    """What a node leaves at its target: a new tensor, or the one that it carries over."""
    at_source = cotangents.get(node.source, {})
    if any(v in at_source for v in node.outputs):
        found = ((node.target, node.value), _cotangent(graph, node.value))
    elif node.carried and node.value in at_source:
        found = at_source[node.value]
    else:
        return
    cotangents.setdefault(node.target, {})[node.value] = found


def _cotangent(graph: Graph, value: int) -> int:
    return _size(graph, value, accumulation_dtype(graph.values[value].dtype))


def _size(graph: Graph, value: int, dtype: torch.dtype) -> int:
    return graph.nominal_batch * graph.values[value].per_sample * dtype.itemsize

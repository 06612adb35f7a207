"""What a sweep still needs, and when: so that activations and cotangents live no longer than they are read.

Step p of a sweep estimates what the plan's nodes ask for at position p, then applies the parameter rules of operation
p. A step reads activations (of operands, of outputs, or only their shapes) and cotangents to its right; what no later
step reads is released. Without this a sweep would hold every activation and every cotangent to its end, where backprop
holds neither. Where the plan stores a path only, stages run again before the steps that read what they make; what a
step reads of stages to the right of its own stays from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hzo.execution import READS_BASE
from hzo.plans.plan import ByRule, Node, Plan
from hzo.plans.storage import Event, last_uses, passes
from hzo.tracing import Graph


@dataclass(frozen=True)
class Rerun:
    """Operations [start, stop) run again, ``stages`` in number; after each, ``released`` is no longer read."""

    start: int
    stop: int
    stages: int
    released: tuple[tuple[int, ...], ...]


class _Moment(NamedTuple):
    """A moment of the sweep: an operation of the base pass, the loss, one that runs again before a step, or a step."""

    phase: Literal["base pass", "loss", "again", "step"]
    step: int = -1
    rerun: int = -1
    operation: int = -1


@dataclass(frozen=True)
class Schedule:
    """When the sweep reads what, and what runs again before it does.

    Attributes:
        nodes: of every step, that is by target.
        base_pass: for every operation of the base pass the values that nothing reads after it, before they are made
            again. after_loss: outputs that only the loss reads.
        again: for every step what runs again before it.
        activations: for every step the values whose activations nothing reads after it.
        cotangents: for every step the positions whose cotangents no later step reads.
    """

    nodes: tuple[tuple[Node, ...], ...]
    base_pass: tuple[tuple[int, ...], ...]
    after_loss: tuple[int, ...]
    again: tuple[tuple[Rerun, ...], ...]
    activations: tuple[tuple[int, ...], ...]
    cotangents: tuple[tuple[int, ...], ...]


def schedule(graph: Graph, plan: Plan) -> Schedule:
    """The steps of a plan's sweep, the last position first."""
    end = len(graph.operations)
    nodes: list[list[Node]] = [[] for _ in range(end + 1)]
    cotangents: list[list[int]] = [[] for _ in range(end + 1)]
    last_source = {position: position - 1 for position in range(1, end + 1)}  # the rule of the operation before it
    for node in plan.nodes:
        nodes[node.target].append(node)
        last_source[node.source] = min(last_source[node.source], node.target)
    for position, step in last_source.items():
        cotangents[step].append(position)
    # In the order of execution: operations of the base pass, the loss, and for every step the operations that run again
    # before it and the step itself.
    again = _passes_before(graph, plan)
    timeline = {_Moment("base pass", operation=k): _operation(graph, k) for k in range(end)}
    timeline[_Moment("loss")] = Event(_batched(graph, graph.outputs))
    for step in range(end, -1, -1):
        for number, (start, stop, _) in enumerate(again[step]):
            timeline |= {_Moment("again", step, number, k): _operation(graph, k) for k in range(start, stop)}
        timeline[_Moment("step", step)] = Event(_batched(graph, reads_of_step(graph, plan, step, nodes[step])))
    released = dict(zip(timeline, last_uses([*timeline.values()]), strict=True))
    reruns = [
        tuple(
            Rerun(start, stop, stages, tuple(released[_Moment("again", step, number, k)] for k in range(start, stop)))
            for number, (start, stop, stages) in enumerate(again[step])
        )
        for step in range(end + 1)
    ]
    return Schedule(
        tuple(tuple(found) for found in nodes),
        tuple(released[_Moment("base pass", operation=k)] for k in range(end)),
        released[_Moment("loss")],
        tuple(reruns),
        tuple(released[_Moment("step", step)] for step in range(end + 1)),
        tuple(tuple(found) for found in cotangents),
    )


def _passes_before(graph: Graph, plan: Plan) -> list[list[tuple[int, int, int]]]:
    """For every step the operations, and the number of stages, that run again before it."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(len(graph.operations) + 1)]
    for later in passes(len(graph.stages), plan.storage)[1:]:
        start, stop = graph.boundaries[later.start], graph.boundaries[later.stop]
        # The last operation of the pass is swept first. A stage may be empty: nothing of it is swept.
        found[max(stop - 1, 0)].append((start, stop, later.stop - later.start))
    return found


def _batched(graph: Graph, values: Iterable[int]) -> tuple[int, ...]:
    """Values without a batch dimension play the role of parameters, and stay."""
    return tuple(v for v in dict.fromkeys(values) if graph.values[v].batched)


def _operation(graph: Graph, index: int) -> Event:
    op = graph.operations[index]
    return Event(_batched(graph, op.reads), _batched(graph, op.writes))


def reads_of_step(graph: Graph, plan: Plan, step: int, nodes: Iterable[Node]) -> Iterator[int]:
    """The values whose activations a step reads: those of its nodes, and of the parameter rules of its operation."""
    for node in nodes:
        yield from read_by_node(graph, plan, node)
    op = graph.operations[step] if step < len(graph.operations) else None
    if op is not None and op.parameters:
        yield from op.reads
        yield from op.writes


def read_by_node(graph: Graph, plan: Plan, node: Node) -> Iterator[int]:
    """The values whose activations the estimate of a node reads."""
    if isinstance(node.estimator, ByRule):
        op = graph.operations[node.operations[0]]
        yield from op.reads
        yield from op.writes
    elif node.operations:
        yield node.value
        made: set[int] = set()  # by the query itself
        for k in node.operations:
            yield from (v for v in graph.operations[k].reads if v not in made)
            yield from graph.operations[k].reads[:1] if graph.operations[k].target in READS_BASE else ()
            made.update(graph.operations[k].writes)
        if plan.scheme == "forward":
            yield from node.outputs

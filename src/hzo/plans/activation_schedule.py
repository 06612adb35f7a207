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

from hzo.execution import READS_BASE
from hzo.plans.plan import ByRule, Node, Plan
from hzo.plans.storage import Event, last_uses, passes
from hzo.tracing import Graph


@dataclass(frozen=True)
class Rerun:
    """Operations [start, stop) run again, ``stages`` in number; after each, what ``released`` says is release."""

    start: int
    stop: int
    stages: int
    released: tuple[tuple[int, ...], ...]


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
    # One line of time, in the order of execution: operations of the base pass, the loss, and for every step the
    # operations that run again before it and the step itself.
    again = _passes_before(graph, plan)
    events = [_operation(graph, k) for k in range(end)]
    events.append(Event(_batched(graph, graph.outputs)))
    for step in range(end, -1, -1):
        events += [_operation(graph, k) for start, stop, _ in again[step] for k in range(start, stop)]
        events.append(Event(_batched(graph, reads_of_step(graph, plan, step, nodes[step]))))
    uses = iter(last_uses(events))
    base_pass, after_loss = tuple(next(uses) for _ in range(end)), next(uses)
    reruns: dict[int, tuple[Rerun, ...]] = {}
    activations: dict[int, tuple[int, ...]] = {}
    for step in range(end, -1, -1):
        reruns[step] = tuple(
            Rerun(start, stop, stages, tuple(next(uses) for _ in range(start, stop)))
            for start, stop, stages in again[step]
        )
        activations[step] = next(uses)
    return Schedule(
        tuple(tuple(found) for found in nodes),
        base_pass,
        after_loss,
        tuple(reruns[step] for step in range(end + 1)),
        tuple(activations[step] for step in range(end + 1)),
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

"""What a sweep still needs, and when: so that activities and cotangents live no longer than they are read.

Step p of a sweep estimates what the plan's nodes ask for at position p, then applies the parameter rules of operation
p. A step reads activities (of operands, of outputs, or only their shapes) and cotangents to its right; what no later
step reads is let go. Without this a sweep would hold every activity and every cotangent to its end, where backprop
holds neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hzo.adjoints import find_adjoint
from hzo.graph import Graph
from hzo.plan import Node, Plan


@dataclass(frozen=True)
class Schedule:
    """When the sweep reads what.

    Attributes:
        nodes: of every step, that is by target.
        kept: values whose activities some step reads; the base pass may let go of all others.
        activities: for every step the values whose activities no later step reads.
        cotangents: for every step the positions whose cotangents no later step reads.
    """

    nodes: tuple[tuple[Node, ...], ...]
    kept: frozenset[int]
    activities: tuple[tuple[int, ...], ...]
    cotangents: tuple[tuple[int, ...], ...]


def schedule(graph: Graph, plan: Plan) -> Schedule:
    """The steps of a plan's sweep, the last position first."""
    end = len(graph.operations)
    nodes: list[list[Node]] = [[] for _ in range(end + 1)]
    last_read: dict[int, int] = {}
    last_source = {position: position - 1 for position in range(1, end + 1)}  # the rule of the operation before it
    for node in plan.nodes:
        nodes[node.target].append(node)
        last_source[node.source] = min(last_source[node.source], node.target)
        for value in read_by_node(graph, plan, node):
            last_read[value] = min(last_read.get(value, end), node.target)
    perturbed = {probe.operation for probe in plan.perturbed}
    for op in graph.operations:
        if op.parameters:
            for value in (*op.reads, *(op.writes if op.index in perturbed else ())):
                last_read[value] = min(last_read.get(value, end), op.index)
    activities: list[list[int]] = [[] for _ in range(end + 1)]
    for value, step in last_read.items():
        activities[step].append(value)
    cotangents: list[list[int]] = [[] for _ in range(end + 1)]
    for position, step in last_source.items():
        cotangents[step].append(position)
    return Schedule(
        tuple(tuple(found) for found in nodes),
        frozenset(last_read),
        tuple(tuple(found) for found in activities),
        tuple(tuple(found) for found in cotangents),
    )


def read_by_node(graph: Graph, plan: Plan, node: Node) -> Iterator[int]:
    """The values whose activities the estimate of a node reads."""
    if node.probe.kind == "adjoint":
        op = graph.operations[node.operations[0]]
        rule = find_adjoint(graph, op, node.value)
        reads = rule.reads if rule is not None else "all"
        if reads in ("all", "inputs"):
            yield from op.reads
        else:  # shapes of floating operands; a mask or an index is read all the same
            yield from (v for v in op.reads if not graph.values[v].floating)
        if reads in ("all", "output"):
            yield from op.writes
    elif node.operations:
        yield node.value
        for k in node.operations:
            yield from graph.operations[k].reads
        if plan.scheme == "forward":
            yield from node.outputs

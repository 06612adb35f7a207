"""What a node costs: the one formula that planner, meter and documentation share.

Per sample, a probe with D directions costs D queries (2 D for central differences) of the operations between its
boundary and its source. execution/passes.py counts the same numbers while they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod

import torch

from hzo.finite_differences import Probe, Scheme, accumulation_dtype, evaluations
from hzo.plans.plan import Cost, Node, ParameterProbe
from hzo.tracing import Graph, GraphOperation, Measured


def node_cost(graph: Graph, probe: Probe, operations: Sequence[int], scheme: Scheme) -> Cost:
    """The queries of one node, for one sample."""
    if not operations:
        return Cost()
    queries = probe.directions * evaluations(scheme)
    return Cost(
        queries,
        queries * graph.stages_in(operations),
        Fraction(queries * graph.cost_of(operations), graph.cost),
    )


def share_of(asked: Probe | ParameterProbe | None, ways: int) -> Fraction:
    """Which part of the queries of a probe the busiest of some processes asks that share them.

    They divide directions, and elements of a parameter; a single one is asked by all of them.
    """
    if isinstance(asked, ParameterProbe):
        count = asked.elements
    else:
        count = 0 if asked is None else asked.directions // asked.draws
    return Fraction(-(-count // ways), count) if count > 1 else Fraction(1)


def adjoint_cost(graph: Graph, operation: int, value: int, probes: Sequence[tuple[int, ...]]) -> Cost:
    """One application of an operation's adjoint, and the probes that measure what it needs."""
    return Cost(
        measurements=sum(shape[0] for shape in probes),
        measured=sum((graph.cost_alone(operation, value, prod(shape)) for shape in probes), start=Fraction(0)),
        adjoints=1,
    )


def rule_cost(graph: Graph, op: GraphOperation, value: int, adjoints: int = 1) -> Cost:
    """One application of an operation's rule to one operand, and what it measures."""
    measured = (op.measured or {}).get(value) or Measured()
    queries = len(measured.per_sample)
    return Cost(
        queries,
        queries,
        Fraction(queries * op.cost, graph.cost),
        sum(rows for rows, _ in measured.fixed),
        sum((graph.cost_alone(op.index, value, elements) for _, elements in measured.fixed), start=Fraction(0)),
        adjoints,
    )


def parameter_cost(graph: Graph, operation: int, elements: int, scheme: Scheme) -> Cost:
    """Perturbing every element of one operation's parameter, for one sample."""
    queries = elements * evaluations(scheme)
    return Cost(queries, queries, Fraction(queries * graph.operations[operation].cost, graph.cost))


def bytes_per_direction(graph: Graph, node: Node, batch: int) -> int:
    """Memory that one direction of a node takes while its queries run: perturbed states above and below, tiled base
    values, results above, and then the largest set of values alive at once or the differences of the results.

    What an operation allocates inside is not known; it is taken to be twice what it reads and writes (some convolutions
    that reorder their operands need that, most operations less, attention as one module with long sequences more).
    """
    values = graph.values

    def size(value: int) -> int:
        return values[value].per_sample * values[value].dtype.itemsize if values[value].batched else 0

    written = {v for k in node.operations for v in graph.operations[k].writes}
    read = {v for k in node.operations for v in graph.operations[k].reads}
    tiled = sum(size(v) for v in read - written - {node.value})
    last_use = {v: k for k in node.operations for v in graph.operations[k].reads}
    alive: set[int] = set()
    running = 0
    for k in node.operations:
        op = graph.operations[k]
        alive.update(op.writes)
        inside = 2 * sum(size(v) for v in {*op.reads, *op.writes})
        running = max(running, sum(size(v) for v in alive) + inside)
        alive -= {v for v in op.reads if last_use[v] == k and v not in node.outputs}
    results = sum(size(v) for v in node.outputs)
    comparing = results + sum(values[v].per_sample * _bytes_to_compare(values[v].dtype) for v in node.outputs)
    decoding = _decoding(node, batch)
    return batch * (2 * size(node.value) + tiled + results + max(running, comparing)) + decoding


def _bytes_to_compare(dtype: torch.dtype) -> int:
    """A difference, and where it is wider than the results a wider copy of both."""
    wide = accumulation_dtype(dtype)
    return wide.itemsize * (1 if wide == dtype else 3)


def _decoding(node: Node, batch: int) -> int:
    """What one direction of a coloring takes to decode: sums over places, twice, and the owners of the places; or the
    sums for every element, twice.
    """
    probe = node.probe
    if probe is None or probe.coloring is None:
        return 0
    coloring = probe.coloring
    places = sum(prod(pattern.output[axis] for axis in pattern.keyed) for pattern in coloring.patterns)
    if coloring.spacing is None:
        return 8 * places * (2 * batch + 3)
    return 8 * batch * (places + 2 * probe.elements)

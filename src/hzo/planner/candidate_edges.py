"""Price and noise of every edge that a tree may have: the candidates among which the planner chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hzo.finite_differences import evaluations
from hzo.planner.accuracy import spreads
from hzo.plans import Allowed, Cost, make_node, possible
from hzo.tracing import Graph


@dataclass(frozen=True, eq=False)
class CandidateEdges:
    """All edges between some positions, (points, points) tensors used where target < source.

    Attributes:
        points: positions, the last one the end. wanted: whether the plan needs a cotangent there. requested: the values
            it needs; all live values where it needs none.
        cost: forward equivalents of a sample to estimate what is requested at the target; relay: all that is alive
            there.
        spread, measured: directions of differences and of measured adjoints, as ``accuracy.spreads`` gives them.
    """

    points: tuple[int, ...]
    wanted: tuple[bool, ...]
    requested: tuple[tuple[int, ...], ...]
    cost: Tensor
    relay: Tensor
    spread: Tensor
    measured: Tensor


def candidate_edges(
    graph: Graph, points: Sequence[int], wanted: dict[int, set[int]], allowed: Allowed
) -> CandidateEdges:
    """Price every edge between the points; inf where none can be estimated."""
    n = len(points)
    cost, relay = (torch.full((n, n), float("inf"), dtype=torch.float64) for _ in range(2))
    spread, measured = (torch.zeros(n, n, dtype=torch.float64) for _ in range(2))
    values: list[tuple[int, ...]] = []
    for k, target in enumerate(points[:-1]):
        asked = wanted.get(target, set())
        alive = [v for v in graph.live[target] if graph.requires[v] or v in asked]
        values.append(tuple(sorted(asked)) or tuple(alive))
        prices = {v: _spanned(graph, v, target, points[k + 1 :], allowed, v in asked) for v in alive}
        for j in range(k + 1, n):
            found = {v: next(price, None) for v, price in prices.items()}
            if any(price is None for price in found.values()):
                break  # what one edge cannot span, none that is longer can
            known = {v: price for v, price in found.items() if price is not None}
            relay[k, j] = sum(price[0] for price in known.values())
            cost[k, j] = sum(price[0] for v, price in known.items() if v in asked) if asked else relay[k, j]
            spread[k, j] = sum(known[v][1] for v in values[k] if v in known)
            measured[k, j] = sum(known[v][2] for v in values[k] if v in known)
    here = tuple(bool(wanted.get(p)) for p in points)
    return CandidateEdges(tuple(points), here, tuple(values), cost, relay, spread, measured)


def _spanned(
    graph: Graph, value: int, target: int, sources: Sequence[int], allowed: Allowed, everything: bool
) -> Iterator[tuple[float, float, float]]:
    """Price and spreads of one value's estimate from each source in turn, until one is impossible.

    A node is made for every source until it has come down to coordinate differences; from there on only the
    operations grow, and their costs are added up.
    """
    reached, coupled, operations = {value}, False, 0
    plain = allowed.assume == "nothing"
    position = target
    for source in sources:
        for op in graph.operations[position:source]:
            if op.batched and any(v in reached for v in op.reads):
                reached.update(op.writes)
                coupled |= op.coupled or op.own_backward
                operations += op.cost
        position = source
        if not plain:
            node = make_node(graph, value, target, source, allowed, everything)
            if node is None:
                yield 0.0, 0.0, 0.0
                continue
            if not possible(graph, node):
                return
            yield (node_price(graph, node.cost), *spreads(graph, node))
            plain = node.probe is not None and node.probe.kind == "coordinate" and len(node.operations) > 1
            continue
        if coupled or not all(graph.values[v].finite for v in reached if v in graph.live[source]):
            return
        elements = graph.values[value].per_sample if operations else 0
        yield elements * evaluations(allowed.scheme) * operations / graph.cost, float(elements), 0.0


def node_price(graph: Graph, cost: Cost) -> float:
    """What the planner lowers: forward equivalents; among plans alike in those, adjoints."""
    adjoints = Fraction(cost.adjoints, 10_000 * max(1, len(graph.operations)))
    return float(cost.forward_equivalents_of(graph.nominal_batch) + adjoints)

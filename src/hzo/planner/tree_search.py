"""Which boundary takes its cotangent from which: trees over the positions of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from hzo.plans import Allowed, Cost, Edge, Tree, Wanted, fixed_tree, make_node, possible
from hzo.tracing import Graph


def tree_edges(graph: Graph, tree: Tree, wanted: Wanted, allowed: Allowed) -> list[Edge]:
    """Edges between positions, the rightmost target first.

    The tree first goes over stage boundaries and positions where one tensor carries all influence, then inside those
    stages that hold parameters between several live tensors.
    """
    end = len(graph.operations)
    needed = sorted(position for position in wanted if position < end)
    if not needed:
        return []
    if tree == "flat":
        return [(position, end) for position in reversed(needed)]
    inside: dict[int, list[int]] = {}
    outer = {end}
    for position in needed:
        if position in graph.boundaries or single(graph, position, 0 in wanted):
            outer.add(position)
        else:
            stage = graph.stage_of[position]
            inside.setdefault(stage, []).append(position)
            outer.add(graph.stages[stage].stop)
    if graph.differentiated and needed == [0]:  # a tree over no boundaries would be none
        outer.update(graph.boundaries)
    first = graph.stages[graph.stage_of[max(needed[0] - 1, 0)]].start
    if tree == "planned":
        if graph.differentiated:
            return shortest_path(graph, [first, *needed, end], allowed)
        path = shortest_path(graph, [first, *(p for p in needed if p > first), end], allowed)
        return path if first not in needed else [*path, (first, path[-1][0] if path else end)]
    groups = [[first, *sorted(outer - {first})]]
    groups += [[graph.stages[s].start, *points, graph.stages[s].stop] for s, points in inside.items()]
    edges: list[Edge] = []
    for points in groups:
        edges += [(points[t], points[s]) for t, s in fixed_tree(tree, len(points) - 1)]
    if first in outer:  # the left end itself is asked for: from the boundary next to it
        beside = groups[0][1:] if graph.differentiated else [p for p in groups[0][1:] if p in graph.boundaries]
        edges.append((first, (beside or groups[0][1:])[0]))
    return sorted(edges, key=lambda edge: -edge[0])


def single(graph: Graph, position: int, everything: bool) -> bool:
    """Whether one tensor carries all influence past a position, as it does at the boundaries of a traced model.

    ``everything``: that of the input, too.
    """
    return sum(graph.requires[v] or (everything and graph.values[v].floating) for v in graph.live[position]) == 1


def shortest_path(graph: Graph, points: Sequence[int], allowed: Allowed) -> list[Edge]:
    """The cheapest way to estimate all ``points`` but the first, over any positions between them.

    With exact differences no path is too long, so each point takes its cotangent from the next on the path, and only
    points that nobody asked for may be passed over.
    """
    edges: list[Edge] = []
    for left, right in pairwise(points[1:]):
        between = [p for p in range(left, right + 1) if p in (left, right) or graph.passable(p)]
        best: dict[int, Path] = {right: (0, Fraction(0), 0, right)}
        for target in reversed(between[:-1]):
            best[target] = min(_through(graph, target, s, best[s], allowed) for s in between if s > target)
        position = left
        while position != right:
            edges.append((position, best[position][3]))
            position = best[position][3]
    return sorted(edges, key=lambda edge: -edge[0])


Path = tuple[int, Fraction, int, int]
"""Nodes that cannot be estimated, forward equivalents, queries, and the next boundary: compared in this order."""


def _through(graph: Graph, target: int, source: int, onward: Path, allowed: Allowed) -> Path:
    """The cost of a path that takes everything alive at ``target`` from ``source``."""
    blocked, cost = 0, Cost()
    for value in graph.live[target]:
        node = make_node(graph, value, target, source, allowed) if graph.requires[value] else None
        if node is not None:
            blocked += not possible(graph, node)
            cost += node.cost
    total = cost.forward_equivalents_of(graph.nominal_batch)
    return onward[0] + blocked, onward[1] + total, onward[2] + cost.queries + cost.adjoints, source

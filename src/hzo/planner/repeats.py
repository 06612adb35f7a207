"""Repeats on a given tree: what every edge is asked so that no wanted point's error exceeds a bound. Source: ours.

An edge that is asked r times costs r·price and adds fixed + noise/r to the squared relative error of all that it leads
to. A bound counts as kept up to the rounding of float64 (``TOLERANCE``, relative).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hzo.plans import Edge

TOLERANCE = 1e-9
MOST = 10**9  # more repeats than this are rounding's, not a budget's
_EXACT = 1e-12  # rounding inside the searches: well below TOLERANCE, so that paths of hundreds of edges keep to it


@dataclass(frozen=True, eq=False)
class Intervals:
    """What the edge from each target to each source costs and errs: float64, (n+1, n+1), used for target < source.

    ``wanted``: points to estimate (entry n is not read). ``cost``: price of one repeat where only what is wanted at
    the target is estimated; ``relay`` ≥ cost: where the target is a source itself. ``noise``, ``fixed``: an edge's
    squared relative error is fixed + noise/r. An infinite entry means that there is no such edge.
    """

    wanted: tuple[bool, ...]
    cost: Tensor
    relay: Tensor
    noise: Tensor
    fixed: Tensor

    @property
    def n(self) -> int:
        """The output: the point whose cotangent is known."""
        return len(self.wanted) - 1

    @property
    def points(self) -> list[int]:
        """The wanted points, ascending."""
        return [point for point in range(self.n) if self.wanted[point]]


def along(values: Tensor, edges: Sequence[Edge]) -> list[float]:
    """The entry of every edge."""
    if not edges:
        return []
    targets, sources = zip(*edges, strict=True)
    found: list[float] = values[list(targets), list(sources)].tolist()
    return found


def prices(intervals: Intervals, edges: Sequence[Edge]) -> list[float]:
    """One repeat of every edge: ``relay`` where the target is a source too, else ``cost``."""
    sources = {source for _, source in edges}
    pairs = zip(edges, along(intervals.cost, edges), along(intervals.relay, edges), strict=True)
    return [relay if target in sources else cost for (target, _), cost, relay in pairs]


def price_of(intervals: Intervals, edges: Sequence[Edge], repeats: Sequence[float]) -> float:
    """Σ repeats·price."""
    return math.fsum(r * price for r, price in zip(repeats, prices(intervals, edges), strict=True))


def errors_of(intervals: Intervals, edges: Sequence[Edge], repeats: Sequence[float]) -> dict[int, float]:
    """Squared relative error of every estimated point: fixed + noise/repeats, summed over its path."""
    own = zip(along(intervals.fixed, edges), along(intervals.noise, edges), repeats, strict=True)
    step = {edge: fixed + noise / r for edge, (fixed, noise, r) in zip(edges, own, strict=True)}
    errors = {intervals.n: 0.0}
    for target, source in sorted(edges, reverse=True):
        errors[target] = errors[source] + step[target, source]
    del errors[intervals.n]
    return errors


def within(value: float, error: float) -> bool:
    """Whether a path's error keeps to the bound, up to rounding."""
    return value <= error * (1 + TOLERANCE)


def keeps(intervals: Intervals, edges: Sequence[Edge], repeats: Sequence[float], error: float) -> bool:
    """Whether every wanted point is estimated, at a finite price and within the bound."""
    errors = errors_of(intervals, edges, repeats)
    finite = math.isfinite(price_of(intervals, edges, repeats))
    return finite and all(within(errors.get(point, math.inf), error) for point in intervals.points)


def fewest(noise: float, room: float) -> float:
    """The fewest whole repeats with noise/r ≤ room; inf where there is none up to ``MOST``."""
    if noise == 0:
        return 1 if room >= 0 else math.inf
    return max(1, math.ceil(noise / room * (1 - _EXACT))) if room * MOST >= noise < math.inf else math.inf


def repeats_uniform(intervals: Intervals, edges: Sequence[Edge], error: float) -> list[int] | None:
    """The smallest number that, asked of every noisy edge, keeps to the bound (1 where noise = 0); None: there is none.

    It is the maximum over wanted points of ⌈noise along the path / (error − fixed errors along the path)⌉.
    """
    ones = [1.0] * len(edges)
    fixed = errors_of(intervals, edges, [math.inf] * len(edges))
    noise = {point: value - fixed[point] for point, value in errors_of(intervals, edges, ones).items()}
    if not all(math.isfinite(noise.get(point, math.inf)) for point in intervals.points):
        return None
    slightly_more = error * (1 + _EXACT)
    r = max((fewest(noise[point], slightly_more - fixed[point]) for point in intervals.points), default=1)
    if not math.isfinite(r):
        return None
    found = [int(r) if own > 0 else 1 for own in along(intervals.noise, edges)]
    return found if keeps(intervals, edges, found, error) else None


@dataclass
class _Node:
    """An edge, by its target: its terms, and what lies below it."""

    price: float
    noise: float
    fixed: float
    children: list[int]
    serves: bool = False  # whether it or something below it is wanted
    below_fixed: float = 0.0  # the largest sum of fixed errors on the way to a wanted point below it
    root: float = 0.0  # √S: with a noise budget e below it, the best real repeats there cost S/e
    below_price: float = 0.0  # and whole ones at least this

    @property
    def own_root(self) -> float:
        # A free edge still needs a share of the budget: repeats are finite.
        return math.sqrt(max(self.price, 1e-12) * self.noise)


def _nodes(intervals: Intervals, edges: Sequence[Edge]) -> dict[int, _Node]:
    """Bottom-up: S = Σ over children c of (√(price·noise of c) + √S of c)², and what else a split needs."""
    terms = zip(prices(intervals, edges), along(intervals.noise, edges), along(intervals.fixed, edges), strict=True)
    nodes = {target: _Node(*term, children=[]) for (target, _), term in zip(edges, terms, strict=True)}
    nodes[intervals.n] = _Node(0.0, 0.0, 0.0, [])
    for target, source in edges:
        nodes[source].children.append(target)
    for point in sorted(nodes):
        node = nodes[point]
        below = [nodes[child] for child in node.children if nodes[child].serves]
        node.serves = bool(below) or (point < intervals.n and intervals.wanted[point])
        node.below_fixed = max((child.fixed + child.below_fixed for child in below), default=0.0)
        node.root = math.sqrt(math.fsum((child.own_root + child.root) ** 2 for child in below))
        node.below_price = math.fsum(child.price + child.below_price for child in below)
    return nodes


def _repeats(node: _Node, spare: float, whole: bool) -> float:
    """Repeats of one edge: ``spare`` of the budget is left for its noise and the noise on the worst path below it."""
    if not node.noise or not node.serves:
        return 1
    if spare <= 0:
        return math.inf
    share = spare * node.own_root / (node.own_root + node.root)
    if not whole:
        return node.noise / share
    up = fewest(node.noise, share)
    if node.root == 0:  # nothing below waits for budget
        return up

    def guess(r: float) -> float:
        rest = spare - node.noise / r
        return r * node.price + (max(node.root**2 / rest, node.below_price) if rest > 0 else math.inf)

    # Where repeats below would be less than one, fewer here are enough.
    least = min(up, fewest(node.noise, spare))
    return min({least, max(least, up - 1), up, up + 1}, key=lambda r: (guess(r), -r))


def repeats_optimal(
    intervals: Intervals, edges: Sequence[Edge], error: float, *, whole: bool = True
) -> list[float] | None:
    """The cheapest repeats that keep to the bound on this tree; None if the fixed errors leave none.

    Real repeats (``whole=False``) may fall below 1 and are the exact optimum if all wanted points that are no sources
    have equal fixed errors along their paths: of a budget b for its noise and that below it, an edge gets
    b·√w/(√w + √S), w = price·noise. Where fixed errors differ, the largest sum below an edge is taken off its budget;
    what other paths have to spare goes to their own edges, so the bound holds and the price is an upper one.
    Whole repeats are rounded from the output down, with the split taken anew from what rounding has left; then they
    are lowered as long as a wanted point's slack allows. Not the exact optimum: ``budgets.whole_tree`` gives that.
    """
    nodes = _nodes(intervals, edges)
    found: dict[int, float] = {}
    left = {intervals.n: error * (1 + _EXACT)}
    for target, source in sorted(edges, reverse=True):
        node = nodes[target]
        spare = left[source] - node.fixed - node.below_fixed
        # An edge above that is the last with noise takes all: its rounding may leave a little less than nothing.
        if node.serves and (spare < -100 * _EXACT * error or not math.isfinite(node.noise)):
            return None
        r = _repeats(node, spare, whole)
        if not math.isfinite(r):
            return None
        found[target] = r
        left[target] = left[source] - node.fixed - node.noise / r
    if whole:
        _lower(intervals, edges, nodes, found, error)
    repeats = [int(found[target]) if whole else found[target] for target, _ in edges]
    return repeats if keeps(intervals, edges, repeats, error) else None


def _lower(
    intervals: Intervals, edges: Sequence[Edge], nodes: dict[int, _Node], found: dict[int, float], error: float
) -> None:
    """Lowers repeats in place, dearest edges first, by what the wanted points below an edge all have to spare."""

    def slack() -> dict[int, float]:
        errors = errors_of(intervals, edges, [found[target] for target, _ in edges])
        spare: dict[int, float] = {}
        for target, _ in sorted(edges):
            own = error * (1 + _EXACT) - errors[target] if intervals.wanted[target] else math.inf
            spare[target] = min([own, *(spare[child] for child in nodes[target].children)])
        return spare

    spare = slack()
    for target, _ in sorted(edges, key=lambda edge: -nodes[edge[0]].price):
        node = nodes[target]
        if found[target] > 1 and math.isfinite(spare[target]):
            r = fewest(node.noise, node.noise / found[target] + max(spare[target], 0.0))
            if r < found[target]:
                found[target] = r
                spare = slack()

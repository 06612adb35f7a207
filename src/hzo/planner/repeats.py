"""How often each edge of a given tree is measured, so that every requested cotangent meets an error bound.

An edge that is measured r times costs r·price and adds fixed + noise/r to the squared relative error of all that it
leads to. Source: ours. A bound counts as kept up to the rounding of float64 (``TOLERANCE``, relative).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hzo.planner.edge_table import EXACT, EdgeTable, edge_values, errors_of, keeps, prices
from hzo.plans import Edge

MOST = 10**9  # more repeats than this are rounding's, not a budget's


def fewest(noise: float, room: float) -> float:
    """The fewest whole repeats with noise/r ≤ room; inf where there is none up to ``MOST``."""
    if noise == 0:
        return 1 if room >= 0 else math.inf
    return max(1, math.ceil(noise / room * (1 - EXACT))) if room * MOST >= noise < math.inf else math.inf


def repeats_uniform(table: EdgeTable, edges: Sequence[Edge], error: float) -> list[int] | None:
    """The smallest number that, asked of every noisy edge, keeps to the bound (1 where noise = 0); None: there is none.

    It is the maximum over wanted points of ⌈noise along the path / (error − fixed errors along the path)⌉.
    """
    ones = [1.0] * len(edges)
    fixed = errors_of(table, edges, [math.inf] * len(edges))
    noise = {point: value - fixed[point] for point, value in errors_of(table, edges, ones).items()}
    if not all(math.isfinite(noise.get(point, math.inf)) for point in table.points):
        return None
    slightly_more = error * (1 + EXACT)
    r = max((fewest(noise[point], slightly_more - fixed[point]) for point in table.points), default=1)
    if not math.isfinite(r):
        return None
    found = [int(r) if own > 0 else 1 for own in edge_values(table.noise, edges)]
    return found if keeps(table, edges, found, error) else None


@dataclass
class _Branch:
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


def _branches(table: EdgeTable, edges: Sequence[Edge]) -> dict[int, _Branch]:
    """Bottom-up: S = Σ over children c of (√(price·noise of c) + √S of c)², and what else a split needs."""
    terms = zip(prices(table, edges), edge_values(table.noise, edges), edge_values(table.fixed, edges), strict=True)
    branches = {target: _Branch(*term, children=[]) for (target, _), term in zip(edges, terms, strict=True)}
    branches[table.n] = _Branch(0.0, 0.0, 0.0, [])
    for target, source in edges:
        branches[source].children.append(target)
    for point in sorted(branches):
        branch = branches[point]
        below = [branches[child] for child in branch.children if branches[child].serves]
        branch.serves = bool(below) or (point < table.n and table.wanted[point])
        branch.below_fixed = max((child.fixed + child.below_fixed for child in below), default=0.0)
        branch.root = math.sqrt(math.fsum((child.own_root + child.root) ** 2 for child in below))
        branch.below_price = math.fsum(child.price + child.below_price for child in below)
    return branches


def _repeats(branch: _Branch, spare: float, whole: bool) -> float:
    """Repeats of one edge: ``spare`` of the budget is left for its noise and the noise on the worst path below it."""
    if not branch.noise or not branch.serves:
        return 1
    if spare <= 0:
        return math.inf
    share = spare * branch.own_root / (branch.own_root + branch.root)
    if not whole:
        return branch.noise / share
    up = fewest(branch.noise, share)
    if branch.root == 0:  # nothing below waits for budget
        return up

    def guess(r: float) -> float:
        rest = spare - branch.noise / r
        return r * branch.price + (max(branch.root**2 / rest, branch.below_price) if rest > 0 else math.inf)

    # Where repeats below would be less than one, fewer here are enough.
    least = min(up, fewest(branch.noise, spare))
    return min({least, max(least, up - 1), up, up + 1}, key=lambda r: (guess(r), -r))


def repeats_optimal(table: EdgeTable, edges: Sequence[Edge], error: float, *, whole: bool = True) -> list[float] | None:
    """The cheapest repeats that keep to the bound on this tree; None if the fixed errors leave none.

    Real repeats (``whole=False``) may fall below 1 and are the exact optimum if all wanted points that are no sources
    have equal fixed errors along their paths: of a budget b for its noise and that below it, an edge gets
    b·√w/(√w + √S), w = price·noise. Where fixed errors differ, the largest sum below an edge is taken off its budget;
    what other paths have to spare goes to their own edges, so the bound holds and the price is an upper one.
    Whole repeats are rounded from the output down, with the split taken anew from what rounding has left; then they
    are lowered as long as a wanted point's slack allows. The exact optimum is ``integer_program.whole_tree``'s.
    """
    branches = _branches(table, edges)
    found: dict[int, float] = {}
    left = {table.n: error * (1 + EXACT)}
    for target, source in sorted(edges, reverse=True):
        branch = branches[target]
        spare = left[source] - branch.fixed - branch.below_fixed
        # An edge above that is the last with noise takes all: its rounding may leave a little less than nothing.
        if branch.serves and (spare < -100 * EXACT * error or not math.isfinite(branch.noise)):
            return None
        r = _repeats(branch, spare, whole)
        if not math.isfinite(r):
            return None
        found[target] = r
        left[target] = left[source] - branch.fixed - branch.noise / r
    if whole:
        _lower(table, edges, branches, found, error)
    repeats = [int(found[target]) if whole else found[target] for target, _ in edges]
    return repeats if keeps(table, edges, repeats, error) else None


def _lower(
    table: EdgeTable, edges: Sequence[Edge], branches: dict[int, _Branch], found: dict[int, float], error: float
) -> None:
    """Lowers repeats in place, dearest edges first, by what the wanted points below an edge all have to spare."""

    def slack() -> dict[int, float]:
        errors = errors_of(table, edges, [found[target] for target, _ in edges])
        spare: dict[int, float] = {}
        for target, _ in sorted(edges):
            own = error * (1 + EXACT) - errors[target] if table.wanted[target] else math.inf
            spare[target] = min([own, *(spare[child] for child in branches[target].children)])
        return spare

    spare = slack()
    for target, _ in sorted(edges, key=lambda edge: -branches[edge[0]].price):
        branch = branches[target]
        if found[target] > 1 and math.isfinite(spare[target]):
            r = fewest(branch.noise, branch.noise / found[target] + max(spare[target], 0.0))
            if r < found[target]:
                found[target] = r
                spare = slack()

"""The table of edges: what each costs and how wrong it is, and from these the price and errors of a whole tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hzo.plans import Edge

TOLERANCE = 1e-9  # relative: a bound counts as kept up to this
EXACT = 1e-12  # rounding inside the searches: well below TOLERANCE, so that paths of hundreds of edges keep to it


@dataclass(frozen=True, eq=False)
class EdgeTable:
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


def edge_values(values: Tensor, edges: Sequence[Edge]) -> list[float]:
    """The entry of every edge."""
    if not edges:
        return []
    targets, sources = zip(*edges, strict=True)
    found: list[float] = values[list(targets), list(sources)].tolist()
    return found


def prices(table: EdgeTable, edges: Sequence[Edge]) -> list[float]:
    """One repeat of every edge: ``relay`` where the target is a source too, else ``cost``."""
    sources = {source for _, source in edges}
    pairs = zip(edges, edge_values(table.cost, edges), edge_values(table.relay, edges), strict=True)
    return [relay if target in sources else cost for (target, _), cost, relay in pairs]


def price_of(table: EdgeTable, edges: Sequence[Edge], repeats: Sequence[float]) -> float:
    """Σ repeats·price."""
    return math.fsum(r * price for r, price in zip(repeats, prices(table, edges), strict=True))


def errors_of(table: EdgeTable, edges: Sequence[Edge], repeats: Sequence[float]) -> dict[int, float]:
    """Squared relative error of every estimated point: fixed + noise/repeats, summed over its path."""
    own = zip(edge_values(table.fixed, edges), edge_values(table.noise, edges), repeats, strict=True)
    step = {edge: fixed + noise / r for edge, (fixed, noise, r) in zip(edges, own, strict=True)}
    errors = {table.n: 0.0}
    for target, source in sorted(edges, reverse=True):
        errors[target] = errors[source] + step[target, source]
    del errors[table.n]
    return errors


def within_bound(value: float, error: float) -> bool:
    """Whether a path's error keeps to the bound, up to rounding."""
    return value <= error * (1 + TOLERANCE)


def keeps(table: EdgeTable, edges: Sequence[Edge], repeats: Sequence[float], error: float) -> bool:
    """Whether every wanted point is estimated, at a finite price and within the bound."""
    errors = errors_of(table, edges, repeats)
    finite = math.isfinite(price_of(table, edges, repeats))
    return finite and all(within_bound(errors.get(point, math.inf), error) for point in table.points)

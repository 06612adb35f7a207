"""The cheapest tree for a table of prices and errors of edges, and how often each edge is repeated. Source: ours.

Trees here are nested: no edge (k, j) crosses another one, k < k' < j < j'. If prices do not fall as an interval grows,
that loses nothing without noise: the target of the longer reach can take the nearer source. With noise a crossing tree
is then rarely cheaper, and little (seen: 2 %). Where prices do fall it may well be (seen: 40 %); to find the best of
all trees is then as hard as covering sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hzo.planner.edge_table import EdgeTable, keeps, price_of
from hzo.planner.integer_program import whole_tree
from hzo.planner.repeats import repeats_optimal, repeats_uniform
from hzo.plans import FIXED, Edge, Tree, fixed_tree

CANDIDATES: tuple[Tree, ...] = (*FIXED, 3, 4, 8)
# Operations that the whole-repeat programme may take at full resolution; longer chains get fewer budgets.
_OPERATIONS = 1e8
_LEVELS, _FEW_LEVELS, _CHOICES = 192, 96, 16
# Short chains: more budgets and repeats than they have, unless the bound asks for hundreds of repeats.
_EXACT_UP_TO, _EXACT_LEVELS, _EXACT_CHOICES = 8, 4096, 64


def cheapest(table: EdgeTable) -> list[Edge] | None:
    """The tree of least price where every edge is asked once: V(i, j) = min_k price(k, j) + V(i, k) + V(k, j).

    None if a wanted point cannot be reached. Cost: n³/6 operations.
    """
    zero = torch.zeros_like(table.cost)
    return _best(table, zero, zero, table.cost, table.relay)


def best_tree(table: EdgeTable, error: float) -> list[Edge] | None:
    """The best tree for real repeats (that may fall below 1): V(i, j) = min_k (√w + √V(i, k))² + V(k, j).

    w = price·noise, and a tree costs V/error. Exact where no edge has a fixed error or all have noise. Else a guess:
    the fixed error is taken off the whole budget, w = price·noise/(1 − fixed/error), though an edge may have to share
    it with others; an edge without noise costs its price once. None if a wanted point cannot be reached.
    """
    if not error > 0:
        return None
    share = 1 - table.fixed / error
    scale = torch.where(share > 0, table.noise / (share.clamp(min=1e-300) * error), math.inf)
    scale = torch.where((share == 0) & (table.noise == 0), 0.0, scale)
    noisy = scale > 0
    weights = [torch.where(noisy, price * scale, 0.0) for price in (table.cost, table.relay)]
    once = [torch.where(noisy, 0.0, price) for price in (table.cost, table.relay)]
    return _best(table, *weights, *once)


def _best(
    table: EdgeTable, leaf_weight: Tensor, relay_weight: Tensor, leaf_price: Tensor, relay_price: Tensor
) -> list[Edge] | None:
    """Least S + P over nested trees: S composes by square roots along paths, P adds up. Rows: i + 1 for i = −1..n−1."""
    n = table.n
    terms = [
        term.nan_to_num(nan=math.inf, posinf=math.inf) for term in (leaf_weight, relay_weight, leaf_price, relay_price)
    ]
    wanted = torch.tensor([*table.wanted[:n], False])
    before = torch.cumsum(wanted, 0) - wanted.long()  # wanted points left of each
    s = torch.full((n + 1, n + 1), math.inf, dtype=torch.float64)
    p, split = s.clone(), torch.full((n + 1, n + 1), -1)
    for width in range(1, n + 2):
        row = torch.arange(n + 2 - width)[:, None]  # i + 1
        j = row + width - 1
        inside = before[j] - torch.where(row > 0, (before + wanted)[(row - 1).clamp(min=0)], 0)
        empty = (inside <= 0).squeeze(1)
        s[row[empty, 0], j[empty, 0]] = p[row[empty, 0], j[empty, 0]] = 0
        row, j = row[~empty], j[~empty]
        if not len(row):
            continue
        k = row + torch.arange(width - 1)
        left = before[k] - torch.where(row > 0, (before + wanted)[(row - 1).clamp(min=0)], 0)
        serves = left > 0
        weight, price = (torch.where(serves, terms[place + 1][k, j], terms[place][k, j]) for place in (0, 2))
        s_k = (weight.sqrt() + s[row, k].sqrt()) ** 2 + s[k + 1, j]
        p_k = price + p[row, k] + p[k + 1, j]
        total = torch.where(serves | wanted[k], s_k + p_k, math.inf)
        best = total.argmin(1, keepdim=True)
        s[row, j], p[row, j], split[row, j] = s_k.gather(1, best), p_k.gather(1, best), k.gather(1, best)
        lost = total.gather(1, best).isinf()
        s[row[lost], j[lost]] = math.inf
    if not math.isfinite(float(s[0, n] + p[0, n])):
        return None
    return _edges_of(split.tolist(), n)


def _edges_of(split: list[list[int]], n: int) -> list[Edge]:
    """The edges that the best splits lead to, from the output down; −1 is a range without one."""
    edges, open_ranges = [], [(0, n)]
    while open_ranges:
        row, source = open_ranges.pop()
        target = split[row][source]
        if target >= 0:
            edges.append((target, source))
            open_ranges += [(row, target), (target + 1, source)]
    return sorted(edges, reverse=True)


def over_wanted(table: EdgeTable, tree: Tree) -> list[Edge]:
    """A fixed tree whose boundaries are the wanted points."""
    points = [*table.points, table.n]
    return [(points[target - 1], points[source - 1]) for target, source in fixed_tree(tree, len(points))]


def steadiest(table: EdgeTable) -> list[Edge]:
    """Every wanted point by the path of least fixed error: if these are too large, so are all others. Edges may cross.

    Points that cannot be reached at all are left out.
    """
    n = table.n
    edge_exists = table.noise.isfinite()
    fixed_leaf, fixed_relay = (
        torch.where(edge_exists & price.isfinite(), table.fixed, math.inf).tolist()
        for price in (table.cost, table.relay)
    )
    sums, sources = [math.inf] * n + [0.0], [n] * n
    for k in range(n - 1, -1, -1):
        sums[k], sources[k] = min((fixed_relay[k][j] + sums[j], j) for j in range(k + 1, n + 1))
    edges: dict[int, int] = {}
    for point in table.points:
        total, source = min((fixed_leaf[point][j] + sums[j], j) for j in range(point + 1, n + 1))
        if math.isinf(total):
            continue
        edges.setdefault(point, source)
        while source < n:  # a point that turns out to be a source takes the edge that a source needs
            edges[source] = sources[source]
            source = sources[source]
    return sorted(edges.items(), reverse=True)


def _resolution(n: int) -> tuple[int, int]:
    """Budgets and repeats that the whole-repeat programme tries, within its number of operations."""
    each = _OPERATIONS / (n**3 / 6)
    choices = round(min(max((each / 10) ** 0.5, 4), _CHOICES))
    return round(min(max(each / choices, 24), _LEVELS)), choices


def _only(table: EdgeTable, edges: set[Edge]) -> EdgeTable:
    """No edges but these."""
    targets, sources = zip(*edges, strict=True)
    other = torch.ones_like(table.cost, dtype=torch.bool)
    other[list(targets), list(sources)] = False
    cost, relay = (price.masked_fill(other, math.inf) for price in (table.cost, table.relay))
    return replace(table, cost=cost, relay=relay)


class _Found:
    """Trees with whole repeats that keep to the bound, and their prices."""

    def __init__(self, table: EdgeTable, error: float) -> None:
        self.table, self.error = table, error
        self.all: list[tuple[float, list[Edge], list[int]]] = []

    @property
    def price(self) -> float:
        """The least so far."""
        return min(price for price, _, _ in self.all)

    def add(self, tree: tuple[list[Edge], list[int]] | None) -> None:
        """Where there is one, and it keeps to the bound."""
        if tree is not None and keeps(self.table, *tree, self.error):
            self.all.append((price_of(self.table, *tree), *tree))

    def try_tree(self, edges: list[Edge] | None, uniform: bool) -> None:
        """With uniform repeats, and unless only those will do with the best ones."""
        if edges is None:
            return
        ways = (repeats_uniform,) if uniform else (repeats_optimal, repeats_uniform)
        for repeats in (share_out(self.table, edges, self.error) for share_out in ways):
            if repeats is not None:
                self.add((edges, [int(r) for r in repeats]))


def optimum(
    table: EdgeTable,
    error: float | None,
    programme: bool = True,
    uniform: bool = False,
    others: Sequence[list[Edge]] = (),
) -> tuple[list[Edge], list[int]] | None:
    """The cheapest tree and whole repeats that keep to the bound; ``None`` for it asks every edge once.

    The least of: the best tree for real repeats, the cheapest tree and every fixed tree over the wanted points, each
    with the best repeats found and with uniform ones; and the whole-repeat programme at a resolution that falls as the
    chain grows. It runs once more: up to eight points so that the optimum over nested trees is exact (unless relays ask
    for more than 64 repeats or leave more than 4096 budgets), on longer chains on the edges of all the trees before.
    None if no tree keeps to the bound, however often its edges are repeated. Without ``programme`` the trees alone are
    compared, in a tenth of the time; ``uniform`` compares them with one number of repeats for all edges. ``others``:
    more trees that are not to be cheaper.
    """
    if error is None:
        edges = cheapest(table)
        return None if edges is None else (edges, [1] * len(edges))
    if not table.points:
        return [], []
    found = _Found(table, error)
    fixed = (*(over_wanted(table, tree) for tree in CANDIDATES), *others)
    for edges in (best_tree(table, error), cheapest(table), *fixed):
        found.try_tree(edges, uniform)
    if not found.all:
        found.try_tree(steadiest(table), uniform)
    if not found.all:
        return None
    if not programme or uniform:
        return min(found.all, key=lambda one: one[0])[1:]
    levels, choices = _resolution(table.n)
    found.add(whole_tree(table, error, found.price, levels=levels, choices=choices))
    if table.n <= _EXACT_UP_TO:  # the lower the price to beat, the fewer budgets are left to look at
        found.add(whole_tree(table, error, found.price, levels=_EXACT_LEVELS, choices=_EXACT_CHOICES))
    else:
        few = _only(table, {edge for _, edges, _ in found.all for edge in edges})
        found.add(whole_tree(few, error, found.price, levels=_FEW_LEVELS, choices=_CHOICES))
    _, edges, repeats = min(found.all, key=lambda one: one[0])
    return edges, repeats

"""Tree and whole repeats chosen together, by dynamic programming over what is left of the error budget (ours).

V(i, j; b): the least price of estimating all required cotangents strictly between points i and j, if the errors below j
may add up to b. With k the leftmost point that is estimated straight from j,

    V(i, j; b) = min over k and r of  r·price(k, j) + V(i, k; b − fixed − noise/r) + V(k, j; b).

Trees are nested: no two edges cross. All of them are searched, with internal nodes that are not required. The budgets b
are those that repeats can leave at a point; if they are too many, they are rounded down to a few, so that a bound is
always kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hzo.planner.edge_table import EXACT, EdgeTable
from hzo.planner.repeats import MOST, fewest
from hzo.plans import Edge

# Shares of the budget below 1/32 do not occur on relays worth having, unless the chain is longer than a few hundred.
_SMALLEST_SHARE = 32


def _groups(ascending: Tensor) -> Tensor:
    """Numbers from 0 that go up wherever the values do."""
    return torch.cat((torch.zeros(1, dtype=torch.long), (ascending.diff() > 0).long().cumsum(0)))


@dataclass(frozen=True, eq=False)
class _Programme:
    table: EdgeTable
    error: float
    limit: float
    levels: int | None
    choices: int | None
    tried: dict[Edge, list[float]] = field(default_factory=dict)  # what ``repeats`` found so far

    @cached_property
    def before(self) -> list[int]:
        """The nearest wanted point to the left of each point, or −1."""
        found, last = [], -1
        for point in range(self.table.n + 1):
            found.append(last)
            last = point if self.table.wanted[point] else last
        return found

    @cached_property
    def least(self) -> list[float]:
        """The least that each point costs in any tree, with the whole budget for itself: 0 if it is not wanted."""
        n, terms = self.table.n, self.table
        room = self.error * (1 + EXACT) - terms.fixed
        r = torch.where(terms.noise > 0, (terms.noise / room * (1 - EXACT)).ceil().clamp(min=1), 1.0)
        enough = (room * MOST >= terms.noise) & (room >= 0)
        price = torch.where(enough & r.isfinite() & terms.cost.isfinite(), terms.cost * r, math.inf)
        lowest = [float(price[point, point + 1 :].min()) for point in range(n)]
        return [own if self.table.wanted[point] else 0.0 for point, own in enumerate(lowest)]

    @cached_property
    def spare(self) -> float:
        """What the limit leaves beyond the least of all."""
        return self.limit - math.fsum(self.least)

    @cached_property
    def entries(self) -> dict[str, list[list[float]]]:
        return {name: getattr(self.table, name).tolist() for name in ("cost", "relay", "noise", "fixed")}

    def entry(self, name: str, target: int, source: int) -> float:
        return self.entries[name][target][source]

    def repeats(self, k: int, j: int) -> list[float]:
        """Repeats to try on an edge whose target is a source: those that fit the budget and the limit."""
        if (k, j) not in self.tried:
            self.tried[k, j] = self._repeats(k, j)
        return self.tried[k, j]

    def _repeats(self, k: int, j: int) -> list[float]:
        price, noise, fixed = (self.entry(name, k, j) for name in ("relay", "noise", "fixed"))
        if not math.isfinite(price + noise + fixed):
            return []
        spare = self.spare + self.least[k]
        low = fewest(noise, self.error * (1 + EXACT) - fixed)
        high = low if noise == 0 else spare / price * (1 + EXACT) if price > 0 else math.inf
        if noise > 0 and (self.choices is not None or math.isinf(high)):
            high = min(high, max(low, math.ceil(_SMALLEST_SHARE * noise / self.error)) + 1)
        if not math.isfinite(low) or low > high or low * price > spare * (1 + EXACT):
            return []
        high = math.floor(high)
        if self.choices is None or high - low < self.choices:
            return [float(r) for r in range(int(low), int(high) + 1)]
        # Evenly in the logarithm: the price of a wrong repeat is relative.
        steps = [low * (high / low) ** (step / (self.choices - 1)) for step in range(self.choices)]
        return sorted({float(round(step)) for step in steps})

    @cached_property
    def left(self) -> list[Tensor]:
        """For each point the budgets that may be left there, ascending; none where it can be no source.

        A budget is dropped where its path alone, and the least of all other wanted points, cost more than the limit.
        """
        n = self.table.n
        budgets = [torch.empty(0, dtype=torch.float64)] * (n + 1)
        excess = list(budgets)  # what the cheapest path to such a budget costs beyond the least of its points
        budgets[n], excess[n] = torch.full((1,), self.error, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for k in range(n - 1, -1, -1):
            if self.before[k] < 0:
                continue
            found, over = [], []
            for j in range(k + 1, n + 1):
                tried = self.repeats(k, j) if len(budgets[j]) else []
                if tried:
                    r = torch.tensor(tried, dtype=torch.float64)[:, None]
                    found.append((budgets[j] - self.entry("fixed", k, j) - self.entry("noise", k, j) / r).flatten())
                    over.append((excess[j] + r * self.entry("relay", k, j) - self.least[k]).flatten())
            if found:
                budgets[k], excess[k] = self.thinned(torch.cat(found), torch.cat(over))
        return budgets

    def thinned(self, budgets: Tensor, over: Tensor) -> tuple[Tensor, Tensor]:
        """Those worth keeping, ascending, each with its least excess: one (the smallest) for every cell of budgets."""
        good = (over <= self.spare * (1 + EXACT)) & (budgets >= -EXACT * self.error)
        budgets, order = budgets[good].clamp(min=0).sort()
        if not len(budgets):
            return budgets, budgets
        group = _groups((budgets / self.error / EXACT / 10).round())  # equal up to rounding
        if self.levels is not None and int(group[-1]) >= self.levels:
            group = _groups((budgets / self.error * self.levels).floor())
        over = over[good][order]
        least = torch.full((int(group[-1]) + 1,), math.inf, dtype=torch.float64).scatter_reduce(0, group, over, "amin")
        # The first of those that are reached for least: few repeats leave more to choose from than a little budget.
        cheap = (over == least[group]).nonzero().squeeze(1)
        first = cheap[torch.cat((torch.tensor([True]), group[cheap].diff() > 0))]
        return budgets[first], over[first]

    def leaf(self, k: int, j: int) -> Tensor:
        """Whole repeats of an edge with nothing wanted below its target, for every budget at j; (budgets,)."""
        return self.leaves(j)[k]

    def leaves(self, j: int) -> Tensor:
        """The same for all targets: (targets 0..j−1, budgets at j); inf where there is none."""
        noise = self.table.noise[:j, j, None]
        room = self.left[j] - self.table.fixed[:j, j, None] + EXACT * self.error
        noisy = torch.where(room * MOST >= noise, (noise / room * (1 - EXACT)).ceil().clamp(min=1), math.inf)
        return torch.where(noise > 0, noisy, torch.where(room >= 0, 1.0, math.inf))

    def steps(self, j: int, targets: list[int]) -> tuple[Tensor, Tensor]:
        """For each target the repeats to try (targets, r), and for each of these and every budget at j the place of
        what it leaves at the target (targets, r, budgets); its last place, worth nothing, where that is too little."""
        tried = [self.repeats(k, j) for k in targets]
        most = max(map(len, tried))
        r = torch.tensor([own + own[-1:] * (most - len(own)) for own in tried], dtype=torch.float64)
        padded = torch.nn.utils.rnn.pad_sequence([self.left[k] for k in targets], True, math.inf)
        noise, fixed = (term[targets, j][:, None, None] for term in (self.table.noise, self.table.fixed))
        rest = self.left[j] - fixed - noise / r[:, :, None] + 10 * EXACT * self.error
        place = torch.searchsorted(padded, rest.flatten(1), right=True).view(rest.shape) - 1
        last = torch.tensor([len(self.left[k]) for k in targets])[:, None, None]
        return r, torch.where(place < 0, last, place)

    def relays(self, j: int) -> list[int]:
        """Targets of j that can be sources."""
        return [k for k in range(j) if len(self.left[k]) and self.repeats(k, j)] if len(self.left[j]) else []

    @cached_property
    def solved(self) -> tuple[list[Tensor], list[Tensor]]:
        """For each j: V and the best k, both (budgets at j and a last one that is too little, i = −1..j−1)."""
        value: list[Tensor] = []
        split: list[Tensor] = []
        for j in range(self.table.n + 1):
            size = len(self.left[j])
            v = torch.full((size + 1, j + 1), math.inf, dtype=torch.float64)
            v[:size, self.before[j] + 1 :] = 0
            best = torch.full((size, j + 1), -1, dtype=torch.int16)
            value.append(v)
            split.append(best)
            if size:
                self.fill(j, value, best)
        return value, split

    def fill(self, j: int, value: list[Tensor], best: Tensor) -> None:
        """Column j, downwards in k, so that V(k, j) is complete when it is read."""
        v = value[j][:-1]
        size = len(v)
        leaves = self.leaves(j)
        leaves = torch.where(leaves.isfinite(), leaves * self.table.cost[:j, j, None], math.inf)
        relays = self.relays(j)
        tried: dict[int, tuple[Tensor, Tensor]] = {}  # for every relay the price of each number of repeats, and places
        if relays:
            r, place = self.steps(j, relays)
            prices = (r * self.table.relay[relays, j][:, None]).unbind()
            tried = dict(zip(relays, zip(prices, place.flatten(1).unbind(), strict=True), strict=True))
        served = leaves.isfinite().any(1).tolist()
        for k in range(j - 1, -1, -1):
            if k not in tried and not (served[k] and self.table.wanted[k]):
                continue
            low = self.before[k] + 1  # i below that leave something wanted in (i, k)
            if k in tried:
                price, places = tried[k]
                cost = price[:, None, None]
                below = value[k][:, :low].index_select(0, places).view(len(cost), size, low)
                block = (below + cost).amin(0) if len(cost) > 1 else below[0] + cost[0]
            else:
                block = torch.full((size, low), math.inf, dtype=torch.float64)
            if self.table.wanted[k]:
                block = torch.cat((block, leaves[k][:, None].expand(size, k + 1 - low)), 1)
            block += v[:, k + 1 : k + 2]
            old = v[:, : block.shape[1]]
            best[:, : block.shape[1]].masked_fill_(block < old, k)
            torch.minimum(old, block, out=old)

    def found(self) -> tuple[list[Edge], list[int]] | None:
        """Follows the best choices down from the output."""
        value, split = self.solved
        n = self.table.n
        if not value[n][0, 0].isfinite():
            return None
        repeats: dict[Edge, int] = {}
        open_ranges = [(-1, n, 0)]
        while open_ranges:
            i, j, budget = open_ranges.pop()
            if i >= self.before[j]:
                continue
            k = int(split[j][budget, i + 1])
            open_ranges.append((k, j, budget))
            if i >= self.before[k]:
                repeats[k, j] = int(self.leaf(k, j)[budget])
                continue
            r, place = (found[0] for found in self.steps(j, [k]))
            choice = int((r * self.entry("relay", k, j) + value[k][place[:, budget], i + 1]).argmin())
            repeats[k, j] = int(r[choice])
            open_ranges.append((i, k, int(place[choice, budget])))
        edges = sorted(repeats, reverse=True)
        return edges, [repeats[edge] for edge in edges]


def whole_tree(
    table: EdgeTable,
    error: float,
    limit: float,
    *,
    levels: int | None = None,
    choices: int | None = None,
) -> tuple[list[Edge], list[int]] | None:
    """The cheapest nested tree and whole repeats within the bound and the price ``limit``; None if it finds none.

    ``levels``: budgets kept at each point; ``choices``: repeats tried on an edge to a source. With None for both the
    optimum is exact, as long as the limit is finite: good for eight points or so, and for longer chains if few budgets
    are possible. Else the bound is kept and the price is an upper one. Cost: n³/6·levels·choices operations.
    """
    programme = _Programme(table, error, limit, levels, choices)
    return programme.found() if math.isfinite(math.fsum(programme.least)) else None

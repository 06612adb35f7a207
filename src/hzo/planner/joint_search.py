"""Steps, repeats and tree together: the cheapest way to keep an error, by the error model.

A step balances noise and rounding, which a larger one lowers, against curvature. Repeats lower noise alone. Which of
them pays depends on how much of the error a node may take, and that on the tree: a step is chosen for an even
share first, then tree and repeats, and at last each node's step again for what its repeats leave. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf, log2
from typing import Literal, get_args

import torch
from torch import Tensor

from hzo._options import one_of
from hzo.errors import PlanError
from hzo.planner.accuracy import ErrorModel
from hzo.planner.candidate_edges import CandidateEdges
from hzo.planner.edge_table import EdgeTable, price_of
from hzo.planner.nested_trees import optimum
from hzo.planner.repeats import repeats_optimal, repeats_uniform
from hzo.plans import Edge, PlannedEdge
from hzo.tracing import Graph

Repeats = Literal["optimal", "uniform"]
_REPEATS: tuple[Repeats, ...] = get_args(Repeats)
MAX_STEP = 1.0  # in units of the activation: what lies beyond has not been calibrated
_PROGRAMME = 256  # points up to which tree and whole repeats are looked for together: a matter of seconds


def check_repeats(repeats: str) -> Repeats:
    """How repeats are shared out, or an error that lists the ways."""
    return one_of("repeats", repeats, _REPEATS, PlanError)


@dataclass(frozen=True, eq=False)
class Balance:
    """What steps, repeats and tree are chosen from.

    Attributes:
        noise, lasting: (steps, points, points): η that falls with repeats, and η that does not.
        steps: relative to the activation's root mean square; one None where the user has fixed the step.
        trees: edges by point: of the given tree, or of those that one to be found may not cost more than.
        free: whether the tree is to be found.
        growth: the most that errors grow beside cotangents, from the output to a wanted point.
    """

    candidates: CandidateEdges
    noise: Tensor
    lasting: Tensor
    steps: tuple[float | None, ...]
    trees: tuple[list[Edge], ...]
    free: bool
    repeats: Repeats
    growth: float


def balance(
    graph: Graph,
    model: ErrorModel,
    found: CandidateEdges,
    eps: float,
    step: float | None,
    trees: Sequence[list[Edge]],
    free: bool,
    repeats: Repeats,
) -> Balance:
    """The errors of all edges for every step that may be chosen.

    Args:
        eps: unit in the last place of the widest dtype: no step is worth taking below its root.
        step: the user's, for all nodes. trees: edges by position. free: whether another tree may be found.
    """
    points = torch.tensor(found.points)
    targets = model.targets(graph, list(zip(found.points, (*found.requested, graph.outputs), strict=True)))
    column, source = targets.column(), points[None, :]
    smallest = eps ** (1 / 3) / 8
    relative = [MAX_STEP * 2**-k for k in range(ceil(log2(MAX_STEP / smallest)) + 1)]
    steps: tuple[float | None, ...] = tuple(relative) if step is None else (None,)
    lengths = [targets.scale * t for t in relative] if step is None else [torch.full_like(targets.scale, step)]
    noise, lasting = [], []
    adjoint = model.by_measured_adjoint(column, source, found.measured)
    for h in lengths:
        bent = model.bends(targets, h)[:, points] * (found.spread > 0)
        noise.append(model.by_noise(column, source, found.spread, h[:, None]) + adjoint)
        lasting.append(model.lasting(column, source, found.spread, h[:, None]) + bent)
    # Errors counted at the output: what a path adds up there is the same for all that lies behind it.
    growth = model.worst_growth()[points][:, None]
    noise, lasting = [n / growth for n in noise], [n / growth for n in lasting]
    place = {position: k for k, position in enumerate(found.points)}
    placed = tuple([(place[t], place[s]) for t, s in tree] for tree in trees)
    highest = max((float(g) for g, asked in zip(growth, found.wanted, strict=True) if asked), default=1.0)
    return Balance(found, torch.stack(noise), torch.stack(lasting), steps, placed, free, repeats, highest)


def steadiest_steps(choice: Balance) -> list[PlannedEdge]:
    """A given tree, each node asked once, with the step of the smallest error."""
    best = (choice.noise + choice.lasting).argmin(0)
    points = choice.candidates.points
    return [PlannedEdge(points[k], points[j], 1, choice.steps[int(best[k, j])]) for k, j in choice.trees[0]]


def keeping(choice: Balance, error: float, programme: bool = True) -> list[PlannedEdge] | None:
    """The cheapest edges whose errors stay below ``error`` along every path; None where no repeats can keep it.

    Args:
        programme: look for whole repeats and tree together, too, and not only for the best repeats on some trees.
    """
    error = error / choice.growth
    points = len(choice.candidates.points)
    shares = [error / (1 + log2(max(2, points))), error / 2, error / points]
    shares = shares[:1] if len(choice.steps) == 1 or points > _PROGRAMME else shares
    found = [(share, one) for share in shares if (one := _for_share(choice, error, share, programme=False)) is not None]
    if not found:
        return None
    share, best = min(found, key=lambda pair: pair[1][0])
    if programme and points <= _PROGRAMME and choice.free:
        best = min(best, _for_share(choice, error, share, programme=True) or best, key=lambda one: one[0])
    return best[1]


def _for_share(choice: Balance, error: float, share: float, programme: bool) -> tuple[float, list[PlannedEdge]] | None:
    """Price and edges where each node steps as is best if it may take ``share`` of the error."""
    room = share - choice.lasting
    score = torch.where(room > 0, choice.noise / room.clamp(min=1e-300), inf)
    hopeless = (score == inf).all(0)
    best = torch.where(hopeless, choice.lasting.argmin(0), score.argmin(0))
    table = _edge_table(choice, best)
    result = _solve(choice, table, error, programme)
    if result is None:
        return None
    edges, repeats = result
    points = choice.candidates.points
    planned = []
    for (k, j), r in zip(edges, repeats, strict=True):
        fewest, at = (r, int(best[k, j])) if choice.repeats == "uniform" else _fewest(choice, k, j, r, int(best[k, j]))
        planned.append(PlannedEdge(points[k], points[j], fewest, choice.steps[at]))
    return price_of(table, edges, [edge.repeats for edge in planned]), planned


def _fewest(choice: Balance, k: int, j: int, repeats: int, at: int) -> tuple[int, int]:
    """The fewest repeats, and the step for them, that do no worse than so many repeats with the step ``at``."""
    allowed = choice.noise[at, k, j] / repeats + choice.lasting[at, k, j]
    room = allowed - choice.lasting[:, k, j]
    needed = torch.where(room > 0, (choice.noise[:, k, j] / room.clamp(min=1e-300)).sub(1e-9).ceil(), inf)
    needed[at] = min(float(needed[at]), repeats)
    fewest = int(needed.argmin())
    return max(1, int(needed[fewest])), fewest


def _solve(choice: Balance, table: EdgeTable, error: float, programme: bool) -> tuple[list[Edge], list[int]] | None:
    uniform = choice.repeats == "uniform"
    if choice.free:
        return optimum(table, error, programme, uniform, choice.trees)
    (edges,) = choice.trees
    repeats = (repeats_uniform if uniform else repeats_optimal)(table, edges, error)
    return None if repeats is None else (edges, [round(r) for r in repeats])


def _edge_table(choice: Balance, best: Tensor) -> EdgeTable:
    found = choice.candidates
    return EdgeTable(
        wanted=found.wanted,
        cost=found.cost,
        relay=found.relay,
        noise=choice.noise.gather(0, best[None])[0],
        fixed=choice.lasting.gather(0, best[None])[0],
    )


def affordable(choice: Balance, fits: Callable[[list[PlannedEdge]], bool]) -> list[PlannedEdge] | None:
    """The edges of the smallest error that still fit a budget; None where not even one query each does."""
    best = keeping(choice, inf, programme=False)
    if best is None or not fits(best):
        return None
    high = 1e6
    while not ((found := keeping(choice, high, programme=False)) and fits(found)):
        high *= 1e3  # a signal that drowns: even this error asks for more repeats than the budget has
        if high > _LARGEST:
            return best
    best, high = _lowest(choice, fits, found, 1e-12, high, programme=False)
    if choice.free and len(choice.candidates.points) <= _PROGRAMME:
        # Tree and whole repeats looked for together have a smaller error for the same price, but take their time.
        best, _ = _lowest(choice, fits, best, high / 2, high, programme=True)
    return best


_LARGEST = 1e30  # an error beyond which nothing is told apart


def _lowest(
    choice: Balance,
    fits: Callable[[list[PlannedEdge]], bool],
    best: list[PlannedEdge],
    low: float,
    high: float,
    programme: bool,
) -> tuple[list[PlannedEdge], float]:
    """Halve, on a logarithmic scale, between an error that nobody can pay and one that ``best`` keeps."""
    while high / low > 1.03:
        middle = (low * high) ** 0.5
        found = keeping(choice, middle, programme)
        if found is not None and fits(found):
            best, high = found, middle
        else:
            low = middle
    return best, high

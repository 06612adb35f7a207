"""What a plan is to achieve, a cosine or a price, and the decisions that achieve it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import exp, inf

import torch

from hzo._options import shown
from hzo.errors import PlanError
from hzo.planner.accuracy import ErrorModel, expected_errors, parameter_errors, path_error
from hzo.planner.calibration import Calibration
from hzo.planner.candidate_edges import candidate_edges
from hzo.planner.joint_search import Balance, Repeats, affordable, balance, keeping, steadiest_steps
from hzo.planner.mesh_cost import Mesh, rank_cost
from hzo.planner.nested_trees import CANDIDATES
from hzo.planner.seconds import seconds_of
from hzo.planner.tree_search import single, tree_edges
from hzo.plans import Allowed, Edge, Expected, Plan, PlannedEdge, Wanted
from hzo.tracing import Graph

_IMPOSSIBLE = (
    "some boundary cannot be estimated from any other: samples influence each other (BatchNorm in train mode) or "
    "values are infinite; assume='structure' knows the norms of torch"
)


@dataclass(frozen=True)
class Aim:
    """At most one of the three, as ``hzo.plan`` takes them."""

    target_cosine: float | None = None
    budget: float | None = None
    seconds: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """By name, what is asked for."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def expecting(graph: Graph, made: Plan, model: ErrorModel) -> Plan:
    """The plan with the errors and the time that the model expects of it."""
    errors = expected_errors(model, graph, made.nodes, made.step)
    of_parameters = parameter_errors(graph, errors, model.calibration)
    time = None if model.calibration.seconds is None else seconds_of(graph, made, model.calibration.seconds)
    return replace(made, expected=Expected(errors, of_parameters, time))


def check_aim(aim: Aim, calibration: Calibration | None, spacing: int | None) -> Aim:
    """An aim that a plan may be made for.

    Raises:
        PlanError: more than one, one out of its range, or one that needs what is not given.
    """
    if len(aim.given) > 1:
        raise PlanError(f"expected one of target_cosine, budget and seconds, got {' and '.join(aim.given)}")
    for name, value in aim.given.items():
        if not isinstance(value, (int, float)) or not 0 < value < (1 if name == "target_cosine" else inf):
            bounds = "between 0 and 1" if name == "target_cosine" else "positive and finite"
            raise PlanError(f"expected {name} {bounds}, got {shown(value)}")
    if aim.given and spacing is not None:
        raise PlanError("the error of approximate colorings is not predicted: leave out spacing, or the target")
    if aim.seconds is not None and (calibration is None or calibration.seconds is None):
        raise PlanError("seconds are planned from a calibration: calibration=hzo.calibrate(chain, x)")
    return aim


def decide(
    graph: Graph,
    model: ErrorModel,
    choice: Balance,
    aim: Aim,
    with_edges: Callable[[list[PlannedEdge]], Plan],
    mesh: Mesh | None = None,
) -> list[PlannedEdge]:
    """The edges that an aim asks for; without one those of the smallest error with one repeat each. A budget is that of
    each process of a mesh.

    Raises:
        PlanError: the target cannot be reached, or the budget pays for no plan.
    """
    if not aim.given:
        return steadiest_steps(choice)
    if aim.target_cosine is not None:
        planned = keeping(choice, path_error(aim.target_cosine))
        if planned is None:
            raise PlanError(_unreachable(choice, aim.target_cosine))
        return planned
    (limit,) = aim.given.values()

    def spent(edges: list[PlannedEdge]) -> float:
        made, known = with_edges(edges), model.calibration.seconds
        if mesh is not None:
            cost = rank_cost(graph, made, mesh, known)
            return cost.forward_equivalents if aim.seconds is None or cost.seconds is None else cost.seconds
        return made.forward_equivalents if aim.seconds is None or known is None else seconds_of(graph, made, known)

    planned = affordable(choice, lambda edges: spent(edges) <= limit)
    if planned is None:
        cheapest = keeping(choice, inf, programme=False)
        if cheapest is None:
            raise PlanError(_IMPOSSIBLE)
        unit = "forward equivalents" if aim.seconds is None else "seconds"
        raise PlanError(f"the cheapest plan takes {spent(cheapest):.3g} {unit}, more than {limit:.3g}; give more")
    return planned


def choices(
    graph: Graph,
    model: ErrorModel,
    step: float | None,
    edges: list[Edge] | None,
    wanted: Wanted,
    allowed: Allowed,
    repeats: Repeats,
) -> Balance:
    """All that steps, repeats and, where no tree is given, the tree may be chosen from."""
    trees = [tree_edges(graph, tree, wanted, allowed) for tree in CANDIDATES] if edges is None else [edges]
    points = {position for tree in trees for edge in tree for position in edge} | {len(graph.operations)}
    if edges is None:
        points.update(points_of(graph, wanted, allowed))
    found = candidate_edges(graph, sorted(points), wanted, allowed)
    eps = max((torch.finfo(v.dtype).eps for v in graph.values if v.floating), default=1e-7)
    return balance(graph, model, found, eps, step, trees, edges is None, repeats)


def points_of(graph: Graph, wanted: Wanted, allowed: Allowed) -> list[int]:
    """The places between operations at which a plan may stop to estimate a gradient.

    Those that parameters ask for; where rules may be used, every place; else boundaries of stages, and places where a
    single tensor is alive, that are narrower than what is asked for beside them.
    """
    end = len(graph.operations)
    needed = sorted(position for position in wanted if position < end)
    if not needed:
        return [end]
    if allowed.assume == "structure":
        return [p for p in range(needed[0], end + 1) if p in needed or p == end or graph.passable(p)]

    def width(position: int) -> int:
        return sum(graph.values[v].per_sample for v in graph.live[position] if graph.requires[v])

    kept = [*needed, end]
    for left, right in pairwise([*needed, end]):
        narrow = [p for p in range(left + 1, right) if p in graph.boundaries or single(graph, p, 0 in wanted)]
        beside = [width(p) for p in (left, right) if p < end]
        kept += [p for p in narrow if width(p) < min(beside)]
    return sorted(kept)


def _unreachable(choice: Balance, target: float) -> str:
    """What can be had instead of a target that cannot."""
    low, high = path_error(target), 1e9
    if keeping(choice, high, programme=False) is None:
        return _IMPOSSIBLE
    while high / low > 1.05:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if keeping(choice, middle, programme=False) is not None else (middle, high)
    return (
        f"no number of repeats reaches a cosine of {target:g} at every boundary: curvature, rounding or the stored "
        f"results of forward differences leave at most {exp(-high / 2):.4f}. Lower target_cosine, give another step or "
        "let the plan choose it (step=None), or take scheme='central'"
    )

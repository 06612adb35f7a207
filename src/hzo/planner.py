"""``plan``: which boundaries are estimated from which, by which probe, with what step, and how often.

The boundaries that parameters need; a tree over them, fixed or the cheapest one; where a noise or a target is given,
steps and repeats by the error model; and for every hop of the tree the tensors whose cotangents it must give.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp

import torch

from hzo.accuracy import ErrorModel, error_model, expected_errors, parameter_errors, path_error
from hzo.balance import Balance, Repeats, balance, check_repeats, keeping, steadiest_steps, within
from hzo.calibration import Calibration, unitary
from hzo.chain import Chain
from hzo.choice import Allowed, check_spacing
from hzo.cost import seconds_of
from hzo.differences import Scheme, check_scheme, check_step
from hzo.edges import single, tree_edges
from hzo.errors import InputError, NondeterministicError, PlanError
from hzo.graph import Graph
from hzo.intervals import segments
from hzo.nodes import Hop, Wanted, nodes_of, perturbed_parameters, wanted_by_parameters, wanted_everywhere
from hzo.noise import Noise, as_noise
from hzo.plan import Expected, Plan
from hzo.structure import Assume, check_assume
from hzo.trees import Edge, Tree, check_tree


def plan(
    chain: Chain,
    tree: Tree = "planned",
    assume: Assume = "structure",
    scheme: Scheme = "central",
    step: float | None = None,
    noise: float | Noise | None = None,
    repeats: Repeats = "optimal",
    boundaries: str = "needed",
    spacing: int | None = None,
    *,
    calibration: Calibration | None = None,
    target_cosine: float | None = None,
    budget: float | None = None,
    seconds: float | None = None,
) -> Plan:
    """Plan the gradient of a traced chain.

    Args:
        chain: traced, ``hzo.trace(model, x)``.
        tree: ``"planned"`` (the cheapest: without a target every boundary from the next, boundaries that no parameter
            needs only where they save queries; with one the tree that keeps it at the lowest cost), ``"flat"``,
            ``"bisect"`` (HZO), ``"stagewise"`` or a whole number b ≥ 2 of parts.
        assume: ``"nothing"``: coordinate differences throughout. ``"locality"``: elements whose outputs cannot meet
            share a query (coloring; all of them where a segment is elementwise). ``"structure"``: single operations by
            their adjoints as well.
        scheme: ``"central"`` or ``"forward"`` differences.
        step: distance h for all nodes; None derives it from dtype and scale of each tensor, or where a noise,
            calibration, target or budget is given, from what the error model says of each node.
        noise: of what queries return, ``hzo.Noise(readout=, process=)``; a number is readout noise. Stages that do not
            repeat are accepted where it is given. It takes the place of the noise that a calibration measured.
        repeats: with a target or budget, each node's own number of measurements (``"optimal"``) or one for all
            (``"uniform"``).
        boundaries: ``"needed"`` by a parameter's gradient, or ``"all"`` stage boundaries, the input's included.
        spacing: None: exact. A number k allows elements of one color to share outputs if they are k apart along every
            axis on which the segment sees windows; random signs keep such a node unbiased, and the plan takes it where
            it costs less than the exact coloring. ``hzo.report_crosstalk()`` tells its error. Each gradient then draws
            one number more from the random state than a forward pass does.
        calibration: from ``hzo.calibrate``. None takes the chain to be unitary: cotangents of one size everywhere,
            activities and third derivatives of size one.
        target_cosine: expected between each estimated cotangent and the true one; the cheapest plan that keeps it.
        budget: forward equivalents, seconds: of one gradient; the plan with the best cosines for it. At most one of
            the three may be given.

    The plan predicts exactly what ``hzo.count_queries`` will count. Source: trees: paper and ours; the rest: ours.

    Raises:
        InputError: not a chain. TraceError: a chain that has not seen an input.
        PlanError: an unknown option, a target that cannot be reached or a budget that pays for no plan, or a chain
            without anything to train.
        CoupledSamplesError: a query would run a stage in which samples influence each other (BatchNorm in train mode).
        NondeterministicError: a stage that does not repeat, and no noise declared or measured.
    """
    if not isinstance(chain, Chain):
        raise InputError(
            f"expected a traced chain, got a {type(chain).__name__}: chain = hzo.trace(model, x), then hzo.plan(chain)"
        )
    graph = chain.traced
    check_tree(tree), check_assume(assume), check_scheme(scheme), check_step(step), check_repeats(repeats)
    if boundaries not in ("needed", "all"):
        raise PlanError(f"expected boundaries 'needed' or 'all', got {boundaries!r}")
    declared = as_noise(noise)
    if declared is not None:
        declared.for_stages(len(graph.stages))
    aim = _check_aim(target_cosine, budget, seconds, calibration, spacing)
    if calibration is not None and calibration.fingerprint != graph.fingerprint:
        raise PlanError("this calibration was made for another chain, input shape or dtype; calibrate this one")
    _check_repeats(graph, declared or (None if calibration is None else calibration.noise))
    wanted = wanted_by_parameters(graph)
    if boundaries == "all":
        wanted = wanted_everywhere(graph, wanted)
    trainable = tuple(dict.fromkeys(use.name for op in graph.operations for use in op.parameters if use.name))
    if not trainable and boundaries == "needed":
        raise PlanError("no parameter of this chain requires a gradient; set requires_grad=True on those to train")
    allowed = Allowed(assume, scheme, check_spacing(spacing, assume))
    made = Plan(
        fingerprint=graph.fingerprint,
        tree=tree,
        assume=assume,
        scheme=scheme,
        step=step,
        noise=declared,
        nodes=(),
        perturbed=tuple(perturbed_parameters(graph, scheme)),
        trainable=trainable,
        batch=graph.nominal_batch,
        labels=tuple(graph.describe(position) for position in range(len(graph.operations) + 1)),
    )

    def with_hops(hops: list[Hop]) -> Plan:
        return replace(made, nodes=nodes_of(graph, hops, wanted, allowed, everything=boundaries == "all"))

    given = tree != "planned" or aim is None
    edges = tree_edges(graph, tree, wanted, allowed) if given else None
    plain = with_hops([Hop(target, source) for target, source in edges or ()])
    if declared is None and calibration is None and aim is None:
        return plain
    known = calibration or unitary(graph, scheme)
    model = error_model(graph, known, declared, scheme)
    choice = _choice(graph, model, step, edges, wanted, allowed, repeats)
    if target_cosine is not None:
        hops = keeping(choice, path_error(target_cosine))
        if hops is None:
            raise PlanError(_unreachable(choice, target_cosine))
    elif aim is not None:
        hops = within(choice, lambda hops: _spent(graph, with_hops(hops), known, seconds is not None) <= aim)
        if hops is None:
            cheapest = with_hops(keeping(choice, float("inf")) or [])
            least = _spent(graph, cheapest, known, seconds is not None)
            unit = "seconds" if seconds is not None else "forward equivalents"
            raise PlanError(f"the cheapest plan takes {least:.3g} {unit}, the budget is {aim:.3g}; give more")
    else:
        hops = steadiest_steps(choice)
    return expecting(graph, with_hops(hops), model)


def expecting(graph: Graph, made: Plan, model: ErrorModel) -> Plan:
    """The plan with the errors and the time that the model expects of it."""
    errors = expected_errors(model, graph, made.nodes, made.step)
    of_parameters = parameter_errors(graph, errors, model.calibration)
    time = None if model.calibration.seconds is None else seconds_of(graph, made, model.calibration.seconds)
    return replace(made, expected=Expected(errors, of_parameters, time))


def _check_aim(
    target_cosine: float | None,
    budget: float | None,
    seconds: float | None,
    calibration: Calibration | None,
    spacing: int | None,
) -> float | None:
    """The one target or budget that is given, or None."""
    given = {"target_cosine": target_cosine, "budget": budget, "seconds": seconds}
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise PlanError(f"expected one of target_cosine, budget and seconds, got {' and '.join(found)}")
    for name, value in found.items():
        if not 0 < value < (1 if name == "target_cosine" else float("inf")):
            bounds = "between 0 and 1" if name == "target_cosine" else "positive and finite"
            raise PlanError(f"expected {name} {bounds}, got {value}")
    if found and spacing is not None:
        raise PlanError("the error of approximate colorings is not predicted: leave out spacing, or the target")
    if seconds is not None and (calibration is None or calibration.seconds is None):
        raise PlanError("seconds are planned from a calibration: calibration=hzo.calibrate(chain, x)")
    return next(iter(found.values()), None)


def _choice(
    graph: Graph,
    model: ErrorModel,
    step: float | None,
    edges: list[Edge] | None,
    wanted: Wanted,
    allowed: Allowed,
    repeats: Repeats,
) -> Balance:
    """All that steps, repeats and, where no tree is given, the tree may be chosen from."""
    if edges is None:
        points = _points(graph, wanted, allowed)
    else:
        points = sorted({position for edge in edges for position in edge} | {len(graph.operations)})
    found = segments(graph, points, wanted, allowed)
    eps = max((torch.finfo(v.dtype).eps for v in graph.values if v.floating), default=1e-7)
    return balance(model, found, eps, step, edges, repeats)


def _points(graph: Graph, wanted: Wanted, allowed: Allowed) -> list[int]:
    """Positions that a tree may go over: what is asked for, boundaries, and where one tensor carries all influence;
    every position where single operations have adjoints."""
    end = len(graph.operations)
    needed = {position for position in wanted if position < end}
    first = min(needed, default=end)
    inner = {p for p in range(first, end) if allowed.assume == "structure" or single(graph, p)}
    return sorted(needed | {p for p in graph.boundaries if p >= first} | inner | {end})


def _spent(graph: Graph, made: Plan, known: Calibration, in_seconds: bool) -> float:
    if not in_seconds:
        return made.forward_equivalents
    assert known.seconds is not None  # checked with the options
    return seconds_of(graph, made, known.seconds)


def _unreachable(choice: Balance, target: float) -> str:
    """What can be had instead of a target that cannot."""
    low, high = path_error(target), 1e9
    if keeping(choice, high) is None:
        return (
            "some boundary cannot be estimated from any other: samples influence each other (BatchNorm in train mode) "
            "or values are infinite; assume='structure' knows the norms of torch"
        )
    while high / low > 1.05:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if keeping(choice, middle) is not None else (middle, high)
    return (
        f"no number of repeats reaches a cosine of {target:g} at every boundary: curvature, rounding or the stored "
        f"results of forward differences leave at most {exp(-high / 2):.4f}. Lower target_cosine, give another step or "
        "let the plan choose it (step=None), or take scheme='central'"
    )


def _check_repeats(graph: Graph, noise: Noise | None) -> None:
    for op in graph.operations:
        if not op.deterministic and noise is None:
            raise NondeterministicError(
                f"{op.name} gave two results for the same input, with the same random state; differences of its "
                "results would be noise. Make it repeat, or say how large its noise is: hzo.plan(chain, noise=...)"
            )

"""``plan``: which boundaries are estimated from which, by which probe, with what step, and how often.

The boundaries that parameters need; a tree over them, fixed or the cheapest one; where a noise or a target is given,
steps and repeats by the error model; and for every edge of the tree the tensors whose cotangents it must give.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from hzo.errors import HzoWarning, InputError, NondeterministicError, PlanError
from hzo.finite_differences import Scheme
from hzo.noise import Noise, as_noise
from hzo.planner.accuracy import error_model
from hzo.planner.calibration import Calibration, unitary
from hzo.planner.goal import Aim, check_aim, choices, decide, expecting
from hzo.planner.joint_search import Repeats, check_repeats
from hzo.planner.mesh_cost import as_mesh, with_mesh, words_of_parameters
from hzo.planner.tree_search import tree_edges
from hzo.plans import (
    Allowed,
    Boundaries,
    Plan,
    PlannedEdge,
    PlanOptions,
    Tree,
    check_not_modelled,
    plan_without_nodes,
    wanted_by,
    with_edges,
    with_storage,
)
from hzo.structure import Assume
from hzo.tracing import Chain, Graph, declared_step

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def plan(
    chain: Chain,
    tree: Tree = "planned",
    assume: Assume = "structure",
    scheme: Scheme = "central",
    step: float | None = None,
    noise: float | Noise | None = None,
    repeats: Repeats = "optimal",
    boundaries: Boundaries = "needed",
    spacing: int | None = None,
    *,
    mu: float | None = None,
    draws: int = 1,
    calibration: Calibration | None = None,
    target_cosine: float | None = None,
    budget: float | None = None,
    seconds: float | None = None,
    memory: int | None = None,
    mesh: DeviceMesh | tuple[int, int] | None = None,
    link: tuple[float, float] | None = None,
) -> Plan:
    """Decide how the gradient of a traced network is estimated: what is perturbed, by what step, how often.

    Args:
        chain: traced, ``hzo.trace(model, x)``.
        tree: ``"planned"`` (the cheapest: without a target every boundary from the next, boundaries that no parameter
            needs only where they save queries; with one the tree that keeps it at the lowest cost), ``"flat"``,
            ``"bisect"`` (HZO), ``"stagewise"`` or a whole number b ≥ 2 of parts.
        assume: ``"nothing"``: coordinate differences throughout. ``"locality"``: elements whose outputs cannot meet
            share a query (coloring; all of them where a segment is elementwise). ``"structure"``: single operations by
            their adjoints as well.
        scheme: ``"central"`` or ``"forward"`` differences.
        step: length h of all differences; None derives it from dtype and scale of each tensor, or where a noise,
            calibration, target or budget is given, from what the error model says of each node.
        mu: standard deviation of Gaussian smoothing: every difference is taken at ``draws`` random points a + mu·u, u
            from N(0, 1) for every element of the perturbed tensor, and their mean is the estimate. It is unbiased for
            the gradient of the segment smoothed over this Gaussian (and over ±step along each direction, as any
            central difference is), and varies with 1/draws. For segments that are piecewise constant, whose
            derivative is zero almost everywhere. The step is ``mu`` where none is given. Each gradient draws one
            number from the random state.
        draws: points for the smoothing.
        noise: of what queries return, ``hzo.Noise(readout=, process=)``; a number is readout noise. Stages that
            are not deterministic are accepted where it is given. It takes the place of the noise that a calibration
            measured.
        repeats: with a target or budget, each node's own number of measurements (``"optimal"``) or one for all
            (``"uniform"``).
        boundaries: ``"needed"`` by a parameter's gradient, or ``"all"`` stage boundaries, the input's included.
        spacing: None: exact. A number k allows elements of one color to share outputs if they are k apart along every
            axis on which the segment sees windows; random signs keep such a node unbiased, and the plan takes it where
            it costs less than the exact coloring. ``hzo.report_crosstalk()`` tells its error. Each gradient then draws
            one number more from the random state than a forward pass does.
        calibration: from ``hzo.calibrate``. None takes the chain to be unitary: cotangents of one size everywhere,
            activations and third derivatives of size one.
        target_cosine: expected between each estimated cotangent and the true one; the cheapest plan that keeps it.
        budget: forward equivalents, seconds: of one gradient; the plan with the best cosines for it. At most one of
            the three may be given.
        memory: bytes that stored activations and pending cotangents of one gradient of the batch traced may take (the
            perturbed copies of a chunk have a budget of their own: ``hzo.backward(memory=)``). None stores all that is
            read again. A number does so too where that fits, else stores a path of about log₂ L boundaries and runs
            stages again, about (L/2) log₂ L of them; the gradients stay the same to the bit.
        mesh: the processes that will share a gradient, ``hzo.backward(mesh=)``: a ``DeviceMesh`` (all of its
            processes call alike), or their numbers along sample and query, ``(2, 4)``. The decisions are the same; the
            plan also says what each process will run and send.
        link: between them, (seconds that an exchange takes, words sent in a second), from which seconds are predicted.

    Cost: no forward pass. The plan predicts exactly what ``hzo.count_queries`` will count. Source: trees:
    paper and ours; the rest: ours.

    Raises:
        InputError: not a chain, or a number out of range. TraceError: a chain that has not seen an input.
        PlanError: an unknown option, a target that cannot be reached or a budget that pays for no plan, more memory
            needed than allowed, or a chain without anything to train.
        CoupledSamplesError: a query would run a stage in which samples influence each other (BatchNorm in train mode).
        NondeterministicError: a stage that is not deterministic, and no noise declared or measured.
    """
    if not isinstance(chain, Chain):
        raise InputError(
            f"expected a traced chain, got a {type(chain).__name__}: chain = hzo.trace(model, x), then hzo.plan(chain)"
        )
    graph = chain.traced
    check_repeats(repeats)
    declared = as_noise(noise)
    options = PlanOptions(
        tree=tree,
        assume=assume,
        scheme=scheme,
        step=step,
        noise=declared,
        boundaries=boundaries,
        spacing=spacing,
        mu=mu,
        draws=draws,
    )
    if declared is not None:
        declared.for_stages(len(graph.stages))
    together = as_mesh(mesh, link, words_of_parameters(graph))
    aim = check_aim(Aim(target_cosine, budget, seconds), calibration, spacing)
    modelled = declared is not None or calibration is not None or bool(aim.given)
    check_not_modelled(mu, modelled)
    if calibration is not None and calibration.fingerprint != graph.fingerprint:
        raise PlanError("this calibration was made for another chain, input shape or dtype; calibrate this one")
    _check_repeats(graph, declared or (None if calibration is None else calibration.noise))
    trainable = any(use.name for op in graph.operations for use in op.parameters) or graph.differentiated
    if boundaries == "needed" and not trainable:
        raise PlanError("no parameter of this chain requires a gradient; set requires_grad=True on those to train")
    _check_codes(graph)
    wanted, allowed = wanted_by(graph, boundaries), Allowed(assume, scheme, spacing)
    made = plan_without_nodes(graph, options)

    def planned(decided: list[PlannedEdge]) -> Plan:
        return with_edges(graph, made, decided)

    edges = tree_edges(graph, tree, wanted, allowed) if tree != "planned" or not aim.given else None
    found = planned([PlannedEdge(target, source) for target, source in edges or ()])  # raises where samples are coupled
    if modelled:
        _check_no_declared_steps(graph)
        model = error_model(graph, calibration or unitary(graph, scheme), declared, scheme)
        choice = choices(graph, model, step, edges, wanted, allowed, repeats)
        found = expecting(graph, planned(decide(graph, model, choice, aim, planned, together)), model)
    else:
        _warn_of_few_digits(graph, found)
    found = with_storage(graph, found, memory)
    return found if together is None else with_mesh(graph, found, together, calibration)


def _warn_of_few_digits(graph: Graph, plan: Plan) -> None:
    """Differences of results in half precision: nothing else says that they are rough."""
    queried = [node.operations for node in plan.nodes if node.probe is not None]
    queried += [(probe.operation,) for probe in plan.perturbed]
    written = (graph.values[v].dtype for ops in queried for k in ops for v in graph.operations[k].writes)
    low = next((dtype for dtype in written if dtype in (torch.bfloat16, torch.float16)), None)
    if low is not None:
        warnings.warn(
            f"this plan takes differences of results in {str(low).removeprefix('torch.')}, of which about one digit is "
            "left: its gradients can be far from the gradient (hzo.compare_gradients shows how far). Run the model in "
            "float32 (model.float(), without autocast), leave out plan and options, or declare noise=, which chooses "
            "longer steps and repeats",
            HzoWarning,
            stacklevel=3,
        )


def _check_no_declared_steps(graph: Graph) -> None:
    for op in graph.operations:
        if declared_step(op.module) is not None:
            raise PlanError(
                f"a step was declared for {op.name}, which the error model does not know: declare none, or leave out "
                "noise, calibration and target"
            )


def _check_codes(graph: Graph) -> None:
    """Integers that a black box hands on end every difference: what lies before would get nothing, without a word."""
    for op in graph.operations:
        handed = [v for v in op.writes if not graph.values[v].floating and graph.last_read[v] > op.index]
        if handed and graph.boxes_in([op.index]) and any(graph.requires[v] for v in op.reads):
            raise PlanError(
                f"{op.name} hands {graph.values[handed[0]].dtype} on to the next part, through which no difference "
                "passes; return its codes as floating-point numbers, or put both parts into one callable"
            )


def _check_repeats(graph: Graph, noise: Noise | None) -> None:
    for op in graph.operations:
        if not op.deterministic and noise is None:
            raise NondeterministicError(
                f"{op.name} gave two results for the same input, with the same random state; differences of its "
                "results would be noise. Make it deterministic, or say how large the noise is: hzo.plan(chain, noise=)"
            )

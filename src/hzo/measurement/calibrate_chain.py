"""``calibrate``: what the error model needs to know of a chain, measured by forward passes.

One base pass; identical queries, whose scatter is the noise; and a sweep from edge to edge, in which every edge is
estimated at several steps: one shows rounding, a ladder of large ones the curvature. All of it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hzo.errors import InputError
from hzo.execution import Activations, as_checks, contained
from hzo.finite_differences import Scheme, accumulation_dtype, scale_of
from hzo.gradients import at_the_end, base_pass, loss_pass, traced_for
from hzo.measurement import noise_split as scatter
from hzo.measurement.edge_measurements import EdgeMeasurements
from hzo.measurement.timing import timed
from hzo.planner import Calibration, points_of, tree_edges, unitary
from hzo.plans import Allowed, Plan, PlannedEdge, PlanOptions, Wanted, plan_without_nodes, wanted_by, with_edges
from hzo.structure import Assume
from hzo.tracing import Chain, Graph


@torch.inference_mode(False)
@torch.no_grad()
def calibrate(
    chain: Chain,
    x: Any,
    loss_fn: Callable[..., Any] | None = None,
    y: Any = None,
    *,
    cotangent: Any = None,
    assume: Assume = "structure",
    scheme: Scheme = "central",
    repeats: int = 32,
    seconds: bool = True,
) -> Calibration:
    """Measure a traced network on one batch, so that plans can predict their errors and seconds.

    Measured are gains, scales, curvature, noise, rounding and times.

    Args:
        x: a batch of the traced shape; the more samples, the better noise and gains are known.
        loss_fn, y: as for ``hzo.backward``; the gains are those of this loss's cotangents. None takes random ones.
        cotangent: of the output, in place of a loss; shaped like it, None for a part that has none.
        assume, scheme: of the plans to be made. Cost grows with what may not be assumed.
        repeats: the most estimates of an edge whose mean is taken, where the chain is noisy.
        seconds: measure times, too.

    Returns a frozen record for ``hzo.plan(calibration=...)``. Parameters, buffers, gradients and the random state are
    untouched.

    Cost: about 8 gradients of a stagewise plan (7 without times), up to 4 ``repeats`` of them where the chain is noisy;
    counted as ``check_evaluations``. Source: ours; rounding and curvature from estimates at several steps in the spirit
    of Moré and Wild, Estimating derivatives of noisy simulations (2012).

    Raises:
        InputError: not a chain, too few repeats, inputs that do not fit. TraceError: a chain that has not seen an
        input. CoupledSamplesError: samples influence each other where differences would have to be taken.
    """
    if not isinstance(chain, Chain):
        raise InputError(f"expected a traced chain, got a {type(chain).__name__}: chain = hzo.trace(model, x)")
    options = PlanOptions(assume=assume, scheme=scheme)
    if repeats < 2:
        raise InputError(f"expected 2 repeats or more, to see how far two estimates lie apart; got {repeats}")
    graph = chain.traced
    traced_for(chain, x, strict=True)  # raises where x is not what the chain was traced for
    modules = [chain.model, *graph.opaque_modules]
    with contained(modules), as_checks():
        began = perf_counter()
        activations, at_end = _base(chain, x, loss_fn, y, cotangent)
        first = perf_counter() - began
        total = scatter.of_stages(graph, activations)
        allowed = Allowed(assume, scheme)
        reference = _reference(graph, options, allowed)
        edges = EdgeMeasurements(graph, activations, at_end, allowed, reference, total, repeats, seconds)
        for target, source in edges_of(graph, wanted_by(graph, "all"), allowed):
            edges.measure(target, source)
        noise = None if total is None else scatter.split_noise(graph, activations, total, edges.cotangents)
        return Calibration(
            fingerprint=graph.fingerprint,
            norms=edges.norms,
            transport=edges.transport,
            scales={v.index: scale_of(activations.tensor(v.index)) for v in graph.values if v.batched and v.floating},
            bends=edges.bends,
            noise=noise,
            rounding=edges.rounding_of_stages() if total is None else unitary(graph, scheme).rounding,
            parameters=edges.parameters,
            seconds=edges.seconds(min(first, timed(lambda: _base(chain, x, loss_fn, y, cotangent))[0]))
            if seconds
            else None,
        )


def _reference(graph: Graph, options: PlanOptions, allowed: Allowed) -> Plan:
    """The plan whose edges are measured: what parameters need, along the cheapest path."""
    made = plan_without_nodes(graph, options)
    edges = tree_edges(graph, "planned", wanted_by(graph, "needed"), allowed)
    return with_edges(graph, made, [PlannedEdge(target, source) for target, source in edges])


def edges_of(graph: Graph, wanted: Wanted, allowed: Allowed) -> list[tuple[int, int]]:
    """What is measured from what, from the end to the left: single operations where those have adjoints of their own,
    else each stage as a whole and what is asked for inside it."""
    if allowed.assume == "structure":
        return list(reversed([*pairwise(points_of(graph, wanted, allowed))]))
    first = min(wanted, default=0)
    found = []
    for stage in reversed(graph.stages):
        inner = [p for p in range(stage.stop - 1, stage.start, -1) if p in wanted]
        found += [(p, stage.stop) for p in (*inner, stage.start) if p >= first]
    return found


def _base(
    chain: Chain, x: Any, loss_fn: Callable[..., Any] | None, y: Any, cotangent: Any
) -> tuple[Activations, dict[int, Tensor]]:
    """A base pass, and at its end the cotangents given, the loss's, or random ones, of a squared norm of one."""
    graph = chain.traced
    if cotangent is None and loss_fn is not None:
        base = loss_pass(chain, x, loss_fn, y)
        activations, found = base.activations, base.at_end
    else:
        activations, _ = base_pass(chain, x)
        if cotangent is not None:
            found = {v: g.to(accumulation_dtype(g.dtype)) for v, g in at_the_end(graph, cotangent).items()}
        else:
            values = {v: activations.tensor(v) for v in graph.outputs if graph.values[v].floating}
            found = {v: torch.randn_like(t, dtype=accumulation_dtype(t.dtype)) for v, t in values.items()}
    size = sum(float(g.double().square().sum()) for g in found.values()) ** 0.5
    if not size > 0:
        raise InputError("the loss has no gradient at this batch; calibrate on one that has, or without a loss")
    return activations, {v: g / size for v, g in found.items()}

"""The sweep: from the cotangents at the output, node by node of the plan, to all other boundaries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hzo._seeds import derive
from hzo.declared import call_of, find_adjoint
from hzo.distributed import shares
from hzo.execution import Activations, counting, read, run_again, run_slice
from hzo.finite_differences import (
    Probe,
    RunCopies,
    accumulation_dtype,
    check_values_survive,
    directions_per_chunk,
    narrowest,
    over_signs,
    relative_step,
    scaled_step,
    vjp_rows,
)
from hzo.gradients.parameters import (
    LocalStep,
    ParameterGradients,
    add_gradients,
    add_to,
    by_rule,
    finish,
    last_contributions,
)
from hzo.plans import Node, Plan, Schedule, bytes_per_direction
from hzo.tracing import Graph, GraphOperation, ParameterUse

BoundaryCotangents = dict[int, dict[int, Tensor]]
"""By position and value; tensors in the accumulation dtype."""


@dataclass(frozen=True)
class Sweep:
    """The state of one backward pass over a plan: what it works with, and what it has found so far.

    Attributes:
        cotangents: of the values at the positions that are still of use, or at all of them if asked to keep them.
        local: how parameter gradients are taken. gradients: those found.
        derived: cotangents of values derived from parameters.
        seed: of the signs of approximate probes.
    """

    graph: Graph
    plan: Plan
    activations: Activations
    memory: int | None
    cotangents: BoundaryCotangents
    local: LocalStep
    seed: int = 0
    gradients: ParameterGradients = field(default_factory=dict)
    derived: dict[int, Tensor] = field(default_factory=dict)


def sweep_plan(
    graph: Graph,
    plan: Plan,
    steps: Schedule,
    activations: Activations,
    at_the_end: dict[int, Tensor],
    *,
    memory: int | None,
    seed: int = 0,
    keep: bool = False,
    direct: dict[int, Tensor] | None = None,
    widely: bool = False,
) -> Sweep:
    """Carry the cotangents from the end through the nodes of the plan, and turn them into parameter gradients.

    Args:
        steps: of the plan. activations: of a base pass that released what the steps say; they say too what is run again
            before it is read, and what is released after.
        at_the_end: cotangents of the output's values, in the accumulation dtype.
        memory: bytes for the perturbed copies of a chunk; None takes a share of what is free.
        seed: of the signs of approximate probes.
        keep: keep all cotangents.
        direct: what the loss adds by itself to parameters, and to values derived from them.
        widely: leave parameters' gradients in the accumulation dtype; otherwise each gets its own once it is complete.

    Cost: the plan's. Source: paper (the recursion); which nodes, and by which probe, is the plan's affair (ours).
    """
    end = len(graph.operations)
    local = LocalStep(graph, activations, plan.perturbed, plan.scheme, plan.step or plan.mu)
    state = Sweep(graph, plan, activations, memory, {end: at_the_end}, local, seed)
    found = state.cotangents
    for value, g in (direct or {}).items():
        add_to(local, ParameterUse(value, graph.names.get(value, "")), g, state.derived, state.gradients)
    activations.release(graph, steps.after_loss)
    complete = {} if widely else last_contributions(graph)
    for position in range(end, -1, -1):
        for again in steps.again[position]:
            run_again(graph, activations, again.start, again.stop, again.stages, again.released)
        for node in steps.nodes[position]:
            _run_node(state, node)
        if position < end:
            op = graph.operations[position]
            add_gradients(local, op, found.get(position + 1, {}), state.derived, state.gradients)
            for name in complete.get(position, ()):
                finish(name, state.gradients)
        activations.release(graph, steps.activations[position])
        if not keep:
            for source in steps.cotangents[position]:
                found.pop(source, None)
    return state


def _run_node(state: Sweep, node: Node) -> None:
    at_source = state.cotangents.get(node.source, {})
    estimate = with_carried(node, estimate_node(state, node, at_source) if node.operations else None, at_source)
    if estimate is not None:
        state.cotangents.setdefault(node.target, {})[node.value] = estimate


def with_carried(node: Node, estimate: Tensor | None, at_source: dict[int, Tensor]) -> Tensor | None:
    """An estimated gradient, plus the gradient of the same tensor from a later place where it is read again."""
    carried = at_source.get(node.value) if node.carried else None
    return estimate if carried is None else carried if estimate is None else estimate + carried


def estimate_node(state: Sweep, node: Node, at_source: dict[int, Tensor]) -> Tensor | None:
    """The cotangent of a node's value, the mean of its repeats; None where the source's cotangents are all missing."""
    graph, values = state.graph, state.graph.values
    outputs = [v for v in node.outputs if v in at_source]
    if not outputs:
        return None
    base = None
    if state.plan.scheme == "forward" and node.probe is not None:
        # Read once, as it is stored once: repeats of a query do not make this reading any better.
        stage, activations = graph.stage_of[node.source - 1], state.activations
        base = [values[v].rows(read(graph, activations.tensor(v), stage), activations.batch) for v in outputs]
    cotangents = {v: at_source[v] for v in outputs}

    # Repeats are copies of the batch, as directions are: as many at once as leave room for all directions.
    device, batch = next(iter(cotangents.values())).device, state.activations.batch
    chunk = directions_per_chunk(bytes_per_direction(graph, node, batch), state.memory, device)
    together = graph.pooled(node.operations) and state.plan.scheme == "central"
    chunk = max(1, chunk // 2) if together else chunk
    at_once = 1 if node.probe is None else min(node.repeats, max(1, chunk // max(1, node.probe.directions)))
    among = shares()
    if among is not None and node.probe is not None and node.repeats > 1:  # each has memory of its own, and all must
        at_once = among.least(at_once, graph.describe(node.target))  # exchange what they found equally often
    total: Tensor | None = None
    for start in range(0, node.repeats, at_once):
        repeats = min(at_once, node.repeats - start)
        if node.probe is None:
            part = _apply_rule(state, node, cotangents)
        else:
            part = _by_differences(
                state, node, node.probe, cotangents, base, start, repeats, chunk // repeats, together
            )
        total = part if total is None else total + part
    assert total is not None
    return total / node.repeats if node.repeats > 1 else total


def _step_of(
    node: Node, plan: Plan, rows: Tensor, approximate: bool, where: str, precision: torch.dtype
) -> float | Tensor | None:
    """The step of a node's differences; None for one of each element's own.

    What the user declared of the activation goes first, then the node's own in units of the activation, then the
    plan's. Elements of an approximate coloring share outputs, where a larger step would drown a smaller one: they take
    one for all.
    """
    if node.declared_step is not None:
        return node.declared_step
    if node.relative_step is not None:
        return scaled_step(rows, node.relative_step, where, precision)
    given = plan.step or plan.mu
    if given is None and approximate:
        return scaled_step(rows, relative_step(plan.scheme, precision), where, precision)
    return given


def _by_differences(
    state: Sweep,
    node: Node,
    probe: Probe,
    at_source: dict[int, Tensor],
    base: list[Tensor] | None,
    start: int,
    repeats: int,
    chunk: int,
    together: bool,
) -> Tensor:
    """The cotangent of a node's value by finite differences of its operations, summed over some of its repeats.

    Args:
        at_source: cotangents of those of the node's outputs that have one. base: their unperturbed rows, for forward
            differences. start, repeats: which of the node's repeats these are; each has random numbers of its own.
        chunk: directions at once, each in all these repeats. together: both ways of them, too.
    """
    graph, activations, batch = state.graph, state.activations, state.activations.batch
    values, outputs = graph.values, list(at_source)
    value = values[node.value]
    rows = value.rows(activations.tensor(node.value), batch).repeat(repeats, 1)
    where = f"the activation at {graph.describe(node.target)}"
    if state.plan.mu is not None:
        check_values_survive(rows, state.plan.mu, where, "smoothing width mu")
        rows = _smoothing(state.plan.mu, rows, _seed(state, node, start))

    def run(perturbed: Tensor, copies: int) -> list[Tensor]:
        moved = {node.value: value.rows_to_copies(perturbed, batch)}
        results = run_slice(graph, node.operations, activations, moved, outputs, copies * repeats)
        return [values[v].copies_to_rows(t, batch) for v, t in zip(outputs, results, strict=True)]

    draws = probe.draws
    if probe.coloring is not None:
        probe = replace(probe, coloring=probe.coloring.for_outputs([node.outputs.index(v) for v in outputs]), draws=1)
    cotangents = [values[v].rows(at_source[v], batch).repeat(repeats, 1) for v in outputs]
    base = None if base is None else [t.repeat(repeats, 1) for t in base]
    precision = narrowest(
        [value.dtype, *(values[v].dtype for k in node.operations for v in graph.operations[k].writes)]
    )
    approximate = probe.coloring is not None and probe.coloring.spacing is not None
    step = _step_of(node, state.plan, rows, approximate, where, precision)

    def estimate(at: Tensor, through: RunCopies) -> Tensor:
        return vjp_rows(
            through,
            at,
            cotangents,
            probe=probe,
            scheme=state.plan.scheme,
            step=step,
            chunk=chunk,
            base=base,
            where=where,
            precision=precision,
            noisy=graph.noise is not None or state.plan.noise is not None or state.plan.mu is not None,
            together=together,
        )

    def flipped(signs: Tensor) -> Tensor:
        """In coordinates flipped by the signs, in which every element moves up."""
        return estimate(rows * signs, lambda moved, copies: run(moved * signs.repeat(copies, 1), copies))

    if not approximate:
        found = estimate(rows, run)
    else:
        found = over_signs(
            flipped,
            rows,
            draws=draws,
            seed=_seed(state, node, start),
            where=graph.describe(node.target),
            coloring=str(probe.coloring),
        )
    return value.from_rows(found.view(repeats, batch, -1).sum(0), batch)


def _seed(state: Sweep, node: Node, draw: int) -> int:
    return derive(state.seed, node.value, node.target, node.source, draw)


def _smoothing(mu: float, rows: Tensor, seed: int) -> Tensor:
    """A random point near the rows, a Gaussian of width mu away in every element."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    wide = accumulation_dtype(rows.dtype)
    drawn = torch.randn(rows.shape, generator=generator, dtype=wide, device=rows.device)
    return (rows + mu * drawn).to(rows.dtype)


def _apply_rule(state: Sweep, node: Node, cotangents: dict[int, Tensor]) -> Tensor:
    """Carry a cotangent back through one operation by its rule, or by what was declared of it."""
    graph, activations = state.graph, state.activations
    op = graph.operations[node.operations[0]]
    counting.add(adjoints=1)
    declared = find_adjoint(graph, op, node.value)
    if declared is not None:
        return declared.apply(call_of(graph, op, activations, node.value, cotangents), node.value)
    # Together with the parameters' gradients where these come next; behind a transpose they have been taken.
    next_taken = op.index == node.target and _has_closed_parameters(state, op)
    along = frozenset(use.value for use in op.parameters) if next_taken else frozenset()
    found = by_rule(graph, activations, op, cotangents, along | {node.value})
    if along:
        state.local.along[op.index] = {v: found[v] for v in along}
    return found[node.value]


def _has_closed_parameters(state: Sweep, op: GraphOperation) -> bool:
    """Whether the operation has trainable parameters, all of them with rules."""
    return bool(op.parameters) and all(probe.operation != op.index for probe in state.plan.perturbed)

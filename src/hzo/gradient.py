"""Gradients from queries: record the boundaries, fold the tree, apply the rules.

``backward``, ``grad_and_value`` and ``cotangents`` are three views of one computation: a base pass gives every
boundary its activity, the loss gives the last boundary its cotangent, the plan's nodes carry it to the others, and
every parameter's gradient is a local product of an activity and a cotangent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo import queries
from hzo.adjoints import Call, find_adjoint
from hzo.chain import Attribute, Chain, Graph, Operation, ParameterUse, Ref, tensors_in
from hzo.cost import bytes_per_direction
from hzo.differences import accumulation_dtype, default_step, stepped
from hzo.errors import InputError, NonFiniteError
from hzo.execution import Activities, base_pass, resolve, run_alone, run_slice, run_with_parameter
from hzo.losses import loss_and_cotangent
from hzo.parameter_rules import find_rule
from hzo.plan import Node, Plan
from hzo.preparation import prepare
from hzo.side_effects import contained, undone_on_error
from hzo.tracing import call_arguments
from hzo.vjp import directions_per_chunk, vjp_rows

Cotangents = dict[int, dict[int, Tensor]]
"""By position and value; tensors in the accumulation dtype."""


@dataclass(frozen=True)
class _Task:
    """What does not change during one gradient."""

    graph: Graph
    plan: Plan
    activities: Activities
    memory: int | None
    along: dict[int, dict[int | str, Tensor]]  # parameter gradients that an adjoint gave along, by operation and slot


def backward(
    model: Chain | nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any = None,
    *,
    plan: Plan | None = None,
    scale: float | Tensor = 1.0,
    memory: int | None = None,
    **options: Any,
) -> Tensor:
    """Estimate the gradient of the mean loss by forward passes only and add it to ``.grad``.

    Args:
        model: a traced chain, or any module (traced and planned on the first call, then cached).
        loss_fn: ``loss_fn(output, y)``: a scalar, or one loss per sample, whose mean is taken.
        x: input with the batch first; a tuple is passed as positional, a dict as keyword arguments.
        y: target; None calls ``loss_fn(output)``.
        plan: from ``hzo.plan``; None plans with ``options`` (those of ``hzo.plan``).
        scale: factor on the gradients, for a ``GradScaler``: ``scale=scaler.scale(torch.ones(()))``.
        memory: bytes that the perturbed copies of one chunk may take; None takes a share of what is free.

    Returns the loss, a scalar without gradient history. Afterwards buffers and random state are as after one ordinary
    forward pass; on an error nothing has changed.

    Cost: ``plan.queries`` and one base pass. Source: paper; parameter rules are backprop's local step.

    Raises:
        InputError, PlanError: batch, target or plan do not fit. NonFiniteError: says which stage came first.
        See ``hzo.trace`` and ``hzo.plan`` for what they raise.
    """
    gradients, loss, _ = _estimate(model, loss_fn, x, y, plan, memory, options)
    factor = float(scale)
    for parameter, gradient in gradients.values():
        scaled = (gradient * factor if factor != 1 else gradient).to(parameter.dtype)
        if parameter.grad is None:
            parameter.grad = scaled
        else:
            parameter.grad += scaled
    return loss


def grad_and_value(
    model: Chain | nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any = None,
    *,
    plan: Plan | None = None,
    memory: int | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """Like ``backward``, but returns ``({parameter name: gradient}, loss)`` and leaves ``.grad`` alone."""
    gradients, loss, _ = _estimate(model, loss_fn, x, y, plan, memory, options)
    return {name: gradient.to(parameter.dtype) for name, (parameter, gradient) in gradients.items()}, loss


def cotangents(
    model: Chain | nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any = None,
    *,
    plan: Plan | None = None,
    memory: int | None = None,
    **options: Any,
) -> list[Tensor | tuple[Tensor | None, ...] | None]:
    """The cotangent of every stage boundary 0..L: a tensor, a tuple of the live ones, or None.

    Without a plan all boundaries are estimated, the input's included; with one, those that it estimates, and None
    elsewhere (``hzo.plan(chain, boundaries="all")`` estimates all). Integer tensors have None.
    Arguments, cost and errors as for ``backward``.
    """
    _, _, (graph, found) = _estimate(model, loss_fn, x, y, plan, memory, {"boundaries": "all", **options})
    result: list[Tensor | tuple[Tensor | None, ...] | None] = []
    for position in graph.boundaries:
        floating = [v for v in graph.live[position] if graph.values[v].floating]
        tensors = tuple(found.get(position, {}).get(v) for v in floating)
        estimated = any(t is not None for t in tensors)
        result.append((tensors[0] if len(tensors) == 1 else tensors) if estimated else None)
    return result


Gradients = dict[str, tuple[Tensor, Tensor]]
"""Parameter and gradient by the parameter's name."""


@torch.no_grad()
def _estimate(
    model: Chain | nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any,
    plan: Plan | None,
    memory: int | None,
    options: dict[str, Any],
) -> tuple[Gradients, Tensor, tuple[Graph, Cotangents]]:
    chain, plan = prepare(model, x, plan, options)
    graph = chain.traced
    inputs = tensors_in(call_arguments(x))
    for tensor in inputs:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NonFiniteError("the input x holds NaN or infinity; clean the data before training on it")
    modules = [chain.model, *(op.module for op in graph.operations if op.module is not None)]
    with undone_on_error(modules):
        activities = base_pass(graph, inputs)
        output = pytree.tree_map_only(Ref, lambda ref: activities.values[ref.value], graph.output)
        loss, cotangent = _loss(graph, activities, loss_fn, output, y)
        with contained(modules):
            task = _Task(graph, plan, activities, memory, {})
            found = _fold(task, _at_the_end(graph, cotangent))
            gradients = _apply_rules(task, found)
    return gradients, loss, (graph, found)


def _loss(graph: Graph, activities: Activities, loss_fn: Callable[..., Any], output: Any, y: Any) -> tuple[Tensor, Any]:
    try:
        return loss_and_cotangent(loss_fn, output, y)
    except (NonFiniteError, InputError) as error:
        first = _first_not_finite(graph, activities)
        if first is None:
            raise
        raise NonFiniteError(
            f"{first.name} is the first operation whose result holds NaN or infinity (in stage "
            f"{graph.stage_of[first.index]}, {graph.stages[graph.stage_of[first.index]].name}); {error}"
        ) from error


def _first_not_finite(graph: Graph, activities: Activities) -> Operation | None:
    for op in graph.operations:
        tensors = (activities.values[v] for v in op.writes)
        if not all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()):
            return op
    return None


def _at_the_end(graph: Graph, cotangent: Any) -> dict[int, Tensor]:
    """The cotangents of the output's values."""
    refs = [ref for ref in pytree.tree_leaves(graph.output) if isinstance(ref, Ref)]
    tensors = [g for g in pytree.tree_leaves(cotangent, is_leaf=lambda leaf: leaf is None) if not isinstance(g, str)]
    found: dict[int, Tensor] = {}
    for ref, g in zip(refs, tensors, strict=True):
        if isinstance(g, Tensor):  # one value may stand twice in the output
            found[ref.value] = found[ref.value] + g if ref.value in found else g
    return found


def _fold(task: _Task, at_the_end: dict[int, Tensor]) -> Cotangents:
    """Carry the cotangents from the end through the nodes of the plan."""
    found: Cotangents = {len(task.graph.operations): at_the_end}
    for node in task.plan.nodes:
        at_source = found.get(node.source, {})
        estimate = _estimate_node(task, node, at_source) if node.operations else None
        if node.carried and node.value in at_source:
            carried = at_source[node.value]
            estimate = carried if estimate is None else estimate + carried
        if estimate is not None:
            found.setdefault(node.target, {})[node.value] = estimate
    return found


def _estimate_node(task: _Task, node: Node, at_source: dict[int, Tensor]) -> Tensor | None:
    graph, activities, batch = task.graph, task.activities, task.activities.batch
    outputs = [v for v in node.outputs if v in at_source]
    if not outputs:
        return None
    if node.probe.kind == "adjoint":
        return _apply_adjoint(task, node, {v: at_source[v] for v in outputs})
    values = graph.values
    value = values[node.value]
    rows = value.rows(activities.values[node.value], batch)
    tiles: dict[int, dict[int, Tensor]] = {}  # the last chunk may be smaller than the others

    def run(perturbed: Tensor, copies: int) -> list[Tensor]:
        state = {node.value: value.from_rows(perturbed, batch * copies)}
        results = run_slice(graph, node.operations, activities, state, outputs, copies, tiles.setdefault(copies, {}))
        return [values[v].rows(t, batch * copies) for v, t in zip(outputs, results, strict=True)]

    needed = bytes_per_direction(graph, node, batch)
    estimate = vjp_rows(
        run,
        rows,
        [values[v].rows(at_source[v], batch) for v in outputs],
        probe=node.probe,
        scheme=task.plan.scheme,
        step=task.plan.step,
        chunk=directions_per_chunk(needed, task.memory, rows.device),
        base=[values[v].rows(activities.values[v], batch) for v in outputs],
        where=f"the activity at {graph.describe(node.target)}",
    )
    return value.from_rows(estimate, batch)


def _apply_adjoint(task: _Task, node: Node, cotangents: dict[int, Tensor]) -> Tensor:
    """Carry a cotangent back through one operation by its structure."""
    graph, activities = task.graph, task.activities
    op = graph.operations[node.operations[0]]
    rule = find_adjoint(graph, op, node.value)
    if rule is None:
        raise AssertionError(f"{op.name}: an adjoint was planned and none is found")

    def measure(value: int, probe: Tensor) -> Tensor:
        return run_alone(graph, op, activities, value, probe)[0]

    args, kwargs = resolve(op, activities.values.__getitem__, activities.batch)
    outputs = tuple(activities.values[v] for v in op.writes)
    queries.add(adjoints=1)
    call = Call(graph, op, args, kwargs, outputs, cotangents, measure)
    if rule.with_parameters is None or not _has_closed_parameters(task, op):
        return rule.apply(call, node.value)
    estimate, parameters = rule.with_parameters(call, node.value)
    task.along[op.index] = dict(parameters.items())
    return estimate


def _has_closed_parameters(task: _Task, op: Operation) -> bool:
    """Whether the operation has trainable parameters, all of them with closed rules."""
    return bool(op.parameters) and all(probe.operation != op.index for probe in task.plan.perturbed)


def _apply_rules(task: _Task, found: Cotangents) -> Gradients:
    """Parameter gradients, last operation first, so that derived values have all their cotangents when reached."""
    graph = task.graph
    derived: dict[int, Tensor] = {}
    gradients: Gradients = {}
    perturbed = {(probe.operation, probe.use) for probe in task.plan.perturbed}
    for op in reversed(graph.operations):
        if not op.parameters:
            continue
        at = found.get(op.index + 1, {}) if op.batched else derived
        given = {v: at[v] for v in op.writes if v in at}
        if not given:
            continue  # nothing that the loss depends on
        closed = [use for k, use in enumerate(op.parameters) if (op.index, k) not in perturbed]
        by_probe = [use for k, use in enumerate(op.parameters) if (op.index, k) in perturbed]
        results = _by_rule(task, op, closed, given)
        results += [(use, _by_perturbation(task, op, use, given)) for use in by_probe]
        for use, gradient in results:
            if isinstance(use.where, Ref):
                key = use.where.value
                derived[key] = derived[key] + gradient if key in derived else gradient
            else:
                parameter = use.where.get()
                tied = gradients.get(use.name)
                gradients[use.name] = (parameter, gradient if tied is None else tied[1] + gradient)
    return gradients


def _by_rule(
    task: _Task, op: Operation, uses: Iterable[ParameterUse], given: dict[int, Tensor]
) -> list[tuple[ParameterUse, Tensor]]:
    slots = {use.slot: use for use in uses if use.slot is not None}
    if not slots:
        return []
    queries.add(parameter_rules=len(slots))
    along = task.along.get(op.index, {})
    if slots.keys() <= along.keys():
        return [(use, along[slot]) for slot, use in slots.items()]
    args, kwargs = resolve(op, task.activities.values.__getitem__, task.activities.batch)
    wanted = frozenset(slots)
    rule = find_rule(op.target, args, kwargs, wanted)
    if rule is None:
        raise AssertionError(f"{op.name}: a rule was planned for {sorted(map(str, wanted))} and none is found")
    (cotangent,) = given.values()
    gradients = rule(op.target, args, kwargs, cotangent, wanted)
    return [(use, gradients[slot]) for slot, use in slots.items()]


def _by_perturbation(task: _Task, op: Operation, use: ParameterUse, given: dict[int, Tensor]) -> Tensor:
    """Differences of one operation along every element of a parameter."""
    values = task.activities.values
    parameter = use.where.get() if isinstance(use.where, Attribute) else values[use.where.value]
    wide = accumulation_dtype(parameter.dtype)
    scheme = task.plan.scheme
    where = use.name or f"an operand of {op.name}"
    step = task.plan.step or default_step(parameter, scheme, where)
    upper, lower, distance = stepped(parameter.detach(), step, scheme, where)
    result = torch.empty(parameter.numel(), dtype=wide, device=parameter.device)

    def product(k: int, moved: Tensor) -> Tensor:
        changed = parameter.detach().clone()
        changed.view(-1)[k] = moved.view(-1)[k]
        outputs = dict(zip(op.writes, run_with_parameter(task.graph, op, task.activities, use, changed), strict=True))
        differences = ((outputs[v].to(wide) - values[v].to(wide)) * g.to(wide) for v, g in given.items())
        return sum((d.sum() for d in differences), start=torch.zeros((), dtype=wide, device=parameter.device))

    for k in range(parameter.numel()):
        above = product(k, upper)
        result[k] = above - product(k, lower) if scheme == "central" else above
    gradient = result.view_as(parameter) / distance
    if not bool(gradient.isfinite().all()):
        raise NonFiniteError(f"a query that perturbed {where} returned NaN or infinity")
    return gradient

"""Parameter gradients: local products of an activity and a cotangent, or differences where no rule is known.

The local product is backprop's own step, on a layer known to compute what its type says; a layer of which that cannot
be said has its parameters perturbed, one element at a time, through that operation alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hzo.errors import NonFiniteError
from hzo.execution import Activities, counting, resolve, run_with_parameter
from hzo.finite_differences import Scheme, accumulation_dtype, default_step, narrowest, stepped
from hzo.parameter_rules import find_rule
from hzo.plans import ParameterProbe
from hzo.tracing import Attribute, Graph, Operation, ParameterUse, Ref

Gradients = dict[str, tuple[Tensor, Tensor]]
"""Parameter and gradient by the parameter's name."""


@dataclass(frozen=True)
class Local:
    """What the local step works with.

    Attributes:
        perturbed: parameters without a rule. scheme, step: how they are perturbed.
        along: gradients already known, by operation and name of the parameter.
    """

    graph: Graph
    activities: Activities
    perturbed: tuple[ParameterProbe, ...]
    scheme: Scheme = "central"
    step: float | None = None
    along: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def parameter_gradients(local: Local, cotangents: Mapping[int, Tensor]) -> Gradients:
    """The gradient of every trainable parameter that the loss depends on.

    Args:
        cotangents: of the values that operations write, in the accumulation dtype.

    Cost: a ``parameter_rule`` for each closed form; 2 n B queries of one operation for n perturbed elements.
    """
    gradients: Gradients = {}
    derived: dict[int, Tensor] = {}
    for op in reversed(local.graph.operations):
        add_gradients(local, op, cotangents, derived, gradients)
    return gradients


def add_gradients(
    local: Local, op: Operation, cotangents: Mapping[int, Tensor], derived: dict[int, Tensor], gradients: Gradients
) -> None:
    """Add the gradients of one operation's parameters to ``gradients``, of values derived from such to ``derived``.

    Called for the last operation first, so that a derived value has all its cotangents when its maker is reached.
    """
    at = cotangents if op.batched else derived
    given = {v: at[v] for v in op.writes if v in at}
    if not op.parameters or not given:
        return
    perturbed = {probe.use for probe in local.perturbed if probe.operation == op.index}
    closed = [use for k, use in enumerate(op.parameters) if k not in perturbed]
    results = _by_rule(local, op, closed, given)
    results += [(op.parameters[k], _by_perturbation(local, op, op.parameters[k], given)) for k in sorted(perturbed)]
    for use, gradient in results:
        if isinstance(use.where, Ref):
            known = derived.get(use.where.value)
            derived[use.where.value] = gradient if known is None else known + gradient
        else:
            tied = gradients.get(use.name)
            gradients[use.name] = (use.where.get(), gradient if tied is None else tied[1] + gradient)


def _by_rule(
    local: Local, op: Operation, uses: Iterable[ParameterUse], given: dict[int, Tensor]
) -> list[tuple[ParameterUse, Tensor]]:
    slots = {use.slot: use for use in uses if use.slot is not None}
    if not slots:
        return []
    counting.add(parameter_rules=len(slots))
    along = local.along.pop(op.index, {})
    if slots.keys() <= along.keys():
        return [(use, along[str(slot)]) for slot, use in slots.items()]
    args, kwargs = resolve(op, local.activities.values.__getitem__, local.activities.batch)
    wanted = frozenset(slots)
    rule = find_rule(op.target, args, kwargs, wanted)
    if rule is None:
        raise AssertionError(f"{op.name}: a rule was planned for {sorted(map(str, wanted))} and none is found")
    (cotangent,) = given.values()
    gradients = rule(op.target, args, kwargs, cotangent, wanted)
    return [(use, gradients[slot]) for slot, use in slots.items()]


def _by_perturbation(local: Local, op: Operation, use: ParameterUse, given: dict[int, Tensor]) -> Tensor:
    """Differences of one operation along every element of a parameter."""
    values = local.activities.values
    parameter = use.where.get() if isinstance(use.where, Attribute) else values[use.where.value]
    wide = accumulation_dtype(parameter.dtype)
    scheme = local.scheme
    where = use.name or f"an operand of {op.name}"
    precision = narrowest([parameter.dtype, *(local.graph.values[v].dtype for v in given)])
    step = local.step or default_step(parameter, scheme, where, precision)
    upper, lower, distance = stepped(parameter.detach(), step, scheme, where)
    result = torch.empty(parameter.numel(), dtype=wide, device=parameter.device)

    def product(k: int, moved: Tensor) -> Tensor:
        changed = parameter.detach().clone(memory_format=torch.contiguous_format)
        changed.view(-1)[k] = moved.reshape(-1)[k]
        with counting.doing(f"a query that moves element {k} of {where}"):
            results = run_with_parameter(local.graph, op, local.activities, use, changed)
        outputs = dict(zip(op.writes, results, strict=True))
        differences = ((outputs[v].to(wide) - values[v].to(wide)) * g.to(wide) for v, g in given.items())
        return sum((d.sum() for d in differences), start=torch.zeros((), dtype=wide, device=parameter.device))

    for k in range(parameter.numel()):
        above = product(k, upper)
        result[k] = above - product(k, lower) if scheme == "central" else above
    gradient = result.reshape(parameter.shape) / distance
    if not bool(gradient.isfinite().all()):
        raise NonFiniteError(f"a query that perturbed {where} returned NaN or infinity")
    return gradient

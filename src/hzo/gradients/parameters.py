"""Parameter gradients: rules of single operations, or differences where there is none.

A rule is backprop's own step on the operation that reads the parameter; an opaque operation has its parameters
perturbed, one element at a time, through that operation alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hzo.distributed import shares
from hzo.errors import NonFiniteError
from hzo.execution import Activations, count_probes, counting, run_probe, run_with_parameter
from hzo.finite_differences import Scheme, accumulation_dtype, default_step, narrowest, stepped
from hzo.plans import ParameterProbe
from hzo.reverse import again, carry_back
from hzo.rules.base import Call, Engine
from hzo.tracing import Graph, GraphOperation, ParameterUse

ParameterGradients = dict[str, tuple[Tensor, Tensor]]
"""Parameter and gradient by the parameter's name."""


@dataclass(frozen=True)
class LocalStep:
    """What is needed to turn the gradient at a layer's output into those of its own parameters.

    Attributes:
        perturbed: parameters without a rule. scheme, step: how they are perturbed.
        along: gradients already known, by operation and operand.
    """

    graph: Graph
    activations: Activations
    perturbed: tuple[ParameterProbe, ...]
    scheme: Scheme = "central"
    step: float | None = None
    along: dict[int, dict[int, Tensor]] = field(default_factory=dict)


def by_rule(
    graph: Graph, activations: Activations, op: GraphOperation, cotangents: Mapping[int, Tensor], wanted: frozenset[int]
) -> dict[int, Tensor]:
    """The cotangents of some operands by the operation's rule, in the accumulation dtype.

    Cost: what the rule measures, counted operand by operand.
    """

    def measure(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], size: Tensor | tuple[int, ...]) -> Any:
        del size  # what is counted is what the plan knows of
        if call.tape is not activations.tape:  # inside a decomposition
            return call.op.target(*args, **kwargs)
        return run_probe(graph, activations, op, call.op, args, kwargs)

    tape = activations.tape
    grads = [None if v is None or v not in cotangents else cotangents[v].to(tape.values[v].dtype) for v in op.results]
    found: dict[int, Tensor] = {}
    for value, g in carry_back(tape, activations.operation(op.index), grads, wanted, Engine(measure, again)):
        wide = (g.to_dense() if g.is_sparse else g).to(accumulation_dtype(tape.values[value].dtype))
        if any(wide is t for t in (*grads, *found.values())):  # one cotangent, one tensor: each is released by itself
            wide = wide.view_as(wide)
        found[value] = found[value] + wide if value in found else wide
    for value in wanted:
        count_probes(graph, op, value, activations)
        if value not in found:  # a derivative of zero wherever it exists
            about = tape.values[value]
            device = next(g.device for g in grads if g is not None)
            found[value] = torch.zeros(about.shape, dtype=accumulation_dtype(about.dtype), device=device)
    return found


def parameter_gradients(local: LocalStep, cotangents: Mapping[int, Tensor]) -> ParameterGradients:
    """The gradient of every trainable parameter that the loss depends on.

    Args:
        cotangents: of the values that operations write, in the accumulation dtype.

    Cost: a ``parameter_rule`` for each rule that is applied; 2 n B queries of one operation for n perturbed elements.
    """
    gradients: ParameterGradients = {}
    derived: dict[int, Tensor] = {}
    for op in reversed(local.graph.operations):
        add_gradients(local, op, cotangents, derived, gradients)
    return gradients


def add_gradients(
    local: LocalStep,
    op: GraphOperation,
    cotangents: Mapping[int, Tensor],
    derived: dict[int, Tensor],
    gradients: ParameterGradients,
) -> None:
    """Add the gradients of one operation's parameters to ``gradients``, of values derived from such to ``derived``.

    Called for the last operation first, so that a derived value has all its cotangents when its maker is reached.
    """
    at = cotangents if op.batched else derived
    given = {v: at[v] for v in op.writes if v in at}
    if not op.parameters or not given:
        return
    perturbed = {probe.use for probe in local.perturbed if probe.operation == op.index and probe.elements}
    closed = frozenset(use.value for k, use in enumerate(op.parameters) if k not in perturbed)
    found = _closed(local, op, closed, given)
    for k in sorted(perturbed):
        found[op.parameters[k].value] = _by_perturbation(local, op, op.parameters[k], given)
    for use in op.parameters:
        if use.value in found:
            add_to(local, use, found[use.value], derived, gradients)
    if not op.batched:
        for v in given:  # nothing before its maker adds to it
            del derived[v]


def last_contributions(graph: Graph) -> dict[int, list[str]]:
    """By operation the parameters whose gradient is complete behind it, where operations are visited from the last."""
    first = {use.name: op.index for op in reversed(graph.operations) for use in op.parameters if use.name}
    found: dict[int, list[str]] = {}
    for name, index in first.items():
        found.setdefault(index, []).append(name)
    return found


def finish(name: str, gradients: ParameterGradients) -> None:
    """A gradient that is complete takes the dtype of ``.grad``, so that only one of them is held in a wider one."""
    if name in gradients:
        leaf, gradient = gradients[name]
        gradients[name] = leaf, gradient.to(leaf.dtype if leaf.grad is None else leaf.grad.dtype)


def add_to(
    local: LocalStep, use: ParameterUse, gradient: Tensor, derived: dict[int, Tensor], gradients: ParameterGradients
) -> None:
    """Add a contribution to the gradient of a parameter, or to the cotangent of a derived value."""
    if not use.name:
        known = derived.get(use.value)
        derived[use.value] = gradient if known is None else known + gradient
    else:
        tied = gradients.get(use.name)
        leaf = local.activations.tape.leaves[use.value]
        gradients[use.name] = (leaf, gradient if tied is None else tied[1] + gradient)


def _closed(
    local: LocalStep, op: GraphOperation, wanted: frozenset[int], given: dict[int, Tensor]
) -> dict[int, Tensor]:
    if not wanted:
        return {}
    counting.add(parameter_rules=len(wanted))
    along = local.along.pop(op.index, {})
    if wanted <= along.keys():
        return dict(along)
    return by_rule(local.graph, local.activations, op, given, wanted)


def _by_perturbation(local: LocalStep, op: GraphOperation, use: ParameterUse, given: dict[int, Tensor]) -> Tensor:
    """Differences of one operation along every element of a parameter."""
    activations = local.activations
    parameter = activations.tensor(use.value).detach()
    wide = accumulation_dtype(parameter.dtype)
    scheme = local.scheme
    where = use.name or f"an operand of {op.name}"
    precision = narrowest([parameter.dtype, *(local.graph.values[v].dtype for v in given)])
    step = local.step or default_step(parameter.reshape(1, -1), scheme, where, precision).view_as(parameter)
    upper, lower, gap = stepped(parameter, step, scheme, where)
    result = torch.zeros(parameter.numel(), dtype=wide, device=parameter.device)

    def product(k: int, moved: Tensor) -> Tensor:
        changed = parameter.clone(memory_format=torch.contiguous_format)
        changed.view(-1)[k] = moved.reshape(-1)[k]
        with counting.doing(f"a query that moves element {k} of {where}"):
            outputs = run_with_parameter(local.graph, op, activations, use.value, changed)
        differences = ((outputs[v].to(wide) - activations.tensor(v).to(wide)) * g.to(wide) for v, g in given.items())
        return sum((d.sum() for d in differences), start=torch.zeros((), dtype=wide, device=parameter.device))

    among = shares() if parameter.numel() > 1 else None
    start, stop = (0, parameter.numel()) if among is None else among.part(parameter.numel())
    for k in range(start, stop):
        above = product(k, upper)
        result[k] = above - product(k, lower) if scheme == "central" else above
    if among is not None:
        among.sum_(result, where)
    gradient = result.reshape(parameter.shape) / gap
    if not bool(gradient.isfinite().all()):
        raise NonFiniteError(f"a query that perturbed {where} returned NaN or infinity")
    return gradient

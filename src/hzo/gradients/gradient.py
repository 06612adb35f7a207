"""Gradients from queries: record the boundaries, fold the tree, apply the rules.

``backward``, ``grad_and_value`` and ``cotangents`` are three views of one computation: a base pass gives every
boundary its activation, the loss gives the last boundary its cotangent, the plan's nodes carry it to the others, and
every parameter's gradient is a local product of an activation and a cotangent. Without a plan, and where nothing is
declared, ``backward`` and ``grad_and_value`` take the gradient of a recording instead (``hzo.record``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo._options import factor as factor_of
from hzo._options import function
from hzo.distributed import averaged, kind_of_wrapper, refuse_wrappers, unwrapped
from hzo.errors import InputError, NonFiniteError
from hzo.execution import Activities, base_pass, contained, undone_on_error
from hzo.gradients.backward_sweep import Cotangents, sweep
from hzo.gradients.parameters import Gradients
from hzo.gradients.trace_cache import prepare
from hzo.losses import loss_and_cotangent
from hzo.plans import Plan, schedule
from hzo.reverse import accumulate, gradients_of, named
from hzo.tracing import Attribute, Chain, Graph, Operation, Ref, tensors_in
from hzo.tracing.recorder import call_arguments


@torch.inference_mode(False)  # whose tensors could be neither clipped nor added to
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
        model: any module, recorded at every call; or a traced chain. With a plan, options of one or declared modules
            it is traced and planned on the first call, then cached.
        loss_fn: ``loss_fn(output, y)``: a scalar, or one loss per sample, whose mean is taken.
        x: input with the batch first; a tuple is passed as positional, a dict as keyword arguments.
        y: target; None calls ``loss_fn(output)``.
        plan: from ``hzo.plan``; None plans with ``options`` (those of ``hzo.plan``).
        scale: factor on the gradients, for a ``GradScaler``: ``scale=scaler.scale(torch.ones(()))``.
        memory: with a plan, bytes that the perturbed copies of one chunk may take; None takes a share of what is
            free. What is stored of the base pass is the plan's affair: ``hzo.plan(..., memory=)``.

    An input that requires a gradient gets one, too. Returns the loss, a scalar without gradient history. Afterwards
    buffers and random state are as after one ordinary forward pass; on an error nothing has changed.

    Cost: one forward pass and the small runs that measure weights; with a plan, ``plan.queries`` and one base pass.
    Source: paper (plans), ours (recordings); parameter rules are backprop's local step.

    Raises:
        InputError, PlanError: batch, target or plan do not fit. NonFiniteError: says where it began, if known.
        TapeError: the gradient leads through something that was not recorded.
        See ``hzo.trace`` and ``hzo.plan`` for what they raise.
    """
    factor = factor_of(scale)
    if _on_tape(model, plan, options):
        found_leaves, loss = gradients_of(model, loss_fn, x, y)
        accumulate([(leaf, g * factor if factor != 1 else g) for leaf, g in found_leaves])
        return loss
    gradients, loss, (graph, found) = _estimate(model, loss_fn, x, y, plan, memory, options)
    inputs = tensors_in(call_arguments(x))
    of_inputs = [(inputs[v], found[0][v]) for v in graph.differentiated if v in found.get(0, {})]
    found_leaves = averaged(model, [*gradients.values(), *of_inputs])
    accumulate([(p, g * factor if factor != 1 else g) for p, g in found_leaves])
    return loss


@torch.inference_mode(False)  # whose tensors could be neither clipped nor added to
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
    if _on_tape(model, plan, options):
        assert isinstance(model, nn.Module)
        leaves, loss = gradients_of(model, loss_fn, x, y)
        return named(leaves, model, loss_fn), loss
    gradients, loss, _ = _estimate(model, loss_fn, x, y, plan, memory, options)
    if isinstance(model, nn.Module) and kind_of_wrapper(model):
        return named(averaged(model, [*gradients.values()]), model, loss_fn), loss
    return {name: gradient.to(parameter.dtype) for name, (parameter, gradient) in gradients.items()}, loss


@torch.inference_mode(False)  # whose tensors could be neither clipped nor added to
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
    if plan is None:
        options = {"boundaries": "all", **options}
    _, _, (graph, found) = _estimate(model, loss_fn, x, y, plan, memory, options, keep=True)
    result: list[Tensor | tuple[Tensor | None, ...] | None] = []
    for position in graph.boundaries:
        floating = [v for v in graph.live[position] if graph.values[v].floating]
        tensors = tuple(found.get(position, {}).get(v) for v in floating)
        estimated = any(t is not None for t in tensors)
        result.append((tensors[0] if len(tensors) == 1 else tensors) if estimated else None)
    return result


def _on_tape(model: Chain | nn.Module, plan: Plan | None, options: dict[str, Any]) -> bool:
    """Whether a gradient is taken by rules from a recording: no chain, no plan, nothing declared or opaque."""
    if plan is not None or not isinstance(model, nn.Module):
        return False
    if any(options.get(name, default) != default for name, default in _DEFAULTS.items()) or options.keys() - _DEFAULTS:
        return False
    return not any(hasattr(m, "hzo_promises") or hasattr(m, "hzo_opaque") for m in model.modules())


_DEFAULTS = {"tree": "planned", "assume": "structure"}


@torch.no_grad()
def _estimate(
    model: Chain | nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any,
    plan: Plan | None,
    memory: int | None,
    options: dict[str, Any],
    keep: bool = False,
) -> tuple[Gradients, Tensor, tuple[Graph, Cotangents]]:
    function("loss_fn", loss_fn)
    refuse_wrappers(model.model if isinstance(model, Chain) else model)
    chain, plan = prepare(unwrapped(model), x, plan, options)
    graph = chain.traced
    inputs = tensors_in(call_arguments(x))
    for tensor in inputs:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NonFiniteError("the input x holds NaN or infinity; clean the data before training on it")
    modules = [chain.model, *(op.module for op in graph.operations if op.module is not None)]
    with undone_on_error(modules):
        steps = schedule(graph, plan)
        activities = base_pass(graph, inputs, steps.base_pass)
        loss, at_end = loss_at_the_end(graph, activities, inputs, loss_fn, y)
        # Drawn where it moves the random state on, so that the next gradient has other signs.
        seed = int(torch.randint(2**62, ())) if plan.random else 0
        with contained(modules):
            found = sweep(graph, plan, steps, activities, at_end, memory=memory, seed=seed, keep=keep)
    return found.gradients, loss, (graph, found.cotangents)


def loss_at_the_end(
    graph: Graph, activities: Activities, inputs: list[Tensor], loss_fn: Callable[..., Any], y: Any
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss and the cotangents of the output's values, in the accumulation dtype.

    Raises:
        NonFiniteError: names the first operation whose result holds NaN or infinity.
    """
    output = pytree.tree_map_only(Ref, lambda ref: activities.values[ref.value], graph.output)
    output = pytree.tree_map_only(Attribute, Attribute.get, output)
    loss, cotangent = _loss(graph, inputs, loss_fn, output, y)
    return loss, at_the_end(graph, cotangent)


def _loss(graph: Graph, inputs: list[Tensor], loss_fn: Callable[..., Any], output: Any, y: Any) -> tuple[Tensor, Any]:
    try:
        return loss_and_cotangent(loss_fn, output, y)
    except (NonFiniteError, InputError) as error:
        # Once more with everything kept; what this moves is undone with the rest.
        first = _first_not_finite(graph, base_pass(graph, inputs))
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


def at_the_end(graph: Graph, cotangent: Any) -> dict[int, Tensor]:
    """The cotangents of the output's values, from a cotangent like the output with None for whatever has none."""
    found: dict[int, Tensor] = {}
    leaves = pytree.tree_leaves(graph.output)
    for leaf, g in zip(leaves, pytree.tree_leaves(cotangent), strict=True):
        if isinstance(leaf, Ref) and isinstance(g, Tensor):  # one value may stand twice in the output
            found[leaf.value] = found[leaf.value] + g if leaf.value in found else g
    return found

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
from hzo.execution import contained, undone_on_error
from hzo.gradients.backward_sweep import Cotangents, sweep
from hzo.gradients.forward_pass import BasePass, OtherGraphError, loss_pass
from hzo.gradients.parameters import Gradients
from hzo.gradients.trace_cache import made_with, prepare
from hzo.plans import Plan, schedule
from hzo.reverse import accumulate, gradients_of, named
from hzo.tape import Ref
from hzo.tracing import Chain, Graph, batch_size, call_arguments


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
    gradients, base, (graph, found) = _estimate(model, loss_fn, x, y, plan, memory, options)
    of_inputs = [(base.given[v], found[0][v]) for v in graph.differentiated if v in found.get(0, {})]
    found_leaves = averaged(model, [*gradients.values(), *base.beside, *of_inputs])
    accumulate([(leaf, g * factor if factor != 1 else g) for leaf, g in found_leaves])
    return base.loss


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
    gradients, base, _ = _estimate(model, loss_fn, x, y, plan, memory, options)
    if isinstance(model, nn.Module) and kind_of_wrapper(model):
        return named(averaged(model, [*gradients.values(), *base.beside]), model, loss_fn), base.loss
    found = {name: _own(gradient, parameter) for name, (parameter, gradient) in gradients.items()}
    if isinstance(loss_fn, nn.Module):
        beside = {id(leaf): g for leaf, g in base.beside}
        found |= {
            f"loss_fn.{name}": _own(beside[id(p)], p) for name, p in loss_fn.named_parameters() if id(p) in beside
        }
    return found, base.loss


def _own(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient that shares its memory with nothing."""
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)


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
) -> tuple[Gradients, BasePass, tuple[Graph, Cotangents]]:
    function("loss_fn", loss_fn)
    refuse_wrappers(model.model if isinstance(model, Chain) else model)
    model = unwrapped(model)
    chain, found = prepare(model, x, plan, options)
    graph = chain.traced
    modules = [chain.model, *graph.opaque_modules]
    with undone_on_error(modules):
        steps = schedule(graph, found)
        try:
            base = loss_pass(chain, x, loss_fn, y, steps.base_pass)
        except OtherGraphError:
            # The model does something else with these numbers than with those it was traced with. Given a plan that is
            # an error, but for one sample alone: PyTorch copies and broadcasts less for it.
            if plan is not None and batch_size(*call_arguments(x)) > 1:
                raise
            chain, found = prepare(model, x, None, options if plan is None else made_with(plan), anew=True)
            graph = chain.traced
            steps = schedule(graph, found)
            base = loss_pass(chain, x, loss_fn, y, steps.base_pass)
        # Drawn where it moves the random state on, so that the next gradient has other signs.
        seed = int(torch.randint(2**62, ())) if found.random else 0
        with contained(graph.opaque_modules):
            swept = sweep(
                graph, found, steps, base.activities, base.at_end, memory=memory, seed=seed, keep=keep,
                direct=base.direct,
            )  # fmt: skip
    return swept.gradients, base, (graph, swept.cotangents)


def at_the_end(graph: Graph, cotangent: Any) -> dict[int, Tensor]:
    """The cotangents of the output's values, from a cotangent like the output with None for whatever has none."""
    found: dict[int, Tensor] = {}
    leaves = pytree.tree_leaves(graph.output)
    for leaf, g in zip(leaves, pytree.tree_leaves(cotangent), strict=True):
        if isinstance(leaf, Ref) and isinstance(g, Tensor):  # one value may stand twice in the output
            found[leaf.value] = found[leaf.value] + g if leaf.value in found else g
    return found

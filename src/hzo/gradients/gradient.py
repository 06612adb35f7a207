"""``backward`` and its like: the gradient of a loss, from a recording or by the queries of a plan.

``backward``, ``grad_and_value`` and ``cotangents`` are three views of one computation: a base pass gives every
boundary its activation, the loss gives the last boundary its cotangent, the plan's nodes carry it to the others, and
every parameter's gradient is a local product of an activation and a cotangent. Without a plan, and where nothing is
declared, ``backward`` and ``grad_and_value`` take the gradient of a recording instead (``hzo.record``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hzo._compiler import uncompiled
from hzo._options import function, positive, scale_factor
from hzo.distributed import (
    average_accumulated,
    averaged,
    code_of,
    digest,
    kind_of_wrapper,
    refuse_wrapped_loss,
    refuse_wrappers,
    shared,
    unwrapped,
)
from hzo.errors import InputError
from hzo.execution import contained
from hzo.gradients.backward_sweep import BoundaryCotangents, sweep_plan
from hzo.gradients.parameters import ParameterGradients
from hzo.gradients.planned_pass import planned_pass
from hzo.plans import Plan
from hzo.pools import one_gradient
from hzo.reverse import accumulate, drained, gradients_by_name, gradients_of, hooked
from hzo.tape import Ref
from hzo.tape.marks import marks_of
from hzo.tracing import Chain, Graph, module_of, output_leaves

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@uncompiled
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
    mesh: DeviceMesh | None = None,
    timeout: float = 600.0,
    keep: bool | None = None,
    **options: Any,
) -> Tensor:
    """Estimate the gradient of the mean loss by forward passes only and add it to ``.grad``.

    Args:
        model: any module, recorded at every call; or a traced chain. With options of a plan or declared modules, the
            recording of the first call is what is planned for, and the plan is kept. Your code runs once in each call.
        loss_fn: ``loss_fn(output, y)``: a scalar, or one loss per sample, whose mean is taken.
        x: input with the batch first; a tuple is passed as positional, a dict as keyword arguments.
        y: target; None calls ``loss_fn(output)``.
        plan: from ``hzo.plan``; None plans with ``options`` (those of ``hzo.plan``).
        scale: factor on the gradients, for a ``GradScaler``: ``scale=scaler.scale(torch.ones(()))``.
        memory: with a plan alone, bytes that the perturbed copies of one chunk may take; None takes a share of what is
            free. What is stored of the base pass is limited by ``hzo.plan(..., memory=)``.
        mesh: a ``torch.distributed.DeviceMesh`` whose dimensions are ``"sample"``, ``"query"`` or both; every process
            of it calls alike. Along ``sample`` each has samples of its own, and all get the gradient and the loss of
            the mean over them, however many each has. Along ``query`` all have the same samples and ask a share of the
            queries: directions of a plan's nodes, and calls of black boxes. Gradients are equal to the bit on all.
            Statistics of BatchNorm are each process's own.
        timeout: seconds that a process of a mesh waits for another.
        keep: without a plan, whether what was measured of weights is kept for the next gradient: see
            ``hzo.RecordedStep.backward``.

    An input that requires a gradient gets one, too. Returns the loss, a scalar without gradient history. Afterwards
    buffers and random state are as after one ordinary forward pass; on an error nothing has changed.

    Memory: what the plan says of activations, and the gradients once, each in its parameter's dtype as soon as it is
    complete: they become ``.grad``. Where that is there already they are held beside it until all are found, since an
    error must find it unchanged.

    Cost: one forward pass and the small runs that measure weights; with a plan, ``plan.queries`` and one base pass,
    and on the first call about four forward passes more, with all activations held at once (``hzo.trace`` and
    ``plan=`` do this ahead, with four samples).
    Source: paper (plans), ours (recordings); parameter rules are backprop's local step.

    Raises:
        InputError, PlanError: batch, target or plan do not fit. NonFiniteError: says where it began, if known.
        TapeError: the gradient leads through something that was not recorded.
        DistributedError: on all processes, where one fails, is lost, or is about to compute something else.
        See ``hzo.trace`` and ``hzo.plan`` for what they raise.
    """
    factor = scale_factor(scale)
    found_leaves, loss, _ = _leaves(
        _Task(model, loss_fn, x, y, plan, memory, options, float(factor)), mesh, timeout, keep
    )
    if mesh is None:
        average_accumulated(model, found_leaves)
    accumulate(drained(found_leaves) if factor == 1 else [(leaf, g * factor) for leaf, g in found_leaves])
    return loss


@uncompiled
@torch.inference_mode(False)  # whose tensors could be neither clipped nor added to
def grad_and_value(
    model: Chain | nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any = None,
    *,
    plan: Plan | None = None,
    memory: int | None = None,
    mesh: DeviceMesh | None = None,
    timeout: float = 600.0,
    **options: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """Estimate the gradient of the mean loss by forward passes only; return ``({parameter name: gradient}, loss)``.

    ``.grad`` stays as it is. Arguments, cost and errors as for ``hzo.backward``.
    """
    leaves, loss, names = _leaves(_Task(model, loss_fn, x, y, plan, memory, options), mesh, timeout)
    if names is None or kind_of_wrapper(model):  # type: ignore[arg-type]
        return gradients_by_name(leaves, model, loss_fn), loss  # type: ignore[arg-type]
    found = {id(leaf): gradient for leaf, gradient in leaves}
    # Each in memory of its own: a gradient that is clipped must move no other.
    made = {n: torch.empty_like(p, requires_grad=False).copy_(found[id(p)]) for n, p in names.items() if id(p) in found}
    return made, loss


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
    """The gradient of the mean loss by the activations at every stage boundary 0..L, their cotangents.

    Returns a list with an entry for each boundary: a tensor, a tuple where several tensors cross it, or None.
    Parameters and ``.grad`` stay as they are.

    Without a plan all boundaries are estimated, the input's included; with one, those that it estimates, and None
    elsewhere (``hzo.plan(chain, boundaries="all")`` estimates all). Integer tensors have None.
    Arguments, cost and errors as for ``backward``.
    """
    if plan is None:
        options = {"boundaries": "all", **options}
    estimate = _estimate(_Task(model, loss_fn, x, y, plan, memory, options), keep=True)
    graph, found = estimate.graph, estimate.cotangents
    result: list[Tensor | tuple[Tensor | None, ...] | None] = []
    for position in graph.boundaries:
        floating = [v for v in graph.live[position] if graph.values[v].floating]
        tensors = tuple(found.get(position, {}).get(v) for v in floating)
        estimated = any(t is not None for t in tensors)
        result.append((tensors[0] if len(tensors) == 1 else tensors) if estimated else None)
    return result


def estimated_cotangents(
    model: Chain | nn.Module, loss_fn: Callable[..., Any], x: Any, y: Any = None, *, plan: Plan | None = None,
    memory: int | None = None, **options: Any,
) -> tuple[Graph, BoundaryCotangents] | None:  # fmt: skip
    """All cotangents that a plan estimates, by position and value, and the graph; None where ``backward`` uses none."""
    task = _Task(model, loss_fn, x, y, plan, memory, options)
    if _on_tape(task):
        return None
    found = _estimate(task, keep=True)
    return found.graph, found.cotangents


Leaves = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Task:
    """What a gradient is asked of: the arguments that ``backward`` and its like share."""

    model: Chain | nn.Module
    loss_fn: Callable[..., Any]
    x: Any
    y: Any
    plan: Plan | None
    memory: int | None
    options: dict[str, Any]
    scale: float = 1.0


@dataclass(frozen=True)
class _Estimate:
    """What a plan found.

    Attributes:
        gradients: of the model's parameters, by name. others: of inputs, and of parameters that the loss holds.
        loss: the mean. graph: of the model. cotangents: by position and value.
    """

    gradients: ParameterGradients
    others: Leaves
    loss: Tensor
    graph: Graph
    cotangents: BoundaryCotangents


def _leaves(
    task: _Task, mesh: DeviceMesh | None, timeout: float, keep: bool | None = False
) -> tuple[Leaves, Tensor, dict[str, Tensor] | None]:
    """Leaves with their gradients, the loss, and with a plan parameters by their names in the chain."""
    by_rules = _on_tape(task)
    if keep and not by_rules:
        raise InputError("keep= is for gradients without a plan, whose queries measure no weights that could be kept")
    if task.memory is not None and by_rules:
        raise InputError(
            "memory= bounds the perturbed copies of a plan's queries, and a gradient without a plan makes none. To "
            "store less of the forward pass use torch.utils.checkpoint in the model, or plan for it: "
            "hzo.backward(model, loss_fn, x, y, plan=hzo.plan(hzo.trace(model, x), memory=bytes))"
        )
    positive("timeout in seconds", timeout)
    with _processes(task, mesh, timeout) as together:
        if by_rules:
            leaves, loss = gradients_of(task.model, task.loss_fn, task.x, task.y, together, keep)
            return list(leaves), loss, None
        spread = mesh is not None or bool(kind_of_wrapper(module_of(task.model)))
        found = _estimate(task, together=together, widely=spread)
        # A chain names the parameters that it was traced with; others of the same shape may stand in their place now.
        own = {id(parameter): name for name, parameter in module_of(task.model).named_parameters()}
        names = {own.get(id(leaf), name): leaf for name, (leaf, _) in found.gradients.items()}
        if isinstance(task.loss_fn, nn.Module):
            held = {id(leaf) for leaf, _ in found.others}
            names |= {f"loss_fn.{name}": p for name, p in task.loss_fn.named_parameters() if id(p) in held}
        return [*found.gradients.values(), *found.others], found.loss, names


@contextmanager
def _processes(
    task: _Task, mesh: DeviceMesh | None, timeout: float
) -> Iterator[Callable[[Any, Tensor], tuple[Any, Tensor]]]:
    """What processes make of their gradients and losses: as a wrapper of the model would, or as a mesh says."""
    model, plan = task.model, task.plan
    if mesh is None:
        yield lambda gradients, loss: (averaged(model, gradients), loss)
        return
    module = module_of(model)
    made = () if plan is None else (plan.fingerprint, plan.edges, plan.scheme, plan.step, plan.mu, plan.spacing)
    of_loss = [*task.loss_fn.named_parameters()] if isinstance(task.loss_fn, nn.Module) else []
    beside = [p for _, p in of_loss]
    numbers = [*beside, *(task.loss_fn.buffers() if isinstance(task.loss_fn, nn.Module) else ())]
    trained = [(name, p.requires_grad) for name, p in of_loss]
    same = f"{made} {sorted(task.options.items())} {task.scale} {code_of(task.loss_fn)} {trained} {digest(numbers)}"
    with shared(mesh, module, task.x, task.y, same, timeout) as (here, weight):
        yield lambda gradients, loss: here.finish(module, gradients, loss, weight, beside)


def _on_tape(task: _Task) -> bool:
    """Whether a gradient is taken by rules from a recording: no chain, no plan, nothing declared or opaque."""
    model, options = task.model, task.options
    if task.plan is not None or not isinstance(model, nn.Module):
        return False
    if any(options.get(name, default) != default for name, default in _DEFAULTS.items()) or options.keys() - _DEFAULTS:
        return False
    return not any(marks_of(m) is not None for m in model.modules())


_DEFAULTS = {"tree": "planned", "assume": "structure"}


@torch.no_grad()
def _estimate(
    task: _Task,
    keep: bool = False,
    together: Callable[[Any, Tensor], tuple[Any, Tensor]] | None = None,
    widely: bool = False,
) -> _Estimate:
    """Gradients by a plan; ``keep`` keeps the cotangents of all boundaries, and leaves hooks alone.

    ``widely`` leaves gradients in the accumulation dtype, for processes that average them.
    """
    model, loss_fn, x, y, plan = task.model, task.loss_fn, task.x, task.y, task.plan
    function("loss_fn", loss_fn)
    refuse_wrappers(module_of(model))
    refuse_wrapped_loss(loss_fn)
    model = unwrapped(model)
    with one_gradient(), planned_pass(model, loss_fn, x, y, plan, task.options) as (chain, found, steps, base):
        graph = chain.traced
        # Drawn where it moves the random state on, so that the next gradient has other signs.
        seed = int(torch.randint(2**62, ())) if found.random else 0
        with contained(graph.opaque_modules):
            swept = sweep_plan(
                graph, found, steps, base.activations, base.at_end, memory=task.memory, seed=seed, keep=keep,
                direct=base.direct, widely=keep or widely,
            )  # fmt: skip
        of_input = swept.cotangents.get(0, {})
        others = [*base.beside, *((base.given[v], of_input[v]) for v in graph.differentiated if v in of_input)]
        gradients, others = _once(swept.gradients, others)
        loss = base.loss
        if not keep:
            gradients = {name: (p, _after_hooks(p, g)) for name, (p, g) in gradients.items()}
            others = [(t, _after_hooks(t, g)) for t, g in others]
        if together is not None:
            leaves, loss = together([*gradients.values(), *others], loss)
            by_id = {id(leaf): g for leaf, g in leaves}
            gradients = {name: (p, by_id[id(p)]) for name, (p, _) in gradients.items()}
            gradients |= _elsewhere(chain.model, gradients, by_id)
            others = [(t, by_id[id(t)]) for t, _ in others]
    return _Estimate(gradients, others, loss, graph, swept.cotangents)


def _once(gradients: ParameterGradients, others: Leaves) -> tuple[ParameterGradients, Leaves]:
    """Every leaf once: one tensor may be given twice, be a parameter, or be read by the loss, too."""
    sums = dict(gradients)
    names = {id(leaf): name for name, (leaf, _) in gradients.items()}
    rest: dict[int, tuple[Tensor, Tensor]] = {}
    for leaf, g in others:
        name = names.get(id(leaf))
        if name is not None:
            sums[name] = (leaf, sums[name][1] + g)
        else:
            rest[id(leaf)] = (leaf, rest[id(leaf)][1] + g if id(leaf) in rest else g)
    return sums, [*rest.values()]


def _after_hooks(leaf: Tensor, gradient: Tensor) -> Tensor:
    """What the hooks of a parameter or an input make of its gradient, which they get in its dtype."""
    return hooked(leaf, gradient.to(leaf.dtype)) if leaf._backward_hooks else gradient


def _elsewhere(module: nn.Module, found: ParameterGradients, by_id: dict[int, Tensor]) -> ParameterGradients:
    """Parameters that have a gradient from other processes alone."""
    known = {id(p) for p, _ in found.values()}
    return {n: (p, by_id[id(p)]) for n, p in module.named_parameters() if id(p) in by_id and id(p) not in known}


def at_the_end(graph: Graph, cotangent: Any) -> dict[int, Tensor]:
    """The cotangents of the output's values, from a cotangent like the output with None for whatever has none."""
    found: dict[int, Tensor] = {}
    for leaf, g in zip(output_leaves(graph.output), output_leaves(cotangent), strict=True):
        if isinstance(leaf, Ref) and isinstance(g, Tensor):  # one value may stand twice in the output
            found[leaf.value] = found[leaf.value] + g if leaf.value in found else g
    return found

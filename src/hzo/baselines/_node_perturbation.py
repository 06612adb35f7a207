"""Node perturbation: noise on the outputs of layers, correlated with what it does to the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hzo.baselines import _evaluate as ev
from hzo.baselines._per_sample import contributions
from hzo.baselines._registry import baseline
from hzo.errors import CoupledSamplesError, InputError
from hzo.execution import Activations, full_float32, query
from hzo.gradients import LocalStep, base_pass, parameter_gradients, traced_for
from hzo.losses import LossFn
from hzo.plans import has_rule
from hzo.tape import Ref
from hzo.tracing import Chain, Graph, GraphOperation, map_output


@baseline("node-perturbation", passes=2, rate=0.02)
def node_perturbation(
    model: ev.Model,
    loss_fn: LossFn,
    x: Any,
    y: Any = None,
    *,
    samples: int = 1,
    mu: float | None = None,
    generator: torch.Generator | None = None,
    per_sample: bool = True,
) -> Tensor:
    """Perturb the output of every layer that has parameters; adds the estimate to ``.grad``, returns the
    loss.

    Estimates: all nodes a (elements of those outputs) of all samples get noise at once, and sample b's
    cotangent is ``ĝ_b = (ℓ_b(a + μξ) − ℓ_b(a − μξ)) / 2μ · ξ_b``, ξ standard normal and ℓ_b what sample b
    contributes to the loss; the mean over ``samples`` draws. Parameter gradients follow from it by the
    layers' local rules, the ones that HZO uses.

    Expectation: the gradient of the loss smoothed over the nodes by N(0, μ²I), which is the gradient up to
    O(μ²).

    Variance: with n nodes in a sample and its true cotangents g_b, one draw has E|ĝ_b|² = (n + 2)|g_b|² and
    Var ĝ_bi = |g_b|² + g_bi² (μ → 0), independent between samples; k draws have 1/k of it. With
    ``per_sample=False`` the loss is one number: n counts the nodes of the whole batch, and g_b gives way to
    the cotangents of all samples.

    Cost: a base pass and 2·samples full forward passes, and a local product for every layer. A plain module
    is traced when it is new (``check_evaluations``); give ``hzo.trace(model, x)`` to do that once for several
    models in turn.

    Args:
        model: module or ``hzo.Chain``.
        loss_fn: called as ``loss_fn(model(x), y)``; one of torch's common losses, or one that returns values
            of shape (B, ...), whose mean is the loss; any with ``per_sample=False``.
        x: tensor, tuple (``model(*x)``) or dict (``model(**x)``).
        y: target; None calls ``loss_fn(output)``.
        samples: directions averaged.
        mu: the step; default u^(1/3)/5 for the rounding unit u (1e-3 in float32).
        generator: draws one seed per direction; default: torch's global random state, which that moves.
        per_sample: tell the samples' contributions to the loss apart.

    Raises:
        InputError: the loss is one number for the batch, or a parameter is used in a way that no local rule
        covers.
        CoupledSamplesError: BatchNorm in train mode and the like, with ``per_sample=True``.

    Source: J. Werfel, X. Xie, H. S. Seung, Learning curves for stochastic gradient descent in linear
    feedforward networks, Neural Computation 17(12), 2005; with central differences instead of forward ones.
    """
    p = ev.problem(model, loss_fn, x, y)
    chain = traced_for(model if isinstance(model, Chain) else p.module, x, strict=False)
    graph = chain.traced
    p = replace(p, stages=len(graph.stages))
    layers = [op for op in graph.operations if op.parameters and op.batched]
    if per_sample:
        _check_uncoupled(graph)

    def loss_of(output: Any) -> Tensor:
        return contributions(p, output) if per_sample else ev.mean_loss(p, output)

    seeds = ev.draw_seeds(generator, samples)
    # A stage that is a plain callable may hide modules, which the trace has found.
    modules = [p.module, *graph.opaque_modules]
    with torch.no_grad(), full_float32(), ev.replayed(modules) as run:
        activations, output = run(lambda: base_pass(chain, x))
        output = map_output(_detached, output)
        for op in graph.operations:
            _check_rule(op)
        loss = ev.mean_loss(p, output)
        nodes = {op.writes[0]: activations.tensor(op.writes[0]) for op in layers}
        named = {f"the output of {op.name}": activations.tensor(op.writes[0]) for op in layers}
        mu = ev.checked_step(mu, ev.rounding([*nodes.values()]) ** (1 / 3) / 5, named)
        cotangents = {value: ev.accumulator(node) for value, node in nodes.items()}
        if not layers:
            seeds = []
        for seed in seeds:
            ends = []
            for signed in (mu, -mu):
                ends.append(loss_of(_perturbed(graph, activations, nodes, seed, signed)))
                ev.count_pass(p)
            slope = (ends[0] - ends[1]) / (2 * mu * samples)
            noise = ev.directions([*nodes.values()], ev.gaussian, seed)
            for value, xi in zip(nodes, noise, strict=True):
                cotangents[value] += _credit(graph, value, xi.to(cotangents[value].dtype), slope, p.batch)
        gradients = parameter_gradients(LocalStep(graph, activations, perturbed=()), cotangents)
    ev.add_to_grad(p, gradients.values())
    return loss


def _check_uncoupled(graph: Graph) -> None:
    for op in graph.operations:
        if op.coupled:
            raise CoupledSamplesError(
                f"samples influence each other in {op.name}, so that what noise on one of them does is not "
                "seen in its own loss. Put BatchNorm into evaluation mode, or pass per_sample=False."
            )


def _check_rule(op: GraphOperation) -> None:
    if op.parameters and op.batched and not has_rule(op):
        names = ", ".join(use.name or "a value derived from a parameter" for use in op.parameters)
        raise InputError(
            f"node perturbation needs a local rule for {names} in {op.name}, and hzo knows none for that "
            "call. Freeze it, use a layer of torch, or use hzo.backward or spsa, which perturb any parameter."
        )


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _perturbed(graph: Graph, activations: Activations, nodes: dict[int, Tensor], seed: int, step: float) -> Any:
    """The model's output with noise on the nodes; what depends on parameters alone stays as it is."""
    noise = dict(zip(nodes, ev.directions([*nodes.values()], ev.gaussian, seed), strict=False))
    moved: dict[int, Tensor] = {}
    for op in graph.operations:
        if not op.batched:
            continue
        if any(v in moved for v in op.reads):
            moved.update(query(graph, op, activations, moved, 1))
        value = op.writes[0] if op.writes else None
        if value in noise:
            base = moved[value] if value in moved else activations.tensor(value).unsqueeze(0)
            moved[value] = base + step * noise.pop(value)

    def filled(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        return moved[leaf.value].squeeze(0) if leaf.value in moved else activations.tensor(leaf.value)

    return map_output(filled, graph.output)


def _credit(graph: Graph, value: int, noise: Tensor, slope: Tensor, batch: int) -> Tensor:
    """Noise times slope: of the sample that it belongs to, or of the batch."""
    if slope.ndim == 0:
        return noise * slope
    rows = graph.values[value].rows(noise, batch)
    return graph.values[value].from_rows(rows * slope.to(rows)[:, None], batch)

"""A gradient that a CUDA graph repeats: the device does the same work, and waits for no Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hzo.execution import QueryCount, count_queries, counting

Gradient = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Adds a batch's gradient, of inputs and targets, to ``.grad`` and returns the loss; draws what is random from the
generator."""

_BEFORE = 3  # gradients that PyTorch asks for on another stream before a capture


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor
    loss: Tensor
    gradients: tuple[tuple[nn.Parameter, Tensor], ...]  # that each repetition writes to
    count: QueryCount


def repeated(gradient: Gradient, model: nn.Module, shape: torch.Size) -> Gradient:
    """The same gradient; after a few calls it is captured once, and from then on repeated.

    For inputs of another shape than this it is taken the ordinary way. ``.grad`` must be None before each call, as
    ``zero_grad(set_to_none=True)`` leaves it. Whether the input is finite is not looked at in a repetition.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    made: list[_Captured] = []
    calls = 0

    def run(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal calls
        if made and x.shape == shape:
            return _repeat(made[0], x, y)
        calls += x.shape == shape
        if x.shape != shape or calls <= _BEFORE:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = gradient(x, y, generator)
            torch.cuda.current_stream().wait_stream(side)
            return loss
        made.append(_capture(gradient, model, x, y, generator))
        return _repeat(made[0], x, y, counted=False)

    return run


def _capture(gradient: Gradient, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> _Captured:
    graph = torch.cuda.CUDAGraph()
    x, y = x.clone(), y.clone()
    with count_queries() as count, torch.cuda.graph(graph):
        loss = gradient(x, y, generator)
    gradients = tuple((p, p.grad) for p in model.parameters() if p.grad is not None)
    return _Captured(graph, x, y, loss, gradients, count)


def _repeat(held: _Captured, x: Tensor, y: Tensor, counted: bool = True) -> Tensor:
    held.x.copy_(x)
    held.y.copy_(y)
    held.graph.replay()
    for parameter, grad in held.gradients:
        parameter.grad = grad
    if counted:
        count = held.count
        counting.add(
            queries=count.queries,
            stage_evaluations=count.stage_evaluations,
            adjoints=count.adjoints,
            parameter_rules=count.parameter_rules,
            loss_evaluations=count.loss_evaluations,
            base_evaluations=count.base_evaluations,
            forward_equivalents=count.exact_forward_equivalents,
        )
    return held.loss.clone()

"""How well a method's gradient points where backprop's does, without leaving a trace in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hzo import baselines
from hzo.execution import contained
from hzo_lab.records import generator, separate_random_numbers
from hzo_lab.training.methods import Method


@contextmanager
def without_trace(model: nn.Module, seed: int) -> Iterator[None]:
    """Gradients made inside are gone afterwards; buffers and random numbers are put back."""
    own = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with contained([model]), separate_random_numbers(seed):
            for parameter, _ in own:
                parameter.grad = None
            yield
    finally:
        for parameter, gradient in own:
            parameter.grad = gradient


def cosine_to_backprop(
    method: Method,
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
) -> float:
    """Cosine between the gradient of all parameters by ``method`` and by backprop on one batch; both see one
    random state, so that dropout drops the same units."""
    with without_trace(model, seed):
        method.gradient(x, y, generator(seed, "probe"))
        ours = _flat(model)
    with without_trace(model, seed):
        baselines.backprop(model, loss_fn, x, y)
        exact = _flat(model)
    size = float(ours.norm() * exact.norm())
    return float(ours @ exact) / size if size > 0 else float("nan")


def _flat(model: nn.Module) -> Tensor:
    # Summed in float64: the cosine is to tell 0.999999 from 1, whatever the dtype of the run.
    parts = [
        (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).detach().double().reshape(-1)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    return torch.cat([part.cpu() for part in parts])

"""Comparisons of estimates with exact gradients and cotangents, and with what the error model expects of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hzo
from hzo import baselines
from hzo_lab.training import without_trace

GradientsByName = dict[str, Tensor]


def cosine(a: Tensor, b: Tensor) -> float:
    """In float64, of all elements; 0 where either vanishes."""
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0, eps=1e-300))


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def expected_error(chain: hzo.Chain, plan: hzo.Plan, boundary: int) -> float:
    """Squared relative error that a plan expects at a stage boundary."""
    graph = chain.traced
    position = graph.boundaries[boundary]
    assert plan.expected is not None
    return plan.expected.errors[position, graph.live[position][0]]


def squared_gain(calibration: hzo.Calibration, chain: hzo.Chain) -> float:
    """Mean growth of the cotangent's squared norm over a stage."""
    graph = chain.traced
    first = sum(calibration.norms[0, v] for v in graph.live[0])
    return float(max(first, 1e-300) ** (1 / len(graph.stages)))


def by_method(model: nn.Module, gradient: Callable[[], object]) -> GradientsByName:
    """What ``gradient()`` adds to ``.grad``, by parameter; the model is left as it was."""
    with without_trace(model, seed=0):
        gradient()
        return {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).detach().double()
            for name, p in model.named_parameters()
            if p.requires_grad
        }


def by_backprop(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Any) -> GradientsByName:
    return by_method(model, lambda: baselines.backprop(model, loss_fn, x, y))


def flattened(gradients: GradientsByName) -> Tensor:
    """One vector, in the order of the names: whoever made the gradients may have had another."""
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def exponent(x: list[int] | list[float], y: list[int] | list[float]) -> float:
    """Slope of a line through log y against log x, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])

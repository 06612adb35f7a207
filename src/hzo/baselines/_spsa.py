"""SPSA: two forward passes for a slope along random signs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo.baselines import _evaluate as ev
from hzo.baselines._registry import baseline
from hzo.baselines._two_point import two_point
from hzo.losses import LossFn


@baseline("spsa", passes=2, rate=0.0025, second_moment=lambda d: d)
def spsa(
    model: ev.Model,
    loss_fn: LossFn,
    x: Any,
    y: Any = None,
    *,
    samples: int = 1,
    mu: float | None = None,
    generator: torch.Generator | None = None,
    executor: Any = None,
) -> Tensor:
    """Simultaneous perturbation stochastic approximation; adds the estimate to ``.grad``, returns the loss.

    Estimates: ``ĝ = (L(θ + μz) − L(θ − μz)) / 2μ · z``, z independent signs; the mean over ``samples`` draws.
    (The paper divides by each zᵢ; for signs that is the same.)

    Expectation: the gradient, up to O(μ²) from third derivatives; exactly the gradient for a quadratic loss.

    Variance: with d parameters and gradient g, one draw has E|ĝ|² = d|g|² and Var ĝᵢ = |g|² − gᵢ² (μ → 0); n
    draws have 1/n of the variance, so the cosine to the gradient is about √(n/d) for n ≪ d.

    Cost: a base pass and 2·samples full forward passes. The base pass serves the returned loss and the
    buffers; the paper does without. Memory: a copy of the parameters during the passes; directions are remade
    from seeds.

    Args:
        model: module or ``hzo.Chain``.
        loss_fn: called as ``loss_fn(model(x), y)``; returns a scalar, or values whose mean is the loss.
        x: tensor, tuple (``model(*x)``) or dict (``model(**x)``).
        y: target; None calls ``loss_fn(output)``.
        samples: directions averaged.
        mu: length of the step along every coordinate; default u^(1/3)/5 for the rounding unit u (1e-3 in
            float32).
        generator: draws one seed per direction; default: torch's global random state, which that moves.
        executor: a ``concurrent.futures.Executor``, or a function that makes one for this call: all queries go out at
            once, each to a copy of the model on a worker; what they find is what they find one by one, to the bit.

    Source: J. C. Spall, Multivariate stochastic approximation using a simultaneous perturbation gradient
    approximation, IEEE Trans. Automatic Control 37(3), 1992.
    """
    return two_point(
        model, loss_fn, x, y, draw=ev.rademacher, samples=samples, mu=mu, generator=generator, executor=executor
    )

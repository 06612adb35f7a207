"""MeZO: SPSA with Gaussian directions that exist only as seeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo._options import positive
from hzo.baselines import _evaluate as ev
from hzo.baselines._registry import baseline
from hzo.baselines._two_point import two_point
from hzo.distributed import kind_of_wrapper
from hzo.errors import DistributedError
from hzo.losses import LossFn


@baseline("mezo", passes=2, rate=0.0025, second_moment=lambda d: d + 2)
def mezo(
    model: ev.Model,
    loss_fn: LossFn,
    x: Any,
    y: Any = None,
    *,
    samples: int = 1,
    mu: float | None = None,
    rate: float | None = None,
    generator: torch.Generator | None = None,
    executor: Any = None,
) -> Tensor:
    """Memory-efficient zeroth-order gradient; adds its estimate to ``.grad`` and returns the loss.

    Estimates: ``ĝ = (L(θ + μz) − L(θ − μz)) / 2μ · z``, z standard normal; the mean over ``samples`` draws.
    Parameters are perturbed in place, and z is made from its seed whenever it is needed.

    Expectation: the gradient of the loss smoothed by N(0, μ²I), which is the gradient up to O(μ²); exactly
    the gradient for a quadratic loss.

    Variance: with d parameters and gradient g, one draw has E|ĝ|² = (d + 2)|g|² and Var ĝᵢ = |g|² + gᵢ² (μ →
    0); n draws have 1/n of the variance.

    Cost: a base pass and 2·samples full forward passes. The base pass serves the returned loss and the
    buffers; the paper does without.

    Memory: during a query that of inference, and a byte for each parameter; ``rate`` also does without ``.grad``.

    Where this differs from the paper: it goes from θ + μz to θ − μz and back to θ by subtracting, which
    leaves rounding in the weights at every step. Here they come back bit for bit, also after an error: what
    rounding takes, mostly a few units in the last place, is kept, and that is the byte. Numbers that lose more
    (zeros, weights far smaller than μ) are kept one by one. A copy of the weights is made only where parameters
    share memory, or the model writes to its own (``Embedding(max_norm=)``).

    Args:
        model: module or ``hzo.Chain``.
        loss_fn: called as ``loss_fn(model(x), y)``; returns a scalar, or values whose mean is the loss.
        x: tensor, tuple (``model(*x)``) or dict (``model(**x)``).
        y: target; None calls ``loss_fn(output)``.
        samples: directions averaged.
        mu: the step; default u^(1/3)/5 for the rounding unit u (1e-3 in float32, the paper's).
        rate: take a step θ −= rate · ĝ at once, made from the seeds, and leave ``.grad`` alone.
        generator: draws one seed per direction; default: torch's global random state, which that moves.
        executor: a ``concurrent.futures.Executor``, or a function that makes one for this call: all queries go out at
            once, each to a copy of the model on a worker; what they find is what they find one by one, to the bit.

    Source: S. Malladi, T. Gao, E. Nichani, A. Damian, J. D. Lee, D. Chen, S. Arora, Fine-tuning language
    models with just forward passes, NeurIPS 2023.
    """
    if rate is not None:
        rate = positive("rate", rate, "None adds the estimate to .grad instead")
        if kind_of_wrapper(model):  # type: ignore[arg-type]
            raise DistributedError(
                "rate= takes a step with this process's estimate alone, and the model is spread over processes, which "
                "would drift apart; leave rate out and let an optimizer take the step with the averaged .grad"
            )
    return two_point(
        model,
        loss_fn,
        x,
        y,
        draw=ev.gaussian,
        samples=samples,
        mu=mu,
        generator=generator,
        executor=executor,
        moves=True,
        rate=rate,
    )

"""``smoothed``: a loss without a derivative, for hzo chains and for ordinary autograd models alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hzo.errors import InputError
from hzo.external.autograd import with_cotangent
from hzo.losses import Smoothing, cast, evaluate, smoothed_loss
from hzo.tape.history import requires_grad


def smoothed(score: Callable[..., Any], *, mu: float = 1.0, draws: int = 32, maximize: bool = False) -> Criterion:
    """Turn a score that has no derivative (an accuracy, a ranking, a simulator's verdict) into a loss to train with.

    Args:
        score: called as ``score(output, target)``, or ``score(output)`` without a target; returns one value a sample,
            shape (B,), or one number for the batch. Return values per sample wherever you can: one number for B
            samples needs B times the draws for the same accuracy of the gradient.
        mu: width of the Gaussian over which the score is smoothed, in units of the output. A larger one sees farther
            jumps and blurs them more.
        draws: pairs of random points.
        maximize: the score is to be large: the loss is its negative.

    Returns a module: ``loss = criterion(output, target); loss.backward()`` in an autograd model, and
    ``hzo.backward(model, criterion, x, y)`` without. The loss that it returns is not smoothed.

    The cotangent is an unbiased estimate of the gradient of E score(output + mu·u); its relative variance is about
    n / draws for n outputs a sample (n B / draws for one number). Cost: 2 ``draws`` score evaluations a sample,
    and for values per sample 4 that test whether each depends on its own sample alone.
    Source: Nesterov and Spokoiny (2017).

    Raises:
        InputError: mu or draws out of range, a score of another shape. NonFiniteError: a score that is not finite.
    """
    if not callable(score):
        raise InputError(f"expected a score that can be called, got a {type(score).__name__}")
    return Criterion(score, Smoothing(mu, draws), maximize)


class Criterion(nn.Module):
    """Made by ``hzo.smoothed``."""

    def __init__(self, score: Callable[..., Any], smoothing: Smoothing, maximize: bool) -> None:
        super().__init__()
        self.score = score
        self.smoothing = smoothing
        self.maximize = maximize

    def forward(self, output: Any, target: Any = None) -> Tensor:
        if torch.is_grad_enabled() and isinstance(output, Tensor) and requires_grad(output):
            return with_cotangent(lambda: smoothed_loss(self.values, output.detach(), target, self.smoothing), output)
        return self.values(output, target).mean()

    def values(self, output: Any, target: Any = None) -> Tensor:
        """What the score says of each sample or of the batch, as something to be small."""
        found = evaluate(self.score, cast(output), cast(target))
        return -found if self.maximize else found

    def extra_repr(self) -> str:
        return f"mu={self.smoothing.mu:g}, draws={self.smoothing.draws}"

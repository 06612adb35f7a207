"""Cotangents of losses that have no derivative: the gradient of their mean over a Gaussian around the output.

An accuracy, a rank, a simulator's score: piecewise constant, its derivative zero almost everywhere. Its mean over
``output + mu·u``, u from N(0, 1), is smooth, and its gradient is what differences along random directions estimate
without bias: ``E[(s(z + mu·u) − s(z − mu·u)) / (2 mu) · u]`` (Nesterov and Spokoiny, Random gradient-free minimization
of convex functions, 2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hzo._options import positive, whole
from hzo.errors import InputError
from hzo.execution import counting
from hzo.losses.checks import check_batch, check_finite, check_loss, check_rows, check_target
from hzo.losses.evaluation import TILED_ELEMENTS, LossFn, cast, check_uncoupled, evaluate, is_tiled, tile


@dataclass(frozen=True)
class Smoothing:
    """Width of the Gaussian in units of the output, and pairs of random points.

    Raises:
        InputError: a width that is not positive and finite, or no draws.
    """

    mu: float
    draws: int

    def __post_init__(self) -> None:
        positive("width mu", self.mu)
        whole("draws", self.draws)


@torch.no_grad()
def smoothed_loss(score: LossFn, output: Any, target: Any, smoothing: Smoothing) -> tuple[Tensor, Tensor]:
    """The mean of ``score(output, target)``, not smoothed, and the cotangent of its smoothed mean.

    The cotangent is float32 for narrower outputs. Cost: see ``cotangent_of``.

    Raises:
        InputError: empty batch, a target that does not fit, values of a shape that is neither ``()`` nor ``(B, ...)``.
        NonFiniteError: the score is NaN or infinite. CoupledSamplesError: values that depend on other samples.
    """
    batch = check_batch(output)
    check_target(batch, target)
    if not isinstance(output, Tensor):
        raise InputError(
            f"A smoothed loss takes one tensor as output, got a {type(output).__name__}. Let the model pick it."
        )
    # Copies: a loss of the user's own may write into what it is given.
    values = evaluate(score, cast(output), cast(target))
    check_loss(values, batch)
    check_finite(values, "at the output")
    cotangent = cotangent_of(score, cast(output, torch.float32), cast(target), values, smoothing)
    return values.mean(), cotangent.to(torch.promote_types(output.dtype, torch.float32))


def cotangent_of(loss_fn: LossFn, output: Tensor, target: Any, values: Tensor, smoothing: Smoothing) -> Tensor:
    """Cotangent of the smoothed mean of ``values = loss_fn(output, target)``, of shape (B, ...) or ().

    With values per sample each sample has its own direction and its own difference. One number for the batch is moved
    by all samples together: its estimate has B times the variance. Cost: 2 ``draws`` evaluations a sample (and 4 that
    test whether values per sample are what they seem), and random numbers of torch's generator. Relative variance:
    about n / draws, n the coordinates that a value depends on.
    """
    batch, mu, draws = output.shape[0], smoothing.mu, smoothing.draws
    apart = values.ndim > 0 and batch > 1

    def rows(moved: Tensor, copies: int) -> Tensor:
        found = evaluate(loss_fn, moved, tree_map(lambda t: tile(t, copies, batch), target))
        counting.add(loss_evaluations=copies * batch)
        check_rows(found, values, copies * batch)
        check_finite(found, _NEAR)
        return found

    def number(moved: Tensor) -> Tensor:
        found = evaluate(loss_fn, moved, cast(target)).mean()
        counting.add(loss_evaluations=batch)
        check_finite(found, _NEAR)
        return found

    if apart:
        check_uncoupled(rows, output, mu)
    copied = sum(leaf.numel() for leaf in (output, *tree_leaves(target)) if is_tiled(leaf, batch))
    at_once = max(1, TILED_ELEMENTS // (2 * copied))
    total = torch.zeros_like(output)
    for first in range(0, draws, at_once):
        u = torch.randn(min(at_once, draws - first), *output.shape, dtype=output.dtype, device=output.device)
        moved = torch.stack([output + mu * u, output - mu * u])
        if apart:
            found = rows(moved.flatten(0, 2), 2 * len(u)).reshape(2, len(u), batch, -1).mean(-1)
        else:
            found = torch.stack([number(z) for z in moved.flatten(0, 1)]).view(2, len(u), 1)
        differences = (found[0] - found[1]).to(u)
        total += (differences.view(*differences.shape, *[1] * (output.dim() - 1)) * u).sum(0)
    return total / (2 * mu * draws * (batch if apart else 1))


_NEAR = "at a random point near the output"

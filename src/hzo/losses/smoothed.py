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
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from hzo import queries
from hzo.errors import InputError
from hzo.losses.checks import check_finite
from hzo.losses.perturbed import TILED_ELEMENTS, LossFn, evaluate, is_perturbed, is_tiled, tile


@dataclass(frozen=True)
class Smoothing:
    """Width of the Gaussian in units of the output, and pairs of random points.

    Raises:
        InputError: a width that is not positive and finite, or no draws.
    """

    mu: float
    draws: int

    def __post_init__(self) -> None:
        if isinstance(self.mu, bool) or not isinstance(self.mu, (int, float)) or not 0 < self.mu < float("inf"):
            raise InputError(f"expected mu to be a positive finite width, got {self.mu!r}")
        if type(self.draws) is not int or self.draws < 1:
            raise InputError(f"expected draws to be a whole number from 1 on, got {self.draws!r}")


def smoothed(loss_fn: LossFn, output: Any, target: Any, values: Tensor, smoothing: Smoothing) -> Any:
    """Cotangent of the smoothed mean of ``values = loss_fn(output, target)``, of shape (B, ...) or ().

    With values per sample each sample has its own direction and its own difference. One number for the batch is moved
    by all samples together: its estimate has B times the variance. Cost: 2 ``draws`` evaluations a sample, and random
    numbers of torch's generator. Relative variance: about n / draws, n the coordinates that a value depends on.
    """
    batch = next(leaf.shape[0] for leaf in tree_leaves(output) if is_perturbed(leaf))
    leaves, structure = tree_flatten(output)
    apart = values.ndim > 0 and batch > 1
    tiled = sum(leaf.numel() for leaf in (*leaves, *tree_leaves(target)) if is_tiled(leaf, batch))
    at_once = max(1, TILED_ELEMENTS // max(2 * tiled, 1)) if apart else 1
    sums = [torch.zeros_like(leaf) if is_perturbed(leaf) else None for leaf in leaves]
    for first in range(0, smoothing.draws, at_once):
        draws = min(at_once, smoothing.draws - first)
        directions = [
            torch.randn(draws, *leaf.shape, dtype=leaf.dtype, device=leaf.device) if is_perturbed(leaf) else None
            for leaf in leaves
        ]
        differences = _differences(loss_fn, leaves, structure, target, directions, smoothing.mu, draws, batch, apart)
        for total, u in zip(sums, directions, strict=True):
            if total is not None and u is not None:
                weights = differences.view(draws, -1, *[1] * (u.dim() - 2)).to(u)
                total.add_((weights * u).sum(0), alpha=1 / (2 * smoothing.mu * smoothing.draws))
    share = batch if apart else 1
    return tree_unflatten([None if total is None else total / share for total in sums], structure)


def _differences(
    loss_fn: LossFn,
    leaves: list[Any],
    structure: Any,
    target: Any,
    directions: list[Tensor | None],
    mu: float,
    draws: int,
    batch: int,
    apart: bool,
) -> Tensor:
    """(draws, B) differences of values per sample, or (draws, 1) of one number."""
    copies = 2 * draws if apart else 1

    def values(sign: int) -> list[Tensor]:
        return [
            tile(leaf, draws, batch) if u is None else (leaf + sign * mu * u).flatten(0, 1)
            for leaf, u in zip(leaves, directions, strict=True)
        ]

    above, below = values(1), values(-1)
    if apart:  # both signs in one call
        both = [torch.cat([a, b]) if is_tiled(a, draws * batch) else a for a, b in zip(above, below, strict=True)]
        found = _evaluated(loss_fn, tree_unflatten(both, structure), tree_map(lambda t: tile(t, copies, batch), target))
        queries.add(loss_evaluations=copies * batch)
        if not found.ndim or found.shape[0] != copies * batch:
            raise InputError(
                f"Expected one loss value a sample for {copies * batch} samples, got shape {tuple(found.shape)}. Let "
                "the loss follow the batch size, or return its mean."
            )
        values_of_both = found.reshape(2, draws, batch, -1).mean(-1)
        return values_of_both[0] - values_of_both[1]
    pair = [_evaluated(loss_fn, tree_unflatten(side, structure), target).mean() for side in (above, below)]
    queries.add(loss_evaluations=2 * batch)
    return (pair[0] - pair[1]).view(1, 1)


def _evaluated(loss_fn: LossFn, output: Any, target: Any) -> Tensor:
    found = evaluate(loss_fn, output, target)
    check_finite(found, "at a random point near the output")
    return found

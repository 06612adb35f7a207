"""Calling a loss that nobody differentiates: on copies, on several copies of a batch at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hzo.errors import CoupledSamplesError, InputError

LossFn = Callable[..., Any]
"""``loss_fn(output, target)``, or ``loss_fn(output)`` where there is no target: a function or a module."""

# Elements of all tiled copies at once: 64 MiB in float32, 128 MiB in float64.
TILED_ELEMENTS = 2**24


def evaluate(loss_fn: LossFn, output: Any, target: Any) -> Tensor:
    """Call the loss; numbers and integer tensors become float64."""
    value = loss_fn(output) if target is None else loss_fn(output, target)
    if isinstance(value, Tensor):
        return value.detach() if value.is_floating_point() or value.is_complex() else value.to(torch.float64)
    if hasattr(value, "__array__") and not isinstance(value, (int, float)):  # NumPy's
        value = torch.as_tensor(value)
        return value if value.is_floating_point() else value.to(torch.float64)
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64)
    raise InputError(f"Expected a loss that returns a tensor or a number; got {type(value).__name__}. Return its mean.")


def cast(tree: Any, at_least: torch.dtype | None = None) -> Any:
    """Copy all tensors of a pytree; floating ones that are narrower than ``at_least`` are widened to it."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = leaf.dtype
        if at_least is not None and leaf.is_floating_point():
            dtype = torch.promote_types(dtype, at_least)
        return leaf.detach().to(dtype, copy=True)

    return tree_map(copy, tree)


def check_uncoupled(query: Callable[[Tensor, int], Tensor], output: Tensor, step: float) -> None:
    """Evaluate the batch beside itself and beside a moved copy: the values of the batch must be the same.

    Raises:
        CoupledSamplesError: they are not.
    """
    batch = output.shape[0]
    expected = query(torch.cat([output, output]), 2)[:batch]
    difference = (query(torch.cat([output, output / 2 + step]), 2)[:batch] - expected).abs().max()
    # Only the order of sums may differ, inside a loss that may go through float32.
    if difference > 64 * torch.finfo(torch.float32).eps * expected.abs().max():
        raise CoupledSamplesError(
            "Expected loss values that depend on their own sample only; they moved by "
            f"{float(difference):.3g} when other samples changed (or the loss is random). Return the mean: "
            "every sample is then perturbed by itself."
        )


def is_tiled(leaf: Any, batch: int) -> bool:
    """Whether a leaf has a row for every sample."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def tile(leaf: Any, copies: int, batch: int) -> Any:
    """The rows of a leaf that has one for every sample, so many times."""
    return leaf.repeat(copies, *[1] * (leaf.ndim - 1)) if is_tiled(leaf, batch) else leaf

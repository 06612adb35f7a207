"""Cotangents of a loss of which nothing is known: central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from hzo.errors import CoupledSamplesError, InputError
from hzo.execution import counting
from hzo.losses.checks import check_finite, check_rows

LossFn = Callable[..., Any]

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


def precise(loss_fn: LossFn, output: Any, target: Any, batch: int) -> tuple[Any, Any]:
    """Output and target in the widest dtype that the loss computes in: float64 if possible, else at least
    float32.

    Float64 counts as possible where the loss accepts it and answers to a change that float32 cannot hold: a
    loss that goes through float32 inside does not, and a step made for float64 would drown in its rounding.
    """
    if all(leaf.dtype is torch.float64 for leaf in tree_leaves(output) if is_perturbed(leaf)):
        return cast(output), cast(target)

    def nudge(leaf: Any) -> Any:
        if not is_perturbed(leaf):
            return leaf
        # Signs and sizes vary so that a loss which ignores the scale of its input still moves.
        pattern = torch.arange(leaf.numel(), device=leaf.device, dtype=leaf.dtype).cos().view(leaf.shape)
        return leaf * (1 + 2.0**-30 * pattern)

    try:
        wide, wide_target = cast(output, torch.float64), cast(target, torch.float64)
        at = evaluate(loss_fn, cast(wide), cast(wide_target))
        counting.add(loss_evaluations=batch)
        near = evaluate(loss_fn, tree_map(nudge, wide), cast(wide_target))
        counting.add(loss_evaluations=batch)
        if not torch.equal(at, near):
            return wide, wide_target
    except (RuntimeError, TypeError, ValueError):
        pass  # a loss, or a device, without float64
    return cast(output, torch.float32), cast(target, torch.float32)


def is_perturbed(leaf: Any) -> bool:
    """Whether a leaf of the output gets a cotangent: floating-point tensors do."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def per_sample(loss_fn: LossFn, output: Any, target: Any, values: Tensor) -> Any:
    """Cotangent of ``values.mean()``, ``values = loss_fn(output, target)`` of shape (B, ...), B > 1.

    2n + 4 evaluations a sample for n coordinates, as many at once as ``TILED_ELEMENTS`` allows. Non-floating
    leaves get None. Raises CoupledSamplesError where a value changes with another sample's output.
    """
    batch = values.shape[0]
    leaves, structure = tree_flatten(output)
    coordinates = sum(leaf.numel() for leaf in leaves if is_perturbed(leaf)) // batch
    copied = sum(leaf.numel() for leaf in (*leaves, *tree_leaves(target)) if is_tiled(leaf, batch))
    at_once = max(1, TILED_ELEMENTS // (2 * copied))

    def query(index: int, perturbed: Tensor, copies: int) -> Tensor:
        tiled = [tile(leaf, copies, batch) for leaf in leaves]
        tiled[index] = perturbed.reshape(-1, *leaves[index].shape[1:])
        result = evaluate(loss_fn, tree_unflatten(tiled, structure), tree_map(lambda t: tile(t, copies, batch), target))
        counting.add(loss_evaluations=copies * batch)
        check_rows(result, values, copies * batch)
        check_finite(result, "within a finite-difference step of the output")
        return result

    def slopes(index: int, leaf: Tensor) -> Tensor:
        flat, h = leaf.reshape(batch, -1), _step(leaf, coordinates)
        gradient = torch.empty_like(flat)
        for first in range(0, flat.shape[1], at_once):
            columns = torch.arange(first, min(first + at_once, flat.shape[1]), device=leaf.device)
            copy = torch.arange(len(columns), device=leaf.device)
            tiled = flat.repeat(2, len(columns), 1, 1)  # (sign, coordinate, sample, leaf)
            tiled[0, copy, :, columns] += h
            tiled[1, copy, :, columns] -= h
            moved = tiled[0, copy, :, columns] - tiled[1, copy, :, columns]
            result = query(index, tiled, 2 * len(columns)).reshape(2, len(columns), batch, -1)
            gradient[:, columns] = ((result[0] - result[1]).mean(-1).to(moved) / moved / batch).T
        return gradient.view(leaf.shape)

    check_uncoupled(query, leaves, lambda leaf: _step(leaf, coordinates), batch)
    found = [slopes(i, leaf) if is_perturbed(leaf) else None for i, leaf in enumerate(leaves)]
    return tree_unflatten(found, structure)


def one_number(loss_fn: LossFn, output: Any, target: Any, batch: int) -> Any:
    """Cotangent of the mean of what the loss returns, by 2Bn evaluations of all B samples."""
    leaves, structure = tree_flatten(output)
    coordinates = sum(leaf.numel() for leaf in leaves if is_perturbed(leaf))

    def query(index: int, perturbed: Tensor) -> Tensor:
        inputs = [cast(leaf) for leaf in leaves]
        inputs[index] = perturbed.view(leaves[index].shape)
        result = evaluate(loss_fn, tree_unflatten(inputs, structure), cast(target)).mean()
        counting.add(loss_evaluations=batch)
        check_finite(result, "within a finite-difference step of the output")
        return result

    def slopes(index: int, leaf: Tensor) -> Tensor:
        flat, h = leaf.reshape(-1), _step(leaf, coordinates)
        gradient = torch.empty_like(flat)
        for i in range(flat.numel()):
            plus, minus = flat.clone(), flat.clone()
            plus[i] += h
            minus[i] -= h
            moved = plus[i] - minus[i]  # before the queries: a loss may write into what it is given
            gradient[i] = (query(index, plus) - query(index, minus)).to(moved) / moved
        return gradient.view(leaf.shape)

    found = [slopes(i, leaf) if is_perturbed(leaf) else None for i, leaf in enumerate(leaves)]
    return tree_unflatten(found, structure)


def check_uncoupled(
    query: Callable[[int, Tensor, int], Tensor], leaves: list[Any], step: Callable[[Tensor], float], batch: int
) -> None:
    """Evaluate the batch beside itself and beside a moved copy: the values of the batch must be the same.

    Raises:
        CoupledSamplesError: they are not.
    """
    index = next(i for i, leaf in enumerate(leaves) if is_perturbed(leaf))
    leaf = leaves[index]
    moved = leaf / 2 + step(leaf)
    expected = query(index, torch.cat([leaf, leaf]), 2)[:batch]
    difference = (query(index, torch.cat([leaf, moved]), 2)[:batch] - expected).abs().max()
    # Only the order of sums may differ, inside a loss that may go through float32.
    if difference > 64 * torch.finfo(torch.float32).eps * expected.abs().max():
        raise CoupledSamplesError(
            "Expected loss values that depend on their own sample only; they moved by "
            f"{float(difference):.3g} when other samples changed (or the loss is random). Return the mean: "
            "every sample is then perturbed by itself."
        )


def _step(leaf: Tensor, coordinates: int) -> float:
    # Rounding of the loss over the share of one coordinate in it, eps·N/h, against curvature, h².
    relative = min(0.05, (torch.finfo(leaf.dtype).eps * coordinates) ** (1 / 3))
    rms = float(leaf.square().mean().sqrt())
    return float(relative * (rms or 1.0))


def is_tiled(leaf: Any, batch: int) -> bool:
    """Whether a leaf has a row for every sample."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def tile(leaf: Any, copies: int, batch: int) -> Any:
    """The rows of a leaf that has one for every sample, so many times."""
    return leaf.repeat(copies, *[1] * (leaf.ndim - 1)) if is_tiled(leaf, batch) else leaf

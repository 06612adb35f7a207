"""What is asked of an output, a target and a loss before anything is computed from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hzo.errors import InputError, NonFiniteError
from hzo.tape.state import captured


def check_batch(output: Any) -> int:
    """The batch size that all tensors of ``output`` share. InputError where there is none, or it is zero."""
    floating = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not floating:
        raise InputError("The loss needs an output with a floating-point tensor; got none. Return the model's scores.")
    shapes = [tuple(leaf.shape) for leaf in floating]
    if len({shape[:1] for shape in shapes} | {()}) != 2:  # () is the batch size of a tensor without dimensions
        raise InputError(
            f"Every output must have the batch as its first dimension; got shapes {shapes}. "
            "Move the batch to the front, or unsqueeze(0) a single sample."
        )
    if not all(leaf.numel() for leaf in floating):
        raise InputError(f"Expected a batch of at least one sample; got outputs {shapes}. Skip empty batches.")
    return shapes[0][0]


def check_target(batch: int, target: Any) -> None:
    """InputError where ``target`` is one tensor with another batch size."""
    if isinstance(target, Tensor) and target.ndim and target.shape[0] != batch:
        raise InputError(
            f"Expected a target of batch size {batch}, as the output has; got shape {tuple(target.shape)}. "
            "Give both the same samples; if the target has no batch dimension by design, let the loss close "
            "over it and pass target=None."
        )


def check_loss(values: Tensor, batch: int) -> None:
    """InputError where a loss is neither a scalar nor has the batch as leading dimension."""
    if values.is_complex() or (values.ndim and values.shape[0] != batch):
        raise InputError(
            f"Expected a real loss of shape () or ({batch}, ...), one value a sample; got "
            f"{tuple(values.shape)} of {values.dtype}. Reduce the other dimensions inside the loss."
        )


def check_finite(values: Tensor, where: str) -> None:
    """NonFiniteError where a loss is NaN or infinite; ``where`` ends the sentence."""
    if not captured(values) and not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"Expected a finite loss, got NaN or infinity {where}. Look for non-finite outputs, a target "
            "of ignored classes only, or a logarithm of zero; lower the learning rate if training diverges."
        )


def check_rows(found: Tensor, values: Tensor, samples: int) -> None:
    """InputError where a loss that gave ``values`` for a batch does not give one a sample for another."""
    if not found.ndim or found.shape[0] != samples:
        raise InputError(
            f"Expected one loss value a sample for {samples} samples, got shape {tuple(found.shape)} (for "
            f"{len(values)} it was {tuple(values.shape)}). Let the loss follow the batch size, or return its mean."
        )

"""The cotangent of the loss: where every sweep starts.

Four ways, none of them with autograd:

1. *Closed forms* (textbook) for the usual losses, recognised by exact type or function. No evaluations. They
   assume that the loss computes what its name says.
2. *Values per sample*: the loss returns ``(B,)`` or ``(B, ...)``. Coordinates are perturbed by central
   differences, many at once, in every sample at once.
3. *Smoothed*, where the loss says so (``hzo.smoothed``): differences along random directions.
4. *One number*: it may mix samples, so every coordinate of every sample is perturbed by itself, and each
   query costs a whole batch. Return values per sample wherever the loss allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hzo.errors import InputError
from hzo.losses.checks import check_batch, check_finite, check_loss, check_target
from hzo.losses.closed_forms import checked, find_closed_form
from hzo.losses.perturbed import cast, evaluate, one_number, per_sample, precise
from hzo.losses.smoothed import Smoothing, smoothed

__all__ = ["loss_and_cotangent"]


@torch.no_grad()
def loss_and_cotangent(loss_fn: Callable[..., Any], output: Any, target: Any = None) -> tuple[Tensor, Any]:
    """Return the loss and its gradient with respect to ``output``.

    Args:
        loss_fn: called as ``loss_fn(output, target)``, or ``loss_fn(output)`` when ``target`` is None.
            Returns a scalar, or a tensor with leading dimension B: then its mean is the loss.
        output: tensor ``(B, ...)``; for losses without a closed form also a pytree of such tensors.
        target: any pytree. Way 2 tiles each of its tensors whose leading dimension is B, and passes on the
            others.

    Returns:
        ``(loss, cotangent)``: the scalar that ``loss_fn`` returned (the mean where it returned more), and a
        tensor of the shape of ``output`` (a pytree like it; None in place of what is not floating point), in
        float32 for bfloat16 and float16 outputs and in the dtype of the output otherwise.

    Cost: closed forms none; values per sample 2n + 4 loss evaluations a sample, for n output coordinates; one
    number 2Bn a sample; two more where float64 is tried. Differences are taken in float64 where the loss is
    found to compute in it, else in float32: the loss is called with outputs and floating targets of that
    dtype. The step is ``min(0.05, cbrt(eps · N)) · rms(output)``, N the number of coordinates that the
    returned value may average over.
    Source: textbook.

    Raises:
        InputError: empty batch, target that does not fit, loss of a shape that is neither ``()`` nor ``(B,
        ...)``.
        NonFiniteError: the loss is NaN or infinite, at the output or within a step of it.
        CoupledSamplesError: values per sample that depend on other samples.
    """
    known = find_closed_form(loss_fn)
    if known is not None:
        form, options = known
        z, t = checked(form, options, output, target)
        loss = evaluate(loss_fn, z, t).mean()
        check_finite(loss, "at the output")
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return loss, form.cotangent(z, t.to(z) if t.is_floating_point() else t, **options)

    batch = check_batch(output)
    check_target(batch, target)
    smoothing = getattr(loss_fn, "smoothing", None)
    if isinstance(smoothing, Smoothing):
        loss_fn = loss_fn.values  # type: ignore[attr-defined]  # a Criterion; what it returns itself is their mean
    # Copies: a loss of the user's own may write into what it is given.
    values = evaluate(loss_fn, cast(output), cast(target))
    check_loss(values, batch)
    check_finite(values, "at the output")
    if isinstance(smoothing, Smoothing):
        if not isinstance(output, Tensor):
            raise InputError(
                f"A smoothed loss takes one tensor as output, got a {type(output).__name__}. Let the model pick it."
            )
        cotangent = smoothed(loss_fn, cast(output, torch.float32), cast(target), values, smoothing)
        return values.mean(), _like(cotangent, output)
    wide, wide_target = precise(loss_fn, output, target, batch)
    if values.ndim and batch > 1:
        cotangent = per_sample(loss_fn, wide, wide_target, values)
    else:
        cotangent = one_number(loss_fn, wide, wide_target, batch)
    return values.mean(), tree_map(_like, cotangent, output)


def _like(cotangent: Any, output: Any) -> Any:
    return None if cotangent is None else cotangent.to(torch.promote_types(output.dtype, torch.float32))

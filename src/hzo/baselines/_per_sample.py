"""What each sample contributes to a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo.baselines._evaluate import Problem
from hzo.errors import InputError
from hzo.losses import check_finite, check_loss, checked, evaluate, find_known


def contributions(p: Problem, output: Any) -> Tensor:
    """The loss as a sum over samples, ``(B,)``; float32 at least.

    Known are torch's common losses (see ``hzo.losses``), and any that returns values
    of shape ``(B, ...)``, whose mean is the loss.

    Raises:
        InputError: a loss of another kind, which returns one number for several samples.
    """
    known = find_known(p.loss_fn)
    if known is None:
        values = evaluate(p.loss_fn, output, p.target)
        check_loss(values, p.batch)
        if values.ndim == 0 and p.batch > 1:
            raise InputError(
                "expected a loss that tells samples apart, got one number for a batch: let it return values "
                "of shape (B,), whose mean is the loss, use a common loss of torch, or pass per_sample=False"
            )
        share: Tensor | float = max(1, values.numel())
    else:
        form, options = known
        z, t = checked(form, options, output, p.target)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        reduction = options.get("reduction", "mean")
        own = {name: _wide(value, z) for name, value in options.items()}
        values = form.function(z, _wide(t, z), **{**own, "reduction": "none"})
        share = _mean_over(z, t, own) if reduction == "mean" and form.classes else values.numel()
        share = 1 if reduction == "sum" else share
    check_finite(values, "at the parameters or within a step of them")
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.reshape(p.batch, -1).sum(1) / share


def _wide(value: Any, like: Tensor) -> Any:
    return value.to(like) if isinstance(value, Tensor) and value.is_floating_point() else value


def _mean_over(z: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor | float:
    """What the mean of a loss over classes divides by: the weight of all targets that are not ignored."""
    if t.is_floating_point():
        return z.numel() / z.shape[1]
    kept = t[t != options.get("ignore_index", -100)].long()
    weight = options.get("weight")
    return kept.numel() if weight is None else weight[kept].sum()

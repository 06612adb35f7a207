"""Closed-form cotangents of the usual losses, and the exact types and functions that have one.

Each form is the derivative that a textbook gives, in the dtype of the output it is handed; a form assumes
that the loss computes what its name says, so a subclass, a hook or an attribute in place of a method rules it
out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.errors import InputError
from hzo.losses.checks import check_batch, check_target
from hzo.tracing import untouched


def _scale(reduction: str, mean_over: Tensor | float, values: int) -> Tensor | float:
    """Factor from the gradient of one value to that of the loss; unreduced values count as their mean."""
    return {"mean": 1.0 / mean_over, "sum": 1.0, "none": 1.0 / values}[reduction]


def _class_masses(
    z: Tensor, t: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor | float]:
    """T with loss = −Σ_c T_c log p_c at every position, and what reduction "mean" divides the sum by."""
    C = z.shape[1]
    w = (torch.ones(C, device=z.device, dtype=z.dtype) if weight is None else weight.to(z)).view(
        1, C, *[1] * (z.ndim - 2)
    )
    if t.is_floating_point():
        return w * (t * (1 - smoothing) + smoothing / C), z.numel() / C
    kept = (t != ignore_index).unsqueeze(1)
    hot = torch.zeros_like(z).scatter_(1, torch.where(kept, t.unsqueeze(1).long(), 0), 1.0) * kept
    hot *= w
    return hot * (1 - smoothing) + kept * w * (smoothing / C), hot.sum()


def _cross_entropy(
    z: Tensor,
    t: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    mass, mean_over = _class_masses(z, t, weight, ignore_index, label_smoothing)
    slope = z.softmax(1) * mass.sum(1, keepdim=True) - mass
    return slope * _scale(reduction, mean_over, z.numel() // z.shape[1])


def _nll(
    z: Tensor, t: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    mass, mean_over = _class_masses(z, t, weight, ignore_index, 0.0)
    return -mass * _scale(reduction, mean_over, z.numel() // z.shape[1])


def _bce_with_logits(
    z: Tensor,
    t: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    positive = t if pos_weight is None else t * pos_weight.to(z)
    slope = (1 - t) * z.sigmoid() - positive * (-z).sigmoid()
    return (slope if weight is None else slope * weight.to(z)) * _scale(reduction, z.numel(), z.numel())


def _mse(z: Tensor, t: Tensor, *, reduction: str = "mean") -> Tensor:
    return 2 * (z - t) * _scale(reduction, z.numel(), z.numel())


def _l1(z: Tensor, t: Tensor, *, reduction: str = "mean") -> Tensor:
    return (z - t).sign() * _scale(reduction, z.numel(), z.numel())


def _smooth_l1(z: Tensor, t: Tensor, *, reduction: str = "mean", beta: float = 1.0) -> Tensor:
    slope = ((z - t) / beta).clamp(-1, 1) if beta else (z - t).sign()
    return slope * _scale(reduction, z.numel(), z.numel())


def _huber(z: Tensor, t: Tensor, *, reduction: str = "mean", delta: float = 1.0) -> Tensor:
    return (z - t).clamp(-delta, delta) * _scale(reduction, z.numel(), z.numel())


@dataclass(frozen=True)
class ClosedForm:
    function: Callable[..., Any]
    module: type[nn.Module]
    options: tuple[str, ...]  # keywords of the function, and attributes of the module
    cotangent: Callable[..., Tensor]
    classes: bool = False  # dimension 1 of the output is the class


_CLASS_OPTIONS = ("weight", "ignore_index", "reduction")
TABLE = (
    ClosedForm(F.cross_entropy, nn.CrossEntropyLoss, (*_CLASS_OPTIONS, "label_smoothing"), _cross_entropy, True),
    ClosedForm(F.nll_loss, nn.NLLLoss, _CLASS_OPTIONS, _nll, True),
    ClosedForm(
        F.binary_cross_entropy_with_logits,
        nn.BCEWithLogitsLoss,
        ("weight", "pos_weight", "reduction"),
        _bce_with_logits,
    ),
    ClosedForm(F.mse_loss, nn.MSELoss, ("reduction",), _mse),
    ClosedForm(F.l1_loss, nn.L1Loss, ("reduction",), _l1),
    ClosedForm(F.smooth_l1_loss, nn.SmoothL1Loss, ("reduction", "beta"), _smooth_l1),
    ClosedForm(F.huber_loss, nn.HuberLoss, ("reduction", "delta"), _huber),
)


def find_closed_form(loss_fn: Callable[..., Any]) -> tuple[ClosedForm, dict[str, Any]] | None:
    """The closed form of a loss and its options; None for what the table lacks, or is not untouched."""
    if isinstance(loss_fn, nn.Module):
        for form in TABLE:
            if type(loss_fn) is form.module and untouched(loss_fn):
                return form, {name: getattr(loss_fn, name) for name in form.options}
        return None
    function, options = loss_fn, {}
    if type(loss_fn) is functools.partial and not loss_fn.args:
        function, options = loss_fn.func, dict(loss_fn.keywords)
    for form in TABLE:
        if function is form.function and set(options) <= set(form.options):
            return form, options
    return None


def checked(form: ClosedForm, options: dict[str, Any], z: Any, t: Any) -> tuple[Tensor, Tensor]:
    """Output and target of a closed form, or an InputError that says what does not fit."""
    name = form.module.__name__
    if not isinstance(z, Tensor) or not isinstance(t, Tensor):
        raise InputError(
            f"{name} expected a tensor as output and one as target; got {type(z).__name__} and "
            f"{type(t).__name__}. Wrap it in a function of (output, target) that picks the two to compare."
        )
    batch = check_batch(z)
    check_target(batch, t)
    if not form.classes or t.is_floating_point():
        if t.shape != z.shape:
            hint = " (indices of classes must be int64: target.long())" if form.classes else ""
            raise InputError(
                f"{name} expected a target of the output's shape {tuple(z.shape)}, got {tuple(t.shape)}"
                f"{hint}. Reshape one of them: broadcasting would compare every sample with every other."
            )
        if form.function is F.nll_loss:
            raise InputError(f"{name} expected int64 class indices, got {t.dtype}. Pass target.long().")
        return z, t
    expected = (batch, *z.shape[2:])
    if z.ndim < 2 or tuple(t.shape) != expected:
        raise InputError(
            f"{name} expected output (B, C, ...) and class indices (B, ...); got output "
            f"{tuple(z.shape)} and target {tuple(t.shape)}. Give the output a class dimension at 1, and the "
            "target the shape without it."
        )
    if t.dtype not in (torch.int64, torch.uint8):
        raise InputError(f"{name} expected int64 class indices, got {t.dtype}. Pass target.long().")
    kept = t[t != options.get("ignore_index", -100)]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= z.shape[1]):
        raise InputError(
            f"{name} expected class indices from 0 to {z.shape[1] - 1}, got {int(kept.min())} to "
            f"{int(kept.max())}. Widen the last layer, renumber the classes, or set ignore_index."
        )
    return z, t

"""Losses of torch that are known by name: what their target must be, and what they say of each sample."""

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
from hzo.reverse import loss_of
from hzo.tracing import untouched


@dataclass(frozen=True)
class KnownLoss:
    """A loss of torch: its function, its module, and whether dimension 1 of the output is the class."""

    function: Callable[..., Any]
    module: type[nn.Module]
    options: tuple[str, ...]  # keywords of the function, and attributes of the module
    classes: bool = False


_CLASS_OPTIONS = ("weight", "ignore_index", "reduction")
TABLE = (
    KnownLoss(F.cross_entropy, nn.CrossEntropyLoss, (*_CLASS_OPTIONS, "label_smoothing"), True),
    KnownLoss(F.nll_loss, nn.NLLLoss, _CLASS_OPTIONS, True),
    KnownLoss(F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, ("weight", "pos_weight", "reduction")),
    KnownLoss(F.mse_loss, nn.MSELoss, ("reduction",)),
    KnownLoss(F.l1_loss, nn.L1Loss, ("reduction",)),
    KnownLoss(F.smooth_l1_loss, nn.SmoothL1Loss, ("reduction", "beta")),
    KnownLoss(F.huber_loss, nn.HuberLoss, ("reduction", "delta")),
)


def find_known(loss_fn: Callable[..., Any]) -> tuple[KnownLoss, dict[str, Any]] | None:
    """The loss of torch that this is, and its options; None for any other, and for one that somebody altered."""
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


def checked(form: KnownLoss, options: dict[str, Any], z: Any, t: Any) -> tuple[Tensor, Tensor]:
    """Output and target of such a loss, or an InputError that says what does not fit."""
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


def fitting_loss(loss_fn: Callable[..., Any], output: Any, target: Any) -> Tensor:
    """Call a loss, where targets of torch's own losses must fit exactly.

    Raises:
        InputError: the target does not fit, or the loss returned no tensor.
    """
    known = find_known(loss_fn)
    if known is not None:
        checked(*known, output, target)
    return loss_of(loss_fn, output, target)

"""Losses that PyTorch computes in one call, by its kernels for their derivatives.

The others (``cross_entropy``, ``l1_loss``, ``kl_div``, ``cosine_embedding_loss``, …) arrive as the calls that they
consist of. A target that is a weight (a learned prototype) is not read for the input's cotangent: the loss of every
element is measured on both sides of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hzo.rules.arithmetic import hidden, slope_by_difference
from hzo.rules.base import Call, Cotangents, Key, unbroadcast, vjp

aten = torch.ops.aten

_NONE, _MEAN, _SUM = 0, 1, 2
"""Values of ``reduction``."""


def _spread(g: Tensor, reduction: int, count: int) -> Tensor:
    """The cotangent of each element's loss."""
    return g / count if reduction == _MEAN else g


def _shape(x: Tensor, target: Tensor) -> torch.Size:
    return torch.Size(torch.broadcast_shapes(x.shape, target.shape))  # type: ignore[no-untyped-call]


def _of_difference(call: Call, backward: Callable[..., Tensor], reduction: int, *options: Any) -> Cotangents:
    """A symmetric loss of ``a - b``: each operand by the same kernel, with their places exchanged for the second."""
    found: dict[Key, Tensor] = {}
    shape = _shape(*call.args[:2])
    for of, by in ((0, 1), (1, 0)):
        if not call.needs(of):
            continue
        x, other = call.args[of], call.args[by]
        if hidden(call, of, by):
            unreduced: dict[Key, Any] = {2 if len(call.args) > 2 else "reduction": _NONE}
            slope = slope_by_difference(call, of, shape, unreduced)
            carried = _spread(call.grad, reduction, shape.numel()) * slope
        else:
            carried = backward(call.grad, x, other, reduction, *options)
        found[of] = unbroadcast(carried, x)
    return found


@vjp(aten.mse_loss.default, measures=True)
def mse_loss(call: Call) -> Cotangents:
    """The square of the difference."""
    return _of_difference(call, aten.mse_loss_backward, call.arg(2, "reduction", _MEAN))


@vjp(aten.smooth_l1_loss.default, measures=True)
def smooth_l1_loss(call: Call) -> Cotangents:
    """The square for small differences, the absolute value for others; divided by ``beta``."""
    beta = call.arg(3, "beta", 1.0)
    return _of_difference(call, aten.smooth_l1_loss_backward, call.arg(2, "reduction", _MEAN), beta)


@vjp(aten.huber_loss.default, measures=True)
def huber_loss(call: Call) -> Cotangents:
    """The square for small differences, the absolute value for others."""
    delta = call.arg(3, "delta", 1.0)
    return _of_difference(call, aten.huber_loss_backward, call.arg(2, "reduction", _MEAN), delta)


@vjp(aten.nll_loss_forward.default, lean=True)
def nll_loss(call: Call) -> Cotangents:
    """The negative log-likelihood of classes; the sum of their weights is the second result."""
    return {0: aten.nll_loss_backward(call.grad, *call.args, call.out[1])}


@vjp(aten.nll_loss2d_forward.default)
def nll_loss2d(call: Call) -> Cotangents:
    """The negative log-likelihood of classes of pixels."""
    return {0: aten.nll_loss2d_backward(call.grad, *call.args, call.out[1])}


@vjp(aten.binary_cross_entropy.default)
def binary_cross_entropy(call: Call) -> Cotangents:
    """Of probabilities."""
    p, target = call.args[:2]
    weight, reduction = call.arg(2, "weight"), call.arg(3, "reduction", _MEAN)
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = aten.binary_cross_entropy_backward(call.grad, p, target, weight, reduction)
    if call.needs(1):
        g = call.grad if weight is None else call.grad * weight
        logits = p.log().clamp(min=-100) - (-p).log1p().clamp(min=-100)
        found[1] = _spread(-g * logits, reduction, target.numel())
    return found


@vjp(aten.binary_cross_entropy_with_logits.default)
def binary_cross_entropy_with_logits(call: Call) -> Cotangents:
    """Of logits; ``pos_weight`` multiplies what belongs to positive targets."""
    x, target = call.args[:2]
    weight, positive, reduction = call.arg(2, "weight"), call.arg(3, "pos_weight"), call.arg(4, "reduction", _MEAN)
    g = call.grad if weight is None else call.grad * weight
    g = _spread(g, reduction, _shape(x, target).numel())
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        if positive is None:
            slope = x.sigmoid() - target
        else:
            weighted = positive * target
            slope = (weighted + 1 - target) * x.sigmoid() - weighted
        found[0] = unbroadcast(g * slope, x)
    if call.needs(1):
        slope = -x if positive is None else F.logsigmoid(-x) - positive * F.logsigmoid(x)
        found[1] = unbroadcast(g * slope, target)
    return found


@vjp(aten.soft_margin_loss.default)
def soft_margin_loss(call: Call) -> Cotangents:
    """``log(1 + exp(-target x))``."""
    x, target = call.args[:2]
    return {0: aten.soft_margin_loss_backward(call.grad, x, target, call.arg(2, "reduction", _MEAN))}


@vjp(aten.multi_margin_loss.default)
def multi_margin_loss(call: Call) -> Cotangents:
    """The hinge of every wrong class."""
    x, target = call.args[:2]
    p, margin, weight = call.arg(2, "p", 1), call.arg(3, "margin", 1), call.arg(4, "weight")
    reduction = call.arg(5, "reduction", _MEAN)
    return {0: aten.multi_margin_loss_backward(call.grad, x, target, p, margin, weight, reduction)}


@vjp(aten.multilabel_margin_loss_forward.default)
def multilabel_margin_loss(call: Call) -> Cotangents:
    """The hinge between right and wrong classes; which are right is the second result."""
    x, target, reduction = call.args
    return {0: aten.multilabel_margin_loss_backward(call.grad, x, target, reduction, call.out[1])}


@vjp(aten._ctc_loss.default, aten._ctc_loss.Tensor)
def ctc_loss(call: Call) -> Cotangents:
    """Connectionist temporal classification, from the logarithms of the forward variables, its second result."""
    log_probs, targets, inputs, lengths = call.args[:4]
    blank, zero_infinity = call.arg(4, "blank", 0), call.arg(5, "zero_infinity", False)
    loss, alpha = call.out
    carried = aten._ctc_loss_backward(call.grad, log_probs, targets, inputs, lengths, loss, alpha, blank, zero_infinity)
    return {0: carried}


@vjp(aten._cudnn_ctc_loss.default, aten._cudnn_ctc_loss.Tensor)
def cudnn_ctc_loss(call: Call) -> Cotangents:
    """The same by cuDNN, which computes the gradient with the loss: its second result."""
    loss, gradient = call.out
    assert loss is not None
    assert gradient is not None
    carried = gradient * call.grad[:, None]
    zero_infinity = call.args[6]
    return {0: carried.masked_fill((loss == 0)[:, None], 0) if zero_infinity else carried}

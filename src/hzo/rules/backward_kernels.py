"""PyTorch's own backward operators, where a derivative was taken inside the model: the derivatives of derivatives.

They are linear in the cotangent that they were given, mostly by the same kernel; what they say of the other operand is
its second derivative; zero where a derivative has a kink, as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hzo.rules.arithmetic import conj
from hzo.rules.base import Call, Cotangents, Key, unbroadcast, vjp

aten = torch.ops.aten

Curvature = Callable[..., Tensor]


def _second_order(target: Any, curvature: Curvature | None, operand: int = 1) -> None:
    """Register a rule for ``target(g, x, *options)``, linear in ``g``.

    Args:
        curvature: the second derivative, from ``x`` and the options; None where it is zero wherever it exists.
        operand: the place of ``x``; of ``elu_backward`` it comes last.
    """

    def rule(call: Call) -> Cotangents:
        inner, *rest = call.args
        found: dict[Key, Tensor] = {}
        if call.needs(0):
            found[0] = target(call.grad, *rest, **call.kwargs)
        if curvature is not None and call.needs(operand):
            others = [a for k, a in enumerate(rest, 1) if k != operand]
            found[operand] = call.grad * inner * curvature(call.args[operand], *others, **call.kwargs)
        return found

    vjp(target)(rule)


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":  # Φ'' x + 2 Φ' = φ (2 - x²)
        return (2 - x * x) * (x * x / -2).exp() / math.sqrt(2 * math.pi)
    a, c = math.sqrt(2 / math.pi), 0.044715
    tanh = (a * (x + c * x**3)).tanh()
    slope, bend = a * (1 + 3 * c * x * x), a * 6 * c * x  # of what tanh is taken of
    cosh = 1 - tanh * tanh
    return cosh * slope + x / 2 * cosh * (bend - 2 * tanh * slope * slope)


def _silu(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _mish(x: Tensor) -> Tensor:
    s, t = x.sigmoid(), aten.softplus(x).tanh()
    first = (1 - t * t) * s
    second: Tensor = first * (1 - s - 2 * t * s)
    bend: Tensor = 2 * first + x * second
    return bend


def _elu(x: Tensor, alpha: float, scale: float, input_scale: float, of_result: bool) -> Tensor:
    below = (x + alpha * scale) if of_result else alpha * scale * (x * input_scale).exp()
    return (below * input_scale**2).masked_fill(x > 0, 0)


def _softplus(x: Tensor, beta: float, threshold: float) -> Tensor:
    s = (x * beta).sigmoid()
    return (s * (1 - s) * beta).masked_fill(x * beta > threshold, 0)


def _log_sigmoid(x: Tensor, _: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (s - 1)


def _hardswish(x: Tensor) -> Tensor:
    return ((x > -3) & (x < 3)).to(x.dtype) / 3


def _logit(x: Tensor, eps: float | None = None) -> Tensor:
    curvature = (2 * x - 1) / (x * (1 - x)).square()
    low, high = (0.0, 1.0) if eps is None else (eps, 1 - eps)
    return curvature.masked_fill((x < low) | (x > high), 0)


_second_order(aten.gelu_backward.default, _gelu)
_second_order(aten.silu_backward.default, _silu)
_second_order(aten.mish_backward.default, _mish)
_second_order(aten.elu_backward.default, _elu, operand=5)
_second_order(aten.softplus_backward.default, _softplus)
_second_order(aten.log_sigmoid_backward.default, _log_sigmoid)
_second_order(aten.hardswish_backward.default, _hardswish)
_second_order(aten.logit_backward.default, _logit)
for _kernel in (
    aten.hardsigmoid_backward.default,
    aten.hardshrink_backward.default,
    aten.hardtanh_backward.default,
    aten.softshrink_backward.default,
    aten.threshold_backward.default,
):
    _second_order(_kernel, None)


@vjp(aten.sigmoid_backward.default)
def sigmoid_backward(call: Call) -> Cotangents:
    """``g y (1 - y)``."""
    return _of_result(call, aten.sigmoid_backward, lambda y: 1 - 2 * conj(y))


@vjp(aten.tanh_backward.default)
def tanh_backward(call: Call) -> Cotangents:
    """``g (1 - y²)``."""
    return _of_result(call, aten.tanh_backward, lambda y: -2 * conj(y))


def _of_result(call: Call, kernel: Any, bend: Callable[[Tensor], Tensor]) -> Cotangents:
    inner, y = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = kernel(call.grad, conj(y))
    if call.needs(1):
        found[1] = conj(call.grad) * inner * bend(y)
    return found


@vjp(aten.leaky_relu_backward.default)
def leaky_relu_backward(call: Call) -> Cotangents:
    """One slope on each side of zero; of a result the sides are those of the operand."""
    _, x, slope, _ = call.args
    return {0: aten.leaky_relu_backward(call.grad, x, slope, False)}


@vjp(aten.rrelu_with_noise_backward.default)
def rrelu_backward(call: Call) -> Cotangents:
    """Each element by the slope that was drawn for it."""
    return {0: aten.rrelu_with_noise_backward(call.grad, *call.args[1:-1], False)}


@vjp(aten._prelu_kernel_backward.default)
def prelu_backward(call: Call) -> Cotangents:
    """Cotangents of operand and slope."""
    inner, x, slope = call.args
    of_operand, of_slope = call.grads
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    below = x <= 0
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = zero.expand(x.shape) if of_operand is None else torch.where(below, of_operand * slope, of_operand)
        if of_slope is not None:
            found[0] = found[0] + torch.where(below, of_slope * x, 0)
    if call.needs(1) and of_slope is not None:
        found[1] = torch.where(below, inner * of_slope, 0)
    if call.needs(2) and of_operand is not None:
        found[2] = unbroadcast(torch.where(below, inner * of_operand, 0), slope)
    return found


@vjp(aten.native_dropout_backward.default, aten._masked_scale.default)
def dropout_backward(call: Call) -> Cotangents:
    """What the mask left, scaled."""
    _, mask, scale = call.args
    return {0: call.grad * mask * scale}


@vjp(aten.glu_backward.default)
def glu_backward(call: Call) -> Cotangents:
    """Of ``a s`` with ``s = sigmoid(b)``, for the halves ``a`` and ``b`` of the operand."""
    inner, x, dim = call.args
    a, b = x.chunk(2, dim)
    of_a, of_b = call.grad.chunk(2, dim)
    s = b.sigmoid()
    slope = s * (1 - s)
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = of_a * s + of_b * a * slope
    if call.needs(1):
        found[1] = torch.cat([inner * of_b * slope, inner * (of_a + of_b * a * (1 - 2 * s)) * slope], dim)
    return found


@vjp(aten._softmax_backward_data.default)
def softmax_backward(call: Call) -> Cotangents:
    """``y (g - sum(g y))``."""
    inner, y, dim, dtype = call.args
    g = call.grad.to(y.dtype)
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = aten._softmax_backward_data(g, y, dim, dtype)
    if call.needs(1):
        total = (inner * y).sum(dim, True)
        found[1] = g * (inner - total) - (g * y).sum(dim, True) * inner
    return found


@vjp(aten._log_softmax_backward_data.default)
def log_softmax_backward(call: Call) -> Cotangents:
    """``g - exp(y) sum(g)``."""
    inner, y, dim, _ = call.args
    g, probabilities = call.grad.to(y.dtype), y.exp()
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = g - (g * probabilities).sum(dim, True)
    if call.needs(1):
        found[1] = -inner.sum(dim, True) * probabilities * g
    return found


# -- losses ------------------------------------------------------------------------------------------------------------

_MEAN = 1


def _loss_backward(target: Any, slope: Callable[..., Tensor], bend: Callable[..., Tensor], of_target: bool) -> None:
    """Register a rule for ``target(g, x, t, reduction, *options)``, from the first and second derivative by ``x``.

    Args:
        of_target: whether the loss is one of ``x - t``, so that ``t`` has a derivative too.
    """

    def rule(call: Call) -> Cotangents:
        inner, x, t, reduction, *options = call.args
        g = call.grad / x.numel() if reduction == _MEAN else call.grad
        found: dict[Key, Tensor] = {}
        if call.needs(0):
            found[0] = unbroadcast(g * slope(x, t, *options), inner)
        if call.needs(1) or (of_target and call.needs(2)):
            carried = g * inner * bend(x, t, *options)
            if call.needs(1):
                found[1] = unbroadcast(carried, x)
            if of_target and call.needs(2):
                found[2] = unbroadcast(-carried, t)
        return found

    vjp(target)(rule)


def _soft_margin(x: Tensor, t: Tensor) -> Tensor:
    s = (-t * x).sigmoid()
    return t * t * s * (1 - s)


_loss_backward(aten.mse_loss_backward.default, lambda x, t: 2 * (x - t), lambda x, _: torch.full_like(x, 2), True)
_loss_backward(
    aten.smooth_l1_loss_backward.default,
    lambda x, t, beta: ((x - t) / beta).clamp(-1, 1) if beta else (x - t).sign(),
    lambda x, t, beta: ((x - t).abs() < beta).to(x.dtype) / beta if beta else torch.zeros_like(x),
    True,
)
_loss_backward(
    aten.huber_loss_backward.default,
    lambda x, t, delta: (x - t).clamp(-delta, delta),
    lambda x, t, delta: ((x - t).abs() < delta).to(x.dtype),
    True,
)
_loss_backward(aten.soft_margin_loss_backward.default, lambda x, t: -t * (-t * x).sigmoid(), _soft_margin, False)


@vjp(aten.nll_loss_backward.default)
def nll_loss_backward(call: Call) -> Cotangents:
    """Linear in its cotangent."""
    _, _, target, weight, reduction, ignored, _ = call.args
    return {0: aten.nll_loss_forward(call.grad, target, weight, reduction, ignored)[0]}


@vjp(aten.nll_loss2d_backward.default)
def nll_loss2d_backward(call: Call) -> Cotangents:
    """Linear in its cotangent."""
    _, _, target, weight, reduction, ignored, _ = call.args
    return {0: aten.nll_loss2d_forward(call.grad, target, weight, reduction, ignored)[0]}


@vjp(aten.binary_cross_entropy_backward.default)
def binary_cross_entropy_backward(call: Call) -> Cotangents:
    """``(p - t) / (p (1 - p))``, with PyTorch's bound on the denominator."""
    inner, p, t = call.args[:3]
    weight, reduction = call.arg(3, "weight"), call.arg(4, "reduction", _MEAN)
    g = call.grad if weight is None else call.grad * weight
    g = g / p.numel() if reduction == _MEAN else g
    denominator = ((1 - p) * p).clamp(min=1e-12)
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = unbroadcast(g * (p - t) / denominator, inner)
    if call.needs(1):
        bend = (p * p - 2 * p * t + t) / denominator / denominator
        found[1] = g * inner * bend
    if call.needs(2):
        found[2] = -g * inner / denominator
    return found

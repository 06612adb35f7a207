"""Elementwise calls of one operand: the cotangent times the slope of their type, element by element.

The slope is taken from the operand or from the result, whichever PyTorch's own derivative saves: the other one may have
been overwritten in place. Where PyTorch has a kernel for the product of slope and cotangent, that kernel is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, vjp
from hzo.tape.functions import out_of_place

aten = torch.ops.aten

_LN2 = math.log(2)
_LN10 = math.log(10)
_SQRT_PI = math.sqrt(math.pi)


def lost(tensor: Tensor) -> bool:
    """Whether what an operand held was overwritten in place: only its shape and dtype are left."""
    return tensor.device.type == "meta"


# -- the slope from the operand ----------------------------------------------------------------------------------------


def _sinc(g: Tensor, x: Tensor) -> Tensor:
    angle = x * math.pi
    slope = (angle * angle.cos() - angle.sin()) / (angle * x)
    return g * slope.masked_fill(x == 0, 0).conj()


def _acosh(g: Tensor, x: Tensor) -> Tensor:
    if x.is_complex():
        return g * ((x + 1).rsqrt() * (x - 1).rsqrt()).conj()
    return g * (x * x - 1).rsqrt()


def _angle(g: Tensor, z: Tensor) -> Tensor:
    if not z.is_complex():
        return torch.zeros_like(g)
    square = torch.view_as_real(z).square().sum(-1)
    return (1j * g * z / square).masked_fill(square == 0, 0)


FROM_OPERAND: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    aten.abs.default: lambda g, x: g * x.sgn(),
    aten.acos.default: lambda g, x: g * -(1 - x * x).rsqrt().conj(),
    aten.acosh.default: _acosh,
    aten.angle.default: _angle,
    aten.asin.default: lambda g, x: g * (1 - x * x).rsqrt().conj(),
    aten.asinh.default: lambda g, x: g * (x * x + 1).rsqrt().conj(),
    aten.atan.default: lambda g, x: g / (x * x + 1).conj(),
    aten.atanh.default: lambda g, x: g / (1 - x * x).conj(),
    aten.cos.default: lambda g, x: g * -x.sin().conj(),
    aten.cosh.default: lambda g, x: g * x.sinh().conj(),
    aten.digamma.default: lambda g, x: g * torch.special.polygamma(1, x),
    aten.erf.default: lambda g, x: g * (x * x).neg().exp() * (2 / _SQRT_PI),
    aten.erfc.default: lambda g, x: g * (x * x).neg().exp() * (-2 / _SQRT_PI),
    aten.erfinv.default: lambda g, x: g * x.erfinv().square().exp() * (_SQRT_PI / 2),
    aten.hardsigmoid.default: aten.hardsigmoid_backward,
    aten.hardswish.default: aten.hardswish_backward,
    aten.i0.default: lambda g, x: g * torch.special.i1(x),
    aten.lgamma.default: lambda g, x: g * x.digamma(),
    aten.log.default: lambda g, x: g / x.conj(),
    aten.log10.default: lambda g, x: g / (x.conj() * _LN10),
    aten.log1p.default: lambda g, x: g / (x + 1).conj(),
    aten.log2.default: lambda g, x: g / (x.conj() * _LN2),
    aten.mish.default: aten.mish_backward,
    aten.silu.default: aten.silu_backward,
    aten.sin.default: lambda g, x: g * x.cos().conj(),
    aten.sinc.default: _sinc,
    aten.sinh.default: lambda g, x: g * x.cosh().conj(),
    aten.special_entr.default: lambda g, x: g * -(x.log() + 1),
}

# -- the slope from the result -----------------------------------------------------------------------------------------

FROM_RESULT: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    aten.exp.default: lambda g, y: g * y.conj(),
    aten.exp2.default: lambda g, y: g * y.conj() * _LN2,
    aten.expm1.default: lambda g, y: g * (y.conj() + 1),
    aten.reciprocal.default: lambda g, y: g * -(y * y).conj(),
    aten.relu.default: lambda g, y: aten.threshold_backward(g, y, 0),
    aten.rsqrt.default: lambda g, y: g * (y * y * y).conj() * -0.5,
    aten.sigmoid.default: aten.sigmoid_backward,
    aten.special_ndtri.default: lambda g, y: g * (y * y / 2).exp() * math.sqrt(2 * math.pi),
    aten.sqrt.default: lambda g, y: g / (2 * y.conj()),
    aten.tan.default: lambda g, y: g * (1 + y * y).conj(),
    aten.tanh.default: aten.tanh_backward,
}

# -- the slope from both -----------------------------------------------------------------------------------------------


def _sgn(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if not x.is_complex():
        return torch.zeros_like(g)
    size = x.abs()
    radial = torch.view_as_real(g * y.conj())[..., 0]
    return ((g - radial * y) / size).masked_fill(size == 0, 0)


def _i1(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return g * torch.where(x == 0, 0.5, torch.special.i0(x) - y / x)


def _i1e(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return g * torch.where(x == 0, 0.5, torch.special.i0e(x) - y * (x.sgn() + x.reciprocal()))


FROM_BOTH: dict[Any, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    aten._standard_gamma.default: lambda g, x, y: g * aten._standard_gamma_grad(x, y),  # of the sample by its shape
    aten.sgn.default: _sgn,
    aten.special_erfcx.default: lambda g, x, y: g * (2 * x * y - 2 / _SQRT_PI),
    aten.special_i0e.default: lambda g, x, y: g * (torch.special.i1e(x) - x.sgn() * y),
    aten.special_i1.default: _i1,
    aten.special_i1e.default: _i1e,
    aten.special_log_ndtr.default: lambda g, x, y: g / (y + x * x / 2).exp() / math.sqrt(2 * math.pi),
}


def _of_operand(slope: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Call], Cotangents]:
    return lambda call: {0: slope(call.grad, call.args[0])}


def _of_result(slope: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Call], Cotangents]:
    return lambda call: {0: slope(call.grad, call.result)}


def _of_both(slope: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Call], Cotangents]:
    return lambda call: {0: slope(call.grad, call.args[0], call.result)}


for _target, _slope in FROM_OPERAND.items():
    vjp(_target, lean=True)(_of_operand(_slope))
for _target, _slope in FROM_RESULT.items():
    vjp(_target, lean=True)(_of_result(_slope))
for _target, _slope_of_both in FROM_BOTH.items():
    vjp(_target)(_of_both(_slope_of_both))


# -- activations with options ------------------------------------------------------------------------------------------


@vjp(aten.gelu.default, lean=True)
def gelu(call: Call) -> Cotangents:
    """Exact, or by ``tanh``: ``approximate`` says which."""
    return {0: aten.gelu_backward(call.grad, call.args[0], approximate=call.arg(1, "approximate", "none"))}


def _elu_backward(call: Call, alpha: float, scale: float, input_scale: float) -> Tensor:
    """From the operand; in place it was overwritten, and the result says as much."""
    x = call.args[0]
    of_result = lost(x)
    options = (alpha, scale, input_scale, of_result, call.result if of_result else x)
    found: Tensor = aten.elu_backward(call.grad, *options)
    return found


@vjp(aten.elu.default)
def elu(call: Call) -> Cotangents:
    """``elu`` and ``selu``."""
    return {0: _elu_backward(call, call.arg(1, "alpha", 1), call.arg(2, "scale", 1), call.arg(3, "input_scale", 1))}


@vjp(aten.celu.default)
def celu(call: Call) -> Cotangents:
    """``elu`` of a stretched operand."""
    alpha = call.arg(1, "alpha", 1.0)
    return {0: _elu_backward(call, alpha, 1, 1 / alpha)}


@vjp(aten.leaky_relu.default, lean=True)
def leaky_relu(call: Call) -> Cotangents:
    """Slope one, and another one below zero."""
    x = call.args[0]
    of_result = lost(x)  # in place
    slope = call.arg(1, "negative_slope", 0.01)
    return {0: aten.leaky_relu_backward(call.grad, call.result if of_result else x, slope, of_result)}


@vjp(aten.hardtanh.default, lean=True)
def hardtanh(call: Call) -> Cotangents:
    """``hardtanh`` and ``relu6``."""
    low, high = call.arg(1, "min_val", -1), call.arg(2, "max_val", 1)
    return {0: aten.hardtanh_backward(call.grad, call.args[0], low, high)}


@vjp(aten.hardshrink.default)
def hardshrink(call: Call) -> Cotangents:
    """Zero near zero, the operand itself elsewhere."""
    return {0: aten.hardshrink_backward(call.grad, call.args[0], call.arg(1, "lambd", 0.5))}


@vjp(aten.softshrink.default)
def softshrink(call: Call) -> Cotangents:
    """Zero near zero, the operand moved towards zero elsewhere."""
    return {0: aten.softshrink_backward(call.grad, call.args[0], call.arg(1, "lambd", 0.5))}


@vjp(aten.softplus.default)
def softplus(call: Call) -> Cotangents:
    """``log(1 + exp(beta x)) / beta``, linear beyond a threshold."""
    beta, threshold = call.arg(1, "beta", 1), call.arg(2, "threshold", 20)
    return {0: aten.softplus_backward(call.grad, call.args[0], beta, threshold)}


@vjp(aten.threshold.default)
def threshold(call: Call) -> Cotangents:
    """The operand above a threshold, a constant elsewhere."""
    return {0: aten.threshold_backward(call.grad, call.args[0], call.args[1])}


@vjp(aten.log_sigmoid_forward.default)
def log_sigmoid(call: Call) -> Cotangents:
    """``log(sigmoid(x))``; the second result is what the forward pass keeps for this."""
    return {0: aten.log_sigmoid_backward(call.grad, call.args[0], call.out[1])}


@vjp(aten.glu.default)
def glu(call: Call) -> Cotangents:
    """The first half times the sigmoid of the second."""
    return {0: aten.glu_backward(call.grad, call.args[0], call.arg(1, "dim", -1))}


@vjp(aten.logit.default)
def logit(call: Call) -> Cotangents:
    """``log(x / (1 - x))``."""
    return {0: aten.logit_backward(call.grad, call.args[0], call.arg(1, "eps"))}


@vjp(aten.polygamma.default)
def polygamma(call: Call) -> Cotangents:
    """The derivative of order ``n`` of ``digamma``."""
    n, x = call.args
    return {1: call.grad * torch.special.polygamma(n + 1, x)}


@vjp(aten.mvlgamma.default)
def mvlgamma(call: Call) -> Cotangents:
    """The logarithm of the multivariate gamma function: a sum of ``lgamma`` at operands half a unit apart."""
    x, p = call.args
    offsets = torch.arange(-p / 2 + 0.5, 0.5, 0.5, dtype=x.dtype, device=x.device)
    return {0: call.grad * (x.unsqueeze(-1) + offsets).digamma().sum(-1)}


# -- bounds ------------------------------------------------------------------------------------------------------------


BOUND_IS_OUTSIDE = torch.__version__ >= "2.14"
"""PyTorch's slope of ``clamp`` on a bound: one until 2.13, zero since; where bounds are tensors, each has a half."""

_above, _below = (torch.gt, torch.lt) if BOUND_IS_OUTSIDE else (torch.ge, torch.le)


@vjp(aten.clamp.default)
def clamp(call: Call) -> Cotangents:
    """Slope one between the bounds."""
    x, low, high = call.args[0], call.arg(1, "min"), call.arg(2, "max")
    inside: Any = True if low is None else _above(x, low)
    if high is not None:
        inside = inside & _below(x, high)
    return {0: torch.where(inside, call.grad, 0)}


@vjp(aten.clamp_min.default)
def clamp_min(call: Call) -> Cotangents:
    """Slope one above the bound."""
    return {0: torch.where(_above(call.args[0], call.args[1]), call.grad, 0)}


@vjp(aten.clamp_max.default)
def clamp_max(call: Call) -> Cotangents:
    """Slope one below the bound."""
    return {0: torch.where(_below(call.args[0], call.args[1]), call.grad, 0)}


@vjp(aten.nan_to_num.default)
def nan_to_num(call: Call) -> Cotangents:
    """What is finite passes."""
    return {0: call.grad * call.args[0].isfinite()}


# -- slope one or another constant -------------------------------------------------------------------------------------


@vjp(
    aten.alias.default,
    aten.clone.default,
    aten._lazy_clone.default,
    aten.positive.default,
    aten.frac.default,
    lean=True,
)
def unchanged(call: Call) -> Cotangents:
    """The same elements, or the same up to an offset that does not move."""
    return {0: call.grad}


@vjp(aten._to_copy.default, lean=True)
def to_copy(call: Call) -> Cotangents:
    """Another dtype or device; the sweep converts the dtype back."""
    x, g = call.args[0], call.grad
    return {0: g if lost(x) or x.device == g.device else g.to(x.device)}


@vjp(aten.neg.default, aten._neg_view.default, lean=True)
def neg(call: Call) -> Cotangents:
    """``-x``."""
    return {0: call.grad.neg()}


@vjp(aten.deg2rad.default)
def deg2rad(call: Call) -> Cotangents:
    """Degrees to radians."""
    return {0: call.grad * (math.pi / 180)}


@vjp(aten.rad2deg.default)
def rad2deg(call: Call) -> Cotangents:
    """Radians to degrees."""
    return {0: call.grad * (180 / math.pi)}


@vjp(aten.frexp.Tensor)
def frexp(call: Call) -> Cotangents:
    """Mantissa and exponent; the exponent does not move."""
    exponent = call.out[1]
    assert exponent is not None
    return {0: call.grad / exponent.exp2()}


# -- dropout -----------------------------------------------------------------------------------------------------------


@vjp(aten.native_dropout.default)
def native_dropout(call: Call) -> Cotangents:
    """Dropout in one kernel; the mask that it drew is its second result."""
    _, p, train = call.args
    if train is False:
        return {0: call.grad}
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return {0: aten.native_dropout_backward(call.grad, call.out[1], scale)}


@vjp(aten._fused_dropout.default)
def fused_dropout(call: Call) -> Cotangents:
    """Dropout in one kernel on a GPU; the mask that it drew is its second result."""
    kept = 1 - call.args[1]
    return {0: aten._masked_scale(call.grad, call.out[1], 0.0 if kept == 0 else 1 / kept)}


@vjp(
    aten.rrelu_with_noise.default,
    aten.rrelu_with_noise_functional.default,
    out_of_place(aten.rrelu_with_noise.default, (1,)),
)
def rrelu(call: Call) -> Cotangents:
    """A slope for every element below zero, drawn by the call; in place it comes back as the last result."""
    x, noise = call.args[:2]
    lower, upper, training = call.arg(2, "lower", 1 / 8), call.arg(3, "upper", 1 / 3), call.arg(4, "training", False)
    of_result = lost(x)
    noise = call.out[1] if len(call.out) > 1 else noise
    x = call.result if of_result else x
    return {0: aten.rrelu_with_noise_backward(call.grad, x, noise, lower, upper, training, of_result)}


# -- complex numbers ---------------------------------------------------------------------------------------------------


@vjp(aten._conj.default, aten._conj_physical.default, aten.conj_physical.default)
def conj(call: Call) -> Cotangents:
    """The complex conjugate."""
    return {0: call.grad.conj()}


@vjp(aten.view_as_real.default)
def view_as_real(call: Call) -> Cotangents:
    """Real and imaginary part along a last dimension."""
    return {0: torch.view_as_complex(call.grad.contiguous())}


@vjp(aten.view_as_complex.default)
def view_as_complex(call: Call) -> Cotangents:
    """Complex numbers out of a last dimension of two."""
    return {0: torch.view_as_real(call.grad.contiguous().resolve_conj())}


@vjp(aten.complex.default)
def complex_(call: Call) -> Cotangents:
    """Complex numbers out of their two parts, which have one shape or are broadcast."""
    parts = torch.view_as_real(call.grad.resolve_conj())
    return {k: parts[..., k].sum_to_size(call.args[k].shape) for k in (0, 1) if call.needs(k)}


@vjp(aten.polar.default)
def polar(call: Call) -> Cotangents:
    """Complex numbers out of absolute value and angle, from the result."""
    z = call.result
    g = call.grad.conj()
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = torch.view_as_real(g * z.sgn())[..., 0].sum_to_size(call.args[0].shape)
    if call.needs(1):
        found[1] = torch.view_as_real(g * (z * 1j))[..., 0].sum_to_size(call.args[1].shape)
    return found

"""Elementwise calls of two or more operands: sums, products, powers, extremes, choices.

The slope with respect to one operand is a formula of the others. Where another one is a weight and this one an
activation, the weight is not read: the operator runs on constants in the place of the activation, in the smallest shape
that shows every element of the weight, and the formula takes what came back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, unbroadcast, vjp
from hzo.rules.pointwise import BOUND_IS_OUTSIDE, lost

aten = torch.ops.aten

_LN2 = math.log(2)


def conj(factor: Any) -> Any:
    """The conjugate of a tensor or a number; what is real is returned as it is."""
    if isinstance(factor, Tensor):
        return factor.conj() if factor.is_complex() else factor
    return factor.conjugate() if isinstance(factor, complex) else factor


def scaled(g: Tensor, factor: Any) -> Tensor:
    """A cotangent times the conjugate of a number; no copy for one."""
    return g if factor == 1 else g * conj(factor)


# -- weights as the operator shows them --------------------------------------------------------------------------------


def hidden(call: Call, of: Key, *others: Key) -> bool:
    """Whether one of the other operands is a weight, which may not be read for the cotangent of operand ``of``."""
    return not call.weight(of) and any(call.weight(k) for k in others)


def _narrowed(weight: Tensor) -> Tensor:
    """A weight with its repeated dimensions reduced to one element."""
    for dim, stride in enumerate(weight.stride()):
        if stride == 0 and weight.shape[dim] > 1:
            weight = weight.narrow(dim, 0, 1)
    return weight


def _given(call: Call, key: Key) -> Any:
    return call.kwargs[key] if isinstance(key, str) else call.args[key]


def weight_responses(
    call: Call, of: Key, weight: Key, constants: tuple[float, ...], fixed: Mapping[Key, float] | None = None
) -> list[Tensor]:
    """What the operator returns of a weight for each constant in the place of operand ``of``.

    It runs on the smallest tensors that show every element of the weight: a dimension in which that does not vary has
    size one. Where the first dimension has, one run takes all constants. Further operands have the numbers ``fixed``.
    Cost: as many samples as the weight has rows, for each constant.
    """
    replaced: dict[Key, Any] = {weight: _narrowed(_given(call, weight))}
    size = list(replaced[weight].shape)
    size = [1] * (call.grad.dim() - len(size)) + size
    dtype, device = _given(call, of).dtype, call.grad.device
    for key, number in (fixed or {}).items():
        replaced[key] = torch.full([1] * len(size), number, dtype=_given(call, key).dtype, device=device)
    if size and size[0] == 1:
        probe = torch.tensor(constants, dtype=dtype, device=device).view(-1, *[1] * (len(size) - 1))
        probe = probe.expand(len(constants), *size[1:])
        seen = _first(call.measure({of: probe, **replaced}, probe))
        return [seen[k : k + 1] for k in range(len(constants))]
    probes = [torch.full(size, c, dtype=dtype, device=device) for c in constants]
    return [_first(call.measure({of: probe, **replaced}, probe)) for probe in probes]


def _first(results: Any) -> Tensor:
    first: Tensor = results[0] if isinstance(results, tuple) else results
    return first


def factor(call: Call, of: Key, by: Key, fixed: Mapping[Key, float] | None = None) -> Any:
    """What a product multiplies operand ``of`` with: operand ``by`` as it was seen, or measured where it is a weight.

    Two samples of the weight, at one half and minus one half: what the operator adds to its product (an offset of the
    hardware) is the same in both and falls out.
    """
    if not hidden(call, of, by):
        return _given(call, by)
    above, below = weight_responses(call, of, by, (0.5, -0.5), fixed)
    return above - below


def slope_by_difference(call: Call, of: int, size: torch.Size, fixed: Mapping[Key, Any] | None = None) -> Tensor:
    """The slope of every element by a central difference, for rare functions of an activation and a weight.

    Cost: two runs on as many samples as operand ``of`` has. Error: of the order of ``eps ** (2/3)``.
    """
    x = call.args[of]
    x = x.expand(size)
    step = torch.finfo(x.dtype).eps ** (1 / 3) * x.abs().clamp(min=1)
    above, below = x + step, x - step
    upper, lower = (call.measure({**(fixed or {}), of: probe}, probe) for probe in (above, below))
    slope: Tensor = (upper - lower) / (above - below)
    return slope


# -- sums --------------------------------------------------------------------------------------------------------------


def _sum(call: Call, first: Any, second: Any) -> Cotangents:
    found: dict[Key, Tensor] = {}
    for key, number in ((0, first), (1, second)):
        if call.needs(key):
            found[key] = unbroadcast(scaled(call.grad, number), call.args[key])
    return found


@vjp(aten.add.Tensor, aten.add.Scalar, lean=True)
def add(call: Call) -> Cotangents:
    """``a + alpha * b``."""
    return _sum(call, 1, call.arg(2, "alpha", 1))


@vjp(aten.sub.Tensor, aten.sub.Scalar, lean=True)
def sub(call: Call) -> Cotangents:
    """``a - alpha * b``."""
    return _sum(call, 1, -call.arg(2, "alpha", 1))


@vjp(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(call: Call) -> Cotangents:
    """``b - alpha * a``."""
    return _sum(call, -call.arg(2, "alpha", 1), 1)


# -- products and quotients --------------------------------------------------------------------------------------------


@vjp(aten.mul.Tensor, aten.mul.Scalar, measures=True, lean=True)
def mul(call: Call) -> Cotangents:
    """``a * b``."""
    found: dict[Key, Tensor] = {}
    for of, by in ((0, 1), (1, 0)):
        if call.needs(of):
            found[of] = unbroadcast(call.grad * conj(factor(call, of, by)), call.args[of])
    return found


@vjp(aten.div.Tensor, aten.div.Scalar, measures=True, lean=True)
def div(call: Call) -> Cotangents:
    """``a / b``."""
    a, b = call.args[:2]
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        g = call.grad
        found[0] = unbroadcast(g * conj(factor(call, 0, 1)) if hidden(call, 0, 1) else g / conj(b), a)
    if call.needs(1):
        # a / b for b = 1/2 and -1/2 differ by 4 a
        quotient = factor(call, 1, 0) / 4 / b if hidden(call, 1, 0) else a / b
        found[1] = unbroadcast(-call.grad * conj(quotient / b), b)
    return found


@vjp(aten.div.Tensor_mode, aten.div.Scalar_mode, measures=True)
def div_mode(call: Call) -> Cotangents:
    """``a / b``, rounded or not; a rounded quotient has slope zero."""
    return div(call) if call.arg(2, "rounding_mode") is None else {}


@vjp(aten.fmod.Tensor, aten.fmod.Scalar, measures=True)
def fmod(call: Call) -> Cotangents:
    """What ``a / b`` leaves, with the sign of ``a``."""
    return _remainder(call, "trunc")


@vjp(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor, measures=True)
def remainder(call: Call) -> Cotangents:
    """What ``a / b`` leaves, with the sign of ``b``."""
    return _remainder(call, "floor")


def _remainder(call: Call, rounding: str) -> Cotangents:
    a, b = call.args[:2]
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = unbroadcast(call.grad, a)
    if call.needs(1):
        if hidden(call, 1, 0):  # the remainder by infinity is the dividend, or infinity where that has the other sign
            above, below = weight_responses(call, 1, 0, (math.inf, -math.inf))
            a = torch.where(above.isinf(), below, above)
        found[1] = unbroadcast(-call.grad * torch.div(a, b, rounding_mode=rounding), b)
    return found


@vjp(aten.addcmul.default, measures=True)
def addcmul(call: Call) -> Cotangents:
    """``a + value * b * c``."""
    value = call.arg(3, "value", 1)
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = unbroadcast(call.grad, call.args[0])
    for of, by in ((1, 2), (2, 1)):
        if not call.needs(of):
            continue
        slope = factor(call, of, by, {0: 0})
        if not hidden(call, of, by) and value != 1:
            slope = slope * value
        found[of] = unbroadcast(call.grad * conj(slope), call.args[of])
    return found


@vjp(aten.addcdiv.default, measures=True)
def addcdiv(call: Call) -> Cotangents:
    """``a + value * b / c``."""
    b, c = call.args[1:3]
    value = call.arg(3, "value", 1)
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = unbroadcast(call.grad, call.args[0])
    if call.needs(1):
        slope = factor(call, 1, 2, {0: 0}) if hidden(call, 1, 2) else value / c
        found[1] = unbroadcast(call.grad * conj(slope), b)
    if call.needs(2):
        numerator = factor(call, 2, 1, {0: 0}) / 4 if hidden(call, 2, 1) else value * b
        found[2] = unbroadcast(-call.grad * conj(numerator / (c * c)), c)
    return found


@vjp(aten.lerp.Scalar)
def lerp_scalar(call: Call) -> Cotangents:
    """``a + w (b - a)`` for a number ``w``."""
    a, b, w = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = unbroadcast(call.grad * conj(1 - w), a)
    if call.needs(1):
        found[1] = unbroadcast(call.grad * conj(w), b)
    return found


@vjp(aten.lerp.Tensor, measures=True)
def lerp(call: Call) -> Cotangents:
    """``a + w (b - a)``."""
    a, b, w = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        slope = factor(call, 0, 2, {1: 0}) if hidden(call, 0, 2) else 1 - w
        found[0] = unbroadcast(call.grad * conj(slope), a)
    if call.needs(1):
        found[1] = unbroadcast(call.grad * conj(factor(call, 1, 2, {0: 0})), b)
    if call.needs(2):
        found[2] = unbroadcast(call.grad * conj(_difference(call, b, a)), w)
    return found


def _difference(call: Call, end: Tensor, start: Tensor) -> Tensor:
    """``end - start`` of a lerp; where one of them is a weight, it is what comes out for ``w`` of one, or of zero."""
    if hidden(call, 2, 1):
        (end,) = weight_responses(call, 2, 1, (1.0,), {0: 0})
    if hidden(call, 2, 0):
        (start,) = weight_responses(call, 2, 0, (0.0,), {1: 0})
    return end - start


# -- powers and logarithms ---------------------------------------------------------------------------------------------


@vjp(aten.pow.Tensor_Scalar, lean=True)
def pow_scalar(call: Call) -> Cotangents:
    """``x ** p`` for a number ``p``."""
    x, p = call.args
    if p == 0:
        return {0: torch.zeros_like(call.grad)}
    if p == 2:
        return {0: call.grad * conj(2 * x)}
    return {0: call.grad * conj(p * x.pow(p - 1))}


@vjp(aten.pow.Tensor_Tensor, measures=True)
def pow_tensor(call: Call) -> Cotangents:
    """``x ** p``; where ``p`` is a parameter, it is the logarithm of what came out for two over that for one."""
    x, p = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        if hidden(call, 0, 1):
            two, one = weight_responses(call, 0, 1, (2.0, 1.0))
            p = (two / one).log2()
        slope = (p * x.pow(p - 1)).masked_fill(p == 0, 0)
        found[0] = unbroadcast(call.grad * conj(slope), x)
    if call.needs(1):
        exponent = call.args[1]
        if hidden(call, 1, 0):
            (x,) = weight_responses(call, 1, 0, (1.0,))
        found[1] = unbroadcast(call.grad * conj(_exponent_slope(x, exponent, call.result)), exponent)
    return found


@vjp(aten.pow.Scalar)
def pow_of_number(call: Call) -> Cotangents:
    """``a ** p`` for a number ``a``."""
    base, exponent = call.args
    base = torch.tensor(base, dtype=call.result.dtype, device=exponent.device)
    return {1: call.grad * conj(_exponent_slope(base, exponent, call.result))}


def _exponent_slope(base: Tensor, exponent: Tensor, result: Tensor) -> Tensor:
    """``log(base) * base ** exponent``; zero where both base and result are."""
    if exponent.is_complex():
        parts = torch.view_as_real(exponent)
        whole = (parts[..., 1] == 0) & (parts[..., 0] >= 0)
    else:
        whole = exponent >= 0
    slope = result * base.to(result.dtype).log()
    return slope.masked_fill((base == 0) & whole, 0)


@vjp(aten.logaddexp.default, measures=True)
def logaddexp(call: Call) -> Cotangents:
    """``log(exp(a) + exp(b))``."""
    a, b = call.args
    found: dict[Key, Tensor] = {}
    for of in (0, 1):
        if not call.needs(of):
            continue
        if hidden(call, of, 1 - of):
            slope = (call.args[of] - _result(call, of)).exp()
            found[of] = unbroadcast(call.grad * conj(slope), call.args[of])
        else:
            other = b - a if of == 0 else a - b
            found[of] = unbroadcast(call.grad / conj(1 + other.exp()), call.args[of])
    return found


@vjp(aten.logaddexp2.default, measures=True)
def logaddexp2(call: Call) -> Cotangents:
    """``log2(2 ** a + 2 ** b)``."""
    a, b = call.args
    found: dict[Key, Tensor] = {}
    for of in (0, 1):
        if not call.needs(of):
            continue
        if hidden(call, of, 1 - of):
            slope = (call.args[of] - _result(call, of)).exp2()
            found[of] = unbroadcast(call.grad * slope, call.args[of])
        else:
            other = b - a if of == 0 else a - b
            found[of] = unbroadcast(call.grad / (1 + other.exp2()), call.args[of])
    return found


def _result(call: Call, of: int) -> Tensor:
    """The result; computed again where it was overwritten in place."""
    seen = call.out[0]
    if seen is not None:
        return seen
    again: Tensor = call.measure({}, call.args[of])
    return again


@vjp(aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other, measures=True)
def xlogy(call: Call) -> Cotangents:
    """``a log(b)``, zero where ``a`` is."""
    return _product_with_logarithm(call, torch.xlogy, 0, math.e)


@vjp(
    aten.special_xlog1py.default,
    aten.special_xlog1py.self_scalar,
    aten.special_xlog1py.other_scalar,
    measures=True,
)
def xlog1py(call: Call) -> Cotangents:
    """``a log(1 + b)``, zero where ``a`` is."""
    return _product_with_logarithm(call, torch.special.xlog1py, 1, math.e - 1)


def _product_with_logarithm(call: Call, function: Any, offset: int, unit: float) -> Cotangents:
    """``unit`` is where the logarithm is one."""
    a, b = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        if hidden(call, 0, 1):
            found[0] = unbroadcast(call.grad * factor(call, 0, 1), a)
        else:
            outside = (a == 0) & (b <= -offset)
            found[0] = unbroadcast(function(call.grad, b).masked_fill(outside, 0), a)
    if call.needs(1):
        if hidden(call, 1, 0):
            at_unit, at_one = weight_responses(call, 1, 0, (unit, 1.0 - offset))
            a = at_unit - at_one
        found[1] = unbroadcast(call.grad * a / (b + offset if offset else b), b)
    return found


@vjp(aten.ldexp.Tensor, measures=True)
def ldexp(call: Call) -> Cotangents:
    """``a * 2 ** b``."""
    a, b = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        slope = factor(call, 0, 1) if hidden(call, 0, 1) else torch.pow(2, b)
        found[0] = unbroadcast(call.grad * conj(slope), a)
    if call.needs(1):
        found[1] = unbroadcast(call.grad * conj(call.result) * _LN2, b)
    return found


# -- other functions of two operands -----------------------------------------------------------------------------------


@vjp(aten.atan2.default, measures=True)
def atan2(call: Call) -> Cotangents:
    """The angle of the point ``(b, a)``; a coordinate that is a weight is seen by its angle beside one."""
    a, b = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        x = weight_responses(call, 0, 1, (1.0,))[0].tan().reciprocal() if hidden(call, 0, 1) else b
        found[0] = unbroadcast(call.grad * x * (a * a + x * x).reciprocal(), a)
    if call.needs(1):
        y = weight_responses(call, 1, 0, (1.0,))[0].tan() if hidden(call, 1, 0) else a
        found[1] = unbroadcast(-call.grad * y * (y * y + b * b).reciprocal(), b)
    return found


@vjp(aten.hypot.default)
def hypot(call: Call) -> Cotangents:
    """``sqrt(a * a + b * b)``."""
    return {k: unbroadcast(call.grad * call.args[k] / call.result, call.args[k]) for k in (0, 1) if call.needs(k)}


@vjp(aten.copysign.Tensor, aten.copysign.Scalar)
def copysign(call: Call) -> Cotangents:
    """The size of ``a`` with the sign of ``b``."""
    a = call.args[0]
    if not call.needs(0):
        return {}
    return {0: unbroadcast(call.grad * (call.result / a).masked_fill(a == 0, 0), a)}


@vjp(aten.nextafter.default)
def nextafter(call: Call) -> Cotangents:
    """The next number from ``a`` towards ``b``."""
    a, b = call.args
    return {0: unbroadcast(torch.where(a != b, call.grad, 0), a)} if call.needs(0) else {}


@vjp(aten.igamma.default, aten.igammac.default, measures=True)
def igamma(call: Call) -> Cotangents:
    """The incomplete gamma functions; by their second operand only, as in PyTorch."""
    a, x = call.args
    if hidden(call, 1, 0):
        slope = slope_by_difference(call, 1, call.grad.shape)
    else:
        slope = ((a - 1) * x.log() - x - a.lgamma()).exp()
        slope = slope if call.op.target is aten.igamma.default else -slope
    return {1: unbroadcast(call.grad * slope, x)}


@vjp(aten.special_zeta.default, aten.special_zeta.self_scalar, measures=True)
def zeta(call: Call) -> Cotangents:
    """The Hurwitz zeta function; by its second operand only, as in PyTorch."""
    s, x = call.args
    slope = slope_by_difference(call, 1, call.grad.shape) if hidden(call, 1, 0) else -s * torch.special.zeta(s + 1, x)
    return {1: unbroadcast(call.grad * slope, x)}


# -- extremes and bounds -----------------------------------------------------------------------------------------------


def _bound(call: Call, of: Key, by: Key, silent: float, fixed: Mapping[Key, float] | None = None) -> Any:
    """The operand to compare with; a weight is what comes out where the activation is at ``silent``."""
    return weight_responses(call, of, by, (silent,), fixed)[0] if hidden(call, of, by) else _given(call, by)


def _extreme(call: Call, silent: float, loses: Any) -> Cotangents:
    """Of equal operands each takes one half."""
    found: dict[Key, Tensor] = {}
    for of, by in ((0, 1), (1, 0)):
        if call.needs(of):
            mine, other = call.args[of], _bound(call, of, by, silent)
            g = torch.where(mine == other, call.grad / 2, call.grad)
            found[of] = unbroadcast(g.masked_fill(loses(mine, other), 0), mine)
    return found


@vjp(aten.maximum.default, measures=True)
def maximum(call: Call) -> Cotangents:
    """The larger of two."""
    return _extreme(call, -math.inf, torch.lt)


@vjp(aten.minimum.default, measures=True)
def minimum(call: Call) -> Cotangents:
    """The smaller of two."""
    return _extreme(call, math.inf, torch.gt)


def _extreme_number(call: Call, silent: float, wins: Any) -> Cotangents:
    """Of equal operands the first takes all; a NaN loses."""
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        mine, other = call.args[0], _bound(call, 0, 1, silent)
        chosen = wins(mine, other) | other.isnan()
        found[0] = unbroadcast(torch.where(chosen, call.grad, 0), mine)
    if call.needs(1):
        mine, other = call.args[1], _bound(call, 1, 0, silent)
        chosen = wins(other, mine) | mine.isnan()
        found[1] = unbroadcast(torch.where(chosen, 0, call.grad), mine)
    return found


@vjp(aten.fmax.default, measures=True)
def fmax(call: Call) -> Cotangents:
    """The larger of two, and a number rather than a NaN."""
    return _extreme_number(call, -math.inf, torch.ge)


@vjp(aten.fmin.default, measures=True)
def fmin(call: Call) -> Cotangents:
    """The smaller of two, and a number rather than a NaN."""
    return _extreme_number(call, math.inf, torch.le)


@vjp(aten.clamp.Tensor, measures=True)
def clamp_tensor(call: Call) -> Cotangents:
    """Between two tensors of bounds; where they cross, the upper one is the result."""
    places: dict[str, Key] = {
        "x": 0,
        "min": 1 if len(call.args) > 1 else "min",
        "max": 2 if len(call.args) > 2 else "max",
    }
    places = {name: key for name, key in places.items() if key in call.kwargs or isinstance(key, int)}
    places = {name: key for name, key in places.items() if _given(call, key) is not None}

    def seen(of: str, name: str) -> Any:
        """An operand; a weight is what comes out where the others leave it alone."""
        if not hidden(call, places[of], places[name]):
            return _given(call, places[name])
        apart = {"x": math.inf if name == "max" else -math.inf, "min": -math.inf, "max": math.inf}
        others = {key: apart[other] for other, key in places.items() if other not in (of, name)}
        return weight_responses(call, places[of], places[name], (apart[of],), others)[0]

    found: dict[Key, Tensor] = {}
    for of, key in places.items():
        if call.needs(key):
            x, low, high = (seen(of, name) if name in places else None for name in ("x", "min", "max"))
            passed = torch.where(_passes(of, x, low, high), call.grad, 0)
            if BOUND_IS_OUTSIDE:
                passed = torch.where(_shares(of, x, low, high), call.grad / 2, passed)
            found[key] = unbroadcast(passed, _given(call, key))
    return found


def _passes(of: str, x: Any, low: Any, high: Any) -> Any:
    """Where the result of a clamp is this operand."""
    if of == "x":
        passing: Any = True if low is None else x >= low
        return passing if high is None else passing & (x <= high)
    if low is None or high is None:
        return x > high if low is None else x < low
    if of == "max":
        return (x > high) | (high < low)
    return (x < low) & (low <= high if BOUND_IS_OUTSIDE else low < high)


def _shares(of: str, x: Any, low: Any, high: Any) -> Any:
    """Where an operand of a clamp and the bound that it equals have a half each; bounds that meet have none."""
    bounds = [b for b in (low, high) if b is not None]
    compared = bounds if of == "x" else [low if of == "min" else high]
    equal: Any = False
    for bound in compared:
        equal = (x == bound) | equal
    return equal if len(bounds) == 1 else equal & (low < high)


def _not_beyond(call: Call, silent: float, beyond: Any) -> Cotangents:
    """The operand, unless it lies beyond the bound; where the two are equal, as this version of PyTorch has it."""
    if BOUND_IS_OUTSIDE:
        return _extreme(call, silent, beyond)
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        x = call.args[0]
        found[0] = unbroadcast(call.grad.masked_fill(beyond(x, _bound(call, 0, 1, silent)), 0), x)
    if call.needs(1):
        bound = call.args[1]
        found[1] = unbroadcast(torch.where(beyond(_bound(call, 1, 0, silent), bound), call.grad, 0), bound)
    return found


@vjp(aten.clamp_min.Tensor, measures=True)
def clamp_min_tensor(call: Call) -> Cotangents:
    """Not below a tensor of bounds."""
    return _not_beyond(call, -math.inf, torch.lt)


@vjp(aten.clamp_max.Tensor, measures=True)
def clamp_max_tensor(call: Call) -> Cotangents:
    """Not above a tensor of bounds."""
    return _not_beyond(call, math.inf, torch.gt)


@vjp(aten._prelu_kernel.default, measures=True)
def prelu(call: Call) -> Cotangents:
    """Slope one, and below zero that of a weight, which is measured by what comes out for minus one."""
    x, slope = call.args
    if call.needs(0) and hidden(call, 0, 1):
        at_zero, below = weight_responses(call, 0, 1, (0.0, -1.0))
        slope = at_zero - below
    of_operand, of_slope = aten._prelu_kernel_backward(call.grad, x, slope)
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = of_operand
    if call.needs(1):
        found[1] = unbroadcast(of_slope, call.args[1])
    return found


# -- choices and copies ------------------------------------------------------------------------------------------------


@vjp(aten.where.self)
def where(call: Call) -> Cotangents:
    """One operand where a condition holds, the other where it does not."""
    condition, a, b = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(1):
        found[1] = unbroadcast(torch.where(condition, call.grad, 0), a)
    if call.needs(2):
        found[2] = unbroadcast(torch.where(condition, 0, call.grad), b)
    return found


@vjp(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(call: Call) -> Cotangents:
    """A value where a mask holds."""
    x, mask, value = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = unbroadcast(call.grad.masked_fill(mask, 0), x)
    if call.needs(2):
        found[2] = torch.where(mask, call.grad, 0).sum().view(value.shape)
    return found


@vjp(aten.copy.default)
def copy(call: Call) -> Cotangents:
    """The second operand in the place of the first."""
    source, g = call.args[1], call.grad
    if not call.needs(1):
        return {}
    moved = g if lost(source) or source.device == g.device else g.to(source.device)
    return {1: unbroadcast(moved, source)}


@vjp(aten.fill.Tensor)
def fill(call: Call) -> Cotangents:
    """One number everywhere."""
    return {1: call.grad.sum()} if call.needs(1) else {}

"""Normalizing layers: ``Jᵀg = (I − 11ᵀ/N − x̂x̂ᵀ/N)(γ ⊙ g)/√(v+ε)`` over each statistics group (textbook).

Mean and deviation are those that the call returned: nothing is computed twice. γ is measured where it is a weight, with
a tiny probe whose x̂ is known and far from zero, so that γ = 0, constant channels and small inputs are exact as well; no
probe moves running statistics. Without the 11ᵀ term for RMS norms.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, vjp
from hzo.rules.products import may_read
from hzo.rules.schema import has, key_of, named
from hzo.tape.functions import out_of_place

aten = torch.ops.aten


@lru_cache(maxsize=256)
def _signs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two rows of signs that alternate in the order of memory, the second one the negative of the first.

    Made once, as all that depends on shapes alone; nobody writes to it.
    """
    row = 1 - 2 * (torch.arange(prod(shape), device=device) % 2)
    return torch.stack([row, -row]).to(dtype).view(2, *shape)


def _half_difference(seen: Tensor, factor: float = 1.0) -> Tensor:
    """Of the two rows that answer to signs, in float32 at least; times a factor."""
    above, below = (seen if seen.dtype in (torch.float32, torch.float64) else seen.float()).unbind()
    return (above - below).mul_(0.5 * factor)


def _measured_normalized(call: Call, gamma: Tensor, also: dict[Key, Any]) -> Tensor:
    """x̂ of a learned tensor that is scaled by an activation: what comes out for a γ of ones, less that for zeros."""
    ones = torch.ones(gamma.shape, dtype=gamma.dtype, device=call.grad.device)
    replaced: dict[Key, Any] = {**_no_bias(call, gamma), **also}
    above = call.measure({**replaced, key_of(call, "weight"): ones}, call.grad)[0]
    below = call.measure({**replaced, key_of(call, "weight"): torch.zeros_like(ones)}, call.grad)[0]
    return above - below  # type: ignore[no-any-return]


def _no_bias(call: Call, gamma: Tensor) -> dict[Key, Any]:
    """The replacement for a bias: none, or zeros for kernels of a device that ask for one."""
    if not has(call, "bias"):
        return {}
    asks = any(kernel in call.op.name for kernel in ("cudnn_batch_norm", "miopen_batch_norm"))
    return {key_of(call, "bias"): torch.zeros_like(gamma) if asks else None}


class _Operands:
    """Input, γ and β of a normalizing call: where they stand, which of them ask for a cotangent, what is measured."""

    def __init__(self, call: Call) -> None:
        self.x: Tensor = named(call, "input")
        self.gamma: Tensor | None = named(call, "weight")
        names = ("input", "weight", "bias") if has(call, "bias") else ("input", "weight")
        self.keys = [key_of(call, name) for name in names]
        self.mask = [call.needs(key) for key in self.keys]
        self.measures_gamma = self.mask[0] and self.gamma is not None and not may_read(call, self.keys[1], self.keys[0])
        self.measures_normalized = self.mask[1] and not may_read(call, self.keys[0], self.keys[1])

    def collect(self, found: tuple[Tensor, ...]) -> dict[Key, Tensor]:
        """What was asked for, of cotangents in the order of the operands."""
        return {key: g for key, g, asked in zip(self.keys, found, self.mask, strict=True) if asked}


# ---- batch normalization: statistics of every channel over batch and space ------------------------------------------


def _uses_batch_statistics(call: Call) -> bool:
    if has(call, "training"):
        return bool(named(call, "training"))
    return "with_update" in call.op.name


def _statistics(call: Call, training: bool) -> dict[Key, Any]:
    """Replacements for running statistics: ones that may move in training, else a mean of zero."""
    old = named(call, "running_mean") if has(call, "running_mean") else None
    if old is None:
        return {}
    if training and call.op.target is _NATIVE:  # takes none, and copies none
        return {3: None, 4: None}
    zeros = torch.zeros(old.shape, dtype=old.dtype, device=call.grad.device)
    mean: dict[Key, Any] = {key_of(call, "running_mean"): zeros}
    return {**mean, key_of(call, "running_var"): torch.ones_like(zeros)} if training else mean


@lru_cache(maxsize=256)
def _ones_and_their_negatives(channels: int, axes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    probe = torch.ones(2, channels, *[1] * axes, dtype=dtype, device=device)
    probe[1] = -1
    return probe


def _batch_gamma(call: Call, gamma: Tensor, training: bool, eps: float) -> Tensor:
    """By channel the slope of the output on x̂, seen on two samples of one pixel."""
    axes = call.grad.dim() - 2
    probe = _ones_and_their_negatives(gamma.shape[0], axes, gamma.dtype, call.grad.device)
    replaced: dict[Key, Any] = {key_of(call, "input"): probe, **_no_bias(call, gamma), **_statistics(call, training)}
    seen: Tensor = call.measure(replaced, probe)[0].flatten(1)
    if training:
        return _half_difference(seen, sqrt(1 + eps)).to(gamma.dtype)
    deviation: Tensor = (named(call, "running_var") + eps).sqrt()
    return (_half_difference(seen) * deviation).to(gamma.dtype)


def batch_norm(call: Call) -> Cotangents:
    """Batch normalization with the statistics of the batch, or with running ones."""
    if call.grads[0] is None:
        return {}
    operands = _Operands(call)
    gamma, mask = operands.gamma, operands.mask
    eps = float(named(call, "eps" if has(call, "eps") else "epsilon"))
    training = _uses_batch_statistics(call)
    mean, variance = (named(call, n) if has(call, n) else None for n in ("running_mean", "running_var"))
    if operands.measures_gamma and gamma is not None:
        gamma = _batch_gamma(call, gamma, training, eps)
    found = aten.native_batch_norm_backward(
        call.grad, operands.x, gamma, mean, variance, call.out[1], call.out[2], training, eps, mask
    )
    result = operands.collect(found)
    if operands.measures_normalized and gamma is not None:
        normalized = _measured_normalized(call, gamma, _statistics(call, True) if training else {})
        result[operands.keys[1]] = (call.grad * normalized).transpose(0, 1).flatten(1).sum(1)
    return result


# Operators that write to running statistics are recorded in their form out of place.
_NATIVE = out_of_place(aten.native_batch_norm.default, (3, 4))
vjp(_NATIVE, measures=True, lean=True)(batch_norm)
_WRITING = (
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._batch_norm_with_update.default,
)
vjp(*(out_of_place(target, (3, 4)) for target in _WRITING), measures=True, lean=True)(batch_norm)
vjp(
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
    aten._native_batch_norm_legit_functional.default,
    aten._batch_norm_no_update.default,
    aten._batch_norm_with_update_functional.default,
    measures=True,
)(batch_norm)


# ---- layer normalization: statistics of every sample (and token) over the last dimensions ---------------------------


@lru_cache(maxsize=256)
def _inverse_of_normalized(
    shape: tuple[int, ...], dtype: torch.dtype, of_probe: torch.dtype, eps: float, device: torch.device
) -> Tensor:
    """What the first row of signs is divided by to have one everywhere, once it is normalized; zero where it is."""
    count = prod(shape)
    mean = (count % 2) / count
    known = (_signs(shape, of_probe, device)[0].to(dtype) - mean) / sqrt(1 - mean**2 + eps)
    return torch.where(known == 0, 0, 1 / known)  # one element alone has no slope


def _layer_gamma(call: Call, gamma: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
    probe = _signs(shape, gamma.dtype, call.grad.device)
    seen = _half_difference(call.measure({0: probe, 3: None}, probe)[0])
    return (seen * _inverse_of_normalized(shape, seen.dtype, gamma.dtype, eps, seen.device)).to(gamma.dtype)


@vjp(aten.native_layer_norm.default, measures=True, lean=True)
def layer_norm(call: Call) -> Cotangents:
    """Normalization over the last dimensions."""
    if call.grads[0] is None:
        return {}
    operands = _Operands(call)
    shape, bias, eps = tuple(call.args[1]), call.args[3], float(call.args[4])
    gamma = operands.gamma
    if operands.measures_gamma and gamma is not None:
        gamma = _layer_gamma(call, gamma, shape, eps)
    found = aten.native_layer_norm_backward(
        call.grad, operands.x, shape, call.out[1], call.out[2], gamma, bias, operands.mask
    )
    result = operands.collect(found)
    if operands.measures_normalized and gamma is not None:
        result[operands.keys[1]] = (call.grad * _measured_normalized(call, gamma, {})).sum_to_size(shape)
    return result


@vjp(aten._fused_rms_norm.default, measures=True)
def rms_norm(call: Call) -> Cotangents:
    """Division by the root of the mean square over the last dimensions, where the device has a kernel for it."""
    operands = _Operands(call)
    shape, rstd = tuple(call.args[1]), call.out[1]
    assert rstd is not None
    x, gamma, g, of_rstd = operands.x, operands.gamma, call.grads[0], call.grads[1]
    dims = tuple(range(-len(shape), 0))
    normalized = x * rstd
    result: dict[Key, Tensor] = {}
    if operands.mask[0]:
        found = torch.zeros_like(normalized)
        if g is not None:
            if operands.measures_gamma and gamma is not None:
                gamma = _rms_gamma(call, gamma, x.dtype, shape)
            pulled = g if gamma is None else g * gamma
            found = rstd * (pulled - normalized * (pulled * normalized).mean(dims, keepdim=True))
        if of_rstd is not None:
            found = found - of_rstd * rstd.square() * normalized / prod(shape)
        result[0] = found
    if operands.mask[1] and g is not None and gamma is not None:
        if operands.measures_normalized:
            normalized = _measured_normalized(call, gamma, {})
        result[operands.keys[1]] = (g * normalized).sum_to_size(shape)
    return result


def _rms_gamma(call: Call, gamma: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    given = named(call, "eps")
    eps = torch.finfo(dtype).eps if given is None else float(given)
    probe = _signs(shape, dtype, gamma.device)
    seen = _half_difference(call.measure({0: probe}, probe)[0])
    return (seen * sqrt(1 + eps) / probe[0]).to(gamma.dtype)


# ---- group normalization: statistics of every sample over groups of channels and space ------------------------------


@vjp(aten.native_group_norm.default, measures=True, lean=True)
def group_norm(call: Call) -> Cotangents:
    """Normalization of every sample over groups of channels."""
    operands = _Operands(call)
    batch, channels, space, groups, eps = call.args[3:8]
    x, gamma, g = operands.x, operands.gamma, call.grads[0]
    mean, rstd = call.out[1], call.out[2]
    assert mean is not None
    assert rstd is not None
    result: dict[Key, Tensor] = {}
    if g is not None:
        if operands.measures_gamma and gamma is not None:
            gamma = _group_gamma(call, gamma, float(eps))
        form = _memory_format(x)
        found = aten.native_group_norm_backward(
            g.contiguous(memory_format=form), x.contiguous(memory_format=form), mean, rstd, gamma, batch, channels,
            space, groups, [True, operands.mask[1], operands.mask[2]],  # without the first, channels last crash
        )  # fmt: skip
        result = operands.collect(found)
        if operands.measures_normalized and gamma is not None:
            normalized = _measured_normalized(call, gamma, {})
            result[operands.keys[1]] = (g * normalized).transpose(0, 1).flatten(1).sum(1)
    if operands.mask[0] and (call.grads[1] is not None or call.grads[2] is not None):
        through = _through_statistics(x.reshape(batch, groups, -1), mean, rstd, call.grads[1], call.grads[2])
        result[0] = through.view(x.shape) if g is None else result[0] + through.view(x.shape)
    return result


def _group_gamma(call: Call, gamma: Tensor, eps: float) -> Tensor:
    """By channel, on one sample of two pixels."""
    channels = gamma.shape[0]
    probe = torch.ones(1, channels, 2, dtype=gamma.dtype, device=call.grad.device)
    probe[..., 1] = -1
    seen = call.measure({0: probe, 2: None, 3: 1, 5: 2}, probe)[0]
    return (_half_difference(seen[0].t()) * sqrt(1 + eps)).to(gamma.dtype)


def _through_statistics(
    x: Tensor, mean: Tensor, rstd: Tensor, of_mean: Tensor | None, of_rstd: Tensor | None
) -> Tensor:
    found = torch.zeros_like(x)
    if of_mean is not None:
        found = found + of_mean.unsqueeze(-1) / x.shape[-1]
    if of_rstd is not None:
        found = found - (of_rstd * rstd**3).unsqueeze(-1) * (x - mean.unsqueeze(-1)) / x.shape[-1]
    return found


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.device.type == "cpu" and not x.is_contiguous():
        for dims, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dims and x.is_contiguous(memory_format=form):
                return form
    return torch.contiguous_format


@vjp(aten._weight_norm_interface.default)
def weight_norm(call: Call) -> Cotangents:
    """A direction times a length: a weight made of weights, in which nothing else is carried."""
    if call.grads[0] is None:
        return {}
    v, g = call.args[:2]
    found = aten._weight_norm_interface_backward(call.grad.contiguous(), v, g, call.out[1], call.arg(2, "dim", 0))
    return {k: found[k] for k in (0, 1) if call.needs(k)}


# ---- derivatives taken inside the model -----------------------------------------------------------------------------


def _inverse_deviation(x: Tensor, mean: Tensor, given: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``1 / sqrt(variance + ε)`` as a function of the input, with the value that was given; ε is what makes it so."""
    variance = (x - mean).square().mean(dims, keepdim=True)
    eps = (given.pow(-2) - variance).detach()
    return (variance + eps).rsqrt()


def _normalizing_backward(
    g: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, inverse: Tensor, dims: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """The cotangent of the input; and ``g x̂``. ``dims``: of the statistics, None where they are constants."""
    normalized = (x - mean) * inverse
    pulled = g if gamma is None else g * gamma
    if dims is None:
        return pulled * inverse, g * normalized
    along = normalized * (pulled * normalized).mean(dims, keepdim=True)
    return inverse * (pulled - pulled.mean(dims, keepdim=True) - along), g * normalized


def _asked(mask: Any, *found: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(f if asked else None for f, asked in zip(found, mask, strict=True))


def _layer_norm_backward(
    g: Tensor, x: Tensor, shape: Any, _mean: Tensor, rstd: Tensor, gamma: Any, _bias: Any, mask: Any
) -> tuple[Tensor | None, ...]:
    dims = tuple(range(x.dim() - len(shape), x.dim()))
    center = x.mean(dims, keepdim=True)
    of_input, product = _normalizing_backward(g, x, gamma, center, _inverse_deviation(x, center, rstd, dims), dims)
    return _asked(mask, of_input, product.sum_to_size(shape), g.sum_to_size(shape))


def _batch_norm_backward(
    g: Tensor, x: Tensor, gamma: Any, running: tuple[Any, Any], inverse: Any, training: bool, eps: float, mask: Any
) -> tuple[Tensor | None, ...]:
    dims = (0, *range(2, x.dim()))
    shape = [1, -1, *[1] * (x.dim() - 2)]
    factor = None if gamma is None else gamma.view(shape)
    if training:
        center = x.mean(dims, keepdim=True)
        deviation = _inverse_deviation(x, center, inverse.view(shape), dims)
        of_input, product = _normalizing_backward(g, x, factor, center, deviation, dims)
    else:
        center, variance = (t.view(shape) for t in running)
        of_input, product = _normalizing_backward(g, x, factor, center, (variance + eps).rsqrt(), None)
    return _asked(mask, of_input, product.sum(dims), g.sum(dims))


@vjp(aten.native_layer_norm_backward.default)
def layer_norm_backward(call: Call) -> Cotangents:
    """The adjoint of a layer normalization, whose statistics depend on its input; by the calls it is made of."""
    return call.engine.again(call, _layer_norm_backward)


@vjp(aten.native_batch_norm_backward.default, aten.batch_norm_backward.default)
def batch_norm_backward(call: Call) -> Cotangents:
    """The adjoint of a batch normalization, whose statistics depend on its input; by the calls it is made of."""

    def written_out(*given: Any) -> tuple[Tensor | None, ...]:
        g, x, gamma, mean, variance, _, inverse, training, eps, mask = given[:10]
        return _batch_norm_backward(g, x, gamma, (mean, variance), inverse, training, eps, mask)

    return call.engine.again(call, written_out)


@vjp(aten.cudnn_batch_norm_backward.default)
def cudnn_batch_norm_backward(call: Call) -> Cotangents:
    """The same by cuDNN, which computes it in training only."""

    def written_out(*given: Any) -> tuple[Tensor | None, ...]:
        x, g, gamma, mean, variance, _, inverse, eps, _ = given
        return _batch_norm_backward(g, x, gamma, (mean, variance), inverse, True, eps, (True, True, True))

    return call.engine.again(call, written_out)

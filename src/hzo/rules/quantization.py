"""Fake quantization: rounding in the forward pass, and the straight-through slope, which is one inside the range.

This is no derivative but PyTorch's convention for training with rounded numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hzo.rules.arithmetic import hidden
from hzo.rules.base import Call, Cotangents, Key, vjp
from hzo.tape.functions import out_of_place

aten = torch.ops.aten

_FAR = 1e6
"""Times the largest operand: beyond the range of every quantizer, and within that of whole numbers."""


@vjp(
    aten.fake_quantize_per_tensor_affine_cachemask.default,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default,
    aten.fake_quantize_per_channel_affine_cachemask.default,
    out_of_place(aten._fused_moving_avg_obs_fq_helper.default, (3, 4, 5, 6)),
    aten._fused_moving_avg_obs_fq_helper_functional.default,
)
def fake_quantize(call: Call) -> Cotangents:
    """What is inside the range passes; the second result says what is."""
    inside = call.out[1]
    assert inside is not None
    return {0: call.grad * inside}


def _shown_range(call: Call, axis: int | None, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point by what comes out far below and far above the range; no weight is read.

    Cost: two samples.
    """
    x, scale = call.args[:2]
    size = [scale.numel() if d == axis else 1 for d in range(x.dim())]
    far = _FAR * max(1.0, float(x.abs().max()))
    below, above = (call.measure({0: x.new_full(size, sign * far)}, x[:1]).view(-1) for sign in (-1, 1))
    shown = (above - below) / (high - low)
    return shown, (low - below / shown).round()


def _learnable(call: Call, axis: int | None, low: int, high: int, grad_factor: float) -> Cotangents:
    x, scale, zero_point = call.args[:3]
    if call.needs(0) and hidden(call, 0, 1, 2):
        scale, zero_point = _shown_range(call, axis, low, high)
    if axis is None:
        carried = aten._fake_quantize_learnable_per_tensor_affine_backward(
            call.grad, x, scale, zero_point, low, high, grad_factor
        )
    else:
        carried = aten._fake_quantize_learnable_per_channel_affine_backward(
            call.grad, x, scale, zero_point, axis, low, high, grad_factor
        )
    keys: tuple[Key, ...] = (0, 1, 2)
    return {key: g for key, g in zip(keys, carried, strict=True) if call.needs(key)}


@vjp(aten._fake_quantize_learnable_per_tensor_affine.default, measures=True)
def learnable_per_tensor(call: Call) -> Cotangents:
    """A scale and a zero point that are learned (LSQ)."""
    return _learnable(call, None, call.args[3], call.args[4], call.arg(5, "grad_factor", 1.0))


@vjp(aten._fake_quantize_learnable_per_channel_affine.default, measures=True)
def learnable_per_channel(call: Call) -> Cotangents:
    """Scales and zero points of channels that are learned (LSQ)."""
    return _learnable(call, call.args[3], call.args[4], call.args[5], call.arg(6, "grad_factor", 1.0))

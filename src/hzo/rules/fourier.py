"""Fourier transforms: linear maps, whose VJP is the transform of the other direction with the same normalization.

Source: PyTorch's derivatives. Cotangents of complex tensors follow its convention (the conjugate of Wirtinger's).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, vjp

aten = torch.ops.aten


@vjp(aten._fft_c2c.default)
def fft_c2c(call: Call) -> Cotangents:
    """Complex to complex."""
    _, dims, normalization, forward = call.args
    return {0: aten._fft_c2c(call.grad, dims, normalization, not forward)}


@vjp(aten._fft_r2c.default)
def fft_r2c(call: Call) -> Cotangents:
    """Real to complex: all frequencies, or those that the others are conjugates of, which alone have a cotangent."""
    x, dims, normalization, onesided = call.args
    g: Tensor = call.grad
    if onesided:
        last, length = dims[-1], x.shape[dims[-1]]
        padding = [0, 0] * (g.dim() - 1 - last % g.dim()) + [0, length - g.shape[last]]
        g = aten.constant_pad_nd(g, padding)
    return {0: aten._fft_c2c(g, dims, normalization, False).real}


@vjp(aten._fft_c2r.default)
def fft_c2r(call: Call) -> Cotangents:
    """One half of the frequencies to real numbers: those that stand for two count twice."""
    _, dims, normalization, _ = call.args
    grad: Tensor = aten._fft_r2c(call.grad, dims, normalization, True)
    last = dims[-1]
    pairs = call.grad.shape[last] - grad.shape[last]
    if pairs > 0:
        grad.narrow(last, 1, pairs).mul_(2)
    return {0: grad}

"""Scans: running sums, products and extremes along a dimension. Their VJP runs the other way."""

from __future__ import annotations

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, vjp

aten = torch.ops.aten


def _backwards(g: Tensor, dim: int) -> Tensor:
    """For each element the sum of it and of all that follow."""
    return g if g.dim() == 0 or g.numel() == 0 else g.flip(dim).cumsum(dim).flip(dim)


@vjp(aten.cumsum.default)
def cumsum(call: Call) -> Cotangents:
    """Running sums."""
    return {0: _backwards(call.grad, call.args[1])}


@vjp(aten.cumprod.default)
def cumprod(call: Call) -> Cotangents:
    """Running products; behind a zero only that zero moves them."""
    x, dim = call.args[:2]
    x, g, y = x.to(call.grad.dtype), call.grad, call.result
    if x.dim() == 0 or x.numel() == 0:
        return {0: g}
    carried = _backwards(g * y.conj(), dim)
    zero = x == 0
    if not bool(zero.any()):
        return {0: carried / x.conj()}
    count = zero.cumsum(dim)
    first = zero & (count == 1)
    without = x.masked_fill(first, 1).cumprod(dim)
    of_zero = _backwards((g * without.conj()).masked_fill(count == 0, 0), dim)
    return {0: torch.where(first, of_zero, (carried / x.conj()).masked_fill(count > 0, 0))}


@vjp(aten.cummax.default, aten.cummin.default)
def cumulative_extreme(call: Call) -> Cotangents:
    """Running extremes, and where they stand: each result goes to the element that it is."""
    x, dim = call.args
    g, indices = call.grad, call.out[1]
    assert indices is not None
    if x.dim() == 0 or x.numel() == 0:
        return {0: g}
    return {0: g.new_zeros(x.shape).scatter_add(dim, indices, g)}


@vjp(aten.logcumsumexp.default)
def logcumsumexp(call: Call) -> Cotangents:
    """Running ``log(sum(exp(x)))``; cotangents by their logarithms, which cannot overflow, for each sign apart."""
    x, dim = call.args
    g, y = call.grad, call.result
    if x.dim() == 0 or x.numel() == 0:
        return {0: g}

    def part(sign: int) -> Tensor:
        logs = torch.where(g * sign > 0, g.abs(), 0).log() - y
        following: Tensor = (logs.flip(dim).logcumsumexp(dim).flip(dim) + x).exp()
        return following

    if g.is_complex():
        return {0: _backwards(g * y.neg().exp().conj(), dim) * x.exp().conj()}
    return {0: part(1) - part(-1)}

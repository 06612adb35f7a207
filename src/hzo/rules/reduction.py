"""Reductions: sums, means, variances, extremes, products and norms over some dimensions.

Their VJP gives every element its part of the cotangent of the result. ``dim`` may be one dimension, several, or none,
which means all; without ``keepdim`` the reduced dimensions are put back with size one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, vjp

aten = torch.ops.aten


def reduced_dims(dim: Any, rank: int) -> tuple[int, ...]:
    """The dimensions that are reduced, not negative; all of them for None and for an empty list."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return tuple(range(rank))
    given = dim if isinstance(dim, (list, tuple)) else (dim,)
    return tuple(sorted(d % max(rank, 1) for d in given)) if rank else ()


def restored(reduced: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """A result with the reduced dimensions at size one, as ``keepdim`` would have left it."""
    if not keepdim:
        for d in dims:
            reduced = reduced.unsqueeze(d)
    return reduced


def _count(shape: torch.Size, dims: tuple[int, ...]) -> int:
    return math.prod(shape[d] for d in dims)


# -- sums and means ----------------------------------------------------------------------------------------------------


def _options(call: Call) -> tuple[Tensor, tuple[int, ...], bool]:
    """Operand, dimensions and ``keepdim``, for signatures in this order."""
    x: Tensor = call.args[0]
    return x, reduced_dims(call.arg(1, "dim"), x.dim()), bool(call.arg(2, "keepdim", False))


@vjp(aten.sum.default, lean=True)
def sum_all(call: Call) -> Cotangents:
    """The sum of all elements."""
    return {0: call.grad.expand(call.args[0].shape)}


@vjp(aten.sum.dim_IntList, lean=True)
def sum_dims(call: Call) -> Cotangents:
    """The sum over dimensions."""
    x, dims, keepdim = _options(call)
    return {0: restored(call.grad, dims, keepdim).expand(x.shape)}


@vjp(aten.mean.default, lean=True)
def mean_all(call: Call) -> Cotangents:
    """The mean of all elements."""
    x = call.args[0]
    return {0: (call.grad / x.numel()).expand(x.shape)}


@vjp(aten.mean.dim, lean=True)
def mean_dims(call: Call) -> Cotangents:
    """The mean over dimensions."""
    x, dims, keepdim = _options(call)
    return {0: (restored(call.grad, dims, keepdim) / _count(x.shape, dims)).expand(x.shape)}


@vjp(aten.nansum.default)
def nansum(call: Call) -> Cotangents:
    """The sum of what is a number."""
    x, dims, keepdim = _options(call)
    return {0: restored(call.grad, dims, keepdim) * x.isnan().logical_not()}


# -- variances ---------------------------------------------------------------------------------------------------------


def _var_backward(call: Call, g: Tensor) -> Tensor:
    """``2 (x - mean) / (n - correction)`` for each element; ``n`` is how many are reduced."""
    x = call.args[0]
    dims = reduced_dims(call.arg(1, "dim"), x.dim())
    correction = call.kwargs.get("correction")
    degrees = _count(x.shape, dims) - (1 if correction is None else correction)
    scale = 2 / degrees if degrees else math.inf
    mean = x.mean(dims, True) if dims else x
    deviation: Tensor = x - mean
    return scale * restored(g, dims, call.kwargs.get("keepdim", False)) * deviation


def _std_backward(call: Call, g: Tensor) -> Tensor:
    std = call.result
    return _var_backward(call, (g / (2 * std)).masked_fill(std == 0, 0))


def _with_mean(call: Call, spread: Any) -> Cotangents:
    """For a spread and a mean in one call."""
    g_spread, g_mean = call.grads
    found = None if g_spread is None else spread(call, g_spread)
    if g_mean is not None:
        x = call.args[0]
        dims = reduced_dims(call.arg(1, "dim"), x.dim())
        part = restored(g_mean, dims, call.kwargs.get("keepdim", False)) / _count(x.shape, dims)
        found = part.expand(x.shape) if found is None else found + part
    return {0: found}


@vjp(aten.var.correction)
def var(call: Call) -> Cotangents:
    """The variance."""
    return {0: _var_backward(call, call.grad)}


@vjp(aten.std.correction)
def std(call: Call) -> Cotangents:
    """The standard deviation; slope zero where it is zero."""
    return {0: _std_backward(call, call.grad)}


@vjp(aten.var_mean.correction)
def var_mean(call: Call) -> Cotangents:
    """The variance and the mean."""
    return _with_mean(call, _var_backward)


@vjp(aten.std_mean.correction)
def std_mean(call: Call) -> Cotangents:
    """The standard deviation and the mean."""
    return _with_mean(call, _std_backward)


# -- extremes ----------------------------------------------------------------------------------------------------------


def _shared(g: Tensor, chosen: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Equal elements share the cotangent evenly."""
    count = chosen.sum(dims, True) if dims else chosen
    return g / count * chosen


@vjp(aten.amax.default, aten.amin.default)
def extreme(call: Call) -> Cotangents:
    """The largest or smallest element; equal ones share."""
    x, dims, keepdim = _options(call)
    chosen = restored(call.result, dims, keepdim) == x
    return {0: _shared(restored(call.grad, dims, keepdim), chosen, dims)}


@vjp(aten.aminmax.default)
def aminmax(call: Call) -> Cotangents:
    """The smallest and the largest element; equal ones share."""
    x = call.args[0]
    dims = reduced_dims(call.kwargs.get("dim"), x.dim())
    keepdim = call.kwargs.get("keepdim", False)
    total: Tensor | None = None
    for result, g in zip(call.out, call.grads, strict=True):
        if g is not None:
            assert result is not None
            part = _shared(restored(g, dims, keepdim), restored(result, dims, keepdim) == x, dims)
            total = part if total is None else total + part
    return {0: total}


@vjp(aten.max.default, aten.min.default, aten.median.default, aten.nanmedian.default)
def extreme_of_all(call: Call) -> Cotangents:
    """The largest, smallest or middle one of all elements; equal ones share."""
    x, value = call.args[0], call.result
    chosen = (x == value) | (x.isnan() & value.isnan())
    return {0: chosen * (call.grad / chosen.sum())}


@vjp(
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
)
def selected(call: Call) -> Cotangents:
    """One element along a dimension, and its index: that element takes all."""
    return _to_selected(call, call.arg(1, "dim", -1), call.arg(2, "keepdim", False))


@vjp(aten.kthvalue.default)
def kthvalue(call: Call) -> Cotangents:
    """The element of a rank along a dimension, and its index."""
    return _to_selected(call, call.arg(2, "dim", -1), call.arg(3, "keepdim", False))


def _to_selected(call: Call, dim: int, keepdim: bool) -> Cotangents:
    x, g, indices = call.args[0], call.grad, call.out[1]
    assert indices is not None
    if x.dim() == 0:
        return {0: g}
    if not keepdim:
        g, indices = g.unsqueeze(dim), indices.unsqueeze(dim)
    return {0: g.new_zeros(x.shape).scatter(dim, indices, g)}


# -- products ----------------------------------------------------------------------------------------------------------


def _products_of_others(x: Tensor, dim: int) -> Tensor:
    """For each element the product of all others along a dimension; exact where some are zero."""
    one = x.new_ones(()).expand([1 if d == dim % x.dim() else n for d, n in enumerate(x.shape)])
    inner = x.shape[dim] - 1
    before = torch.cat([one, x.narrow(dim, 0, inner)], dim).cumprod(dim)
    after = torch.cat([one, x.narrow(dim, 1, inner).flip(dim)], dim).cumprod(dim).flip(dim)
    return before * after


def _prod_backward(g: Tensor, x: Tensor, result: Tensor, dim: int) -> Tensor:
    """``g`` and ``result`` with the reduced dimension at size one."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    slope = _products_of_others(x, dim) if bool((x == 0).any()) else result / x
    return g * slope.conj()


@vjp(aten.prod.default)
def prod_all(call: Call) -> Cotangents:
    """The product of all elements."""
    x = call.args[0].to(call.grad.dtype)
    return {0: _prod_backward(call.grad, x.reshape(-1), call.result, 0).view(x.shape)}


@vjp(aten.prod.dim_int)
def prod_dim(call: Call) -> Cotangents:
    """The product over a dimension."""
    x, dims, keepdim = _options(call)
    x = x.to(call.grad.dtype)
    if x.dim() == 0:
        return {0: call.grad}
    g, result = restored(call.grad, dims, keepdim), restored(call.result, dims, keepdim)
    return {0: _prod_backward(g, x, result, dims[0])}


# -- logarithms of sums ------------------------------------------------------------------------------------------------


@vjp(aten.logsumexp.default)
def logsumexp(call: Call) -> Cotangents:
    """``log(sum(exp(x)))``: the softmax times the cotangent."""
    x, dims, keepdim = _options(call)
    result = restored(call.result, dims, keepdim)
    return {0: restored(call.grad, dims, keepdim) * (x - result).exp().conj()}


# -- norms -------------------------------------------------------------------------------------------------------------


def norm_backward(g: Tensor, x: Tensor, p: float, norm: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """The VJP of a vector norm; ``g`` and ``norm`` with the reduced dimensions at size one. None for ``p`` of zero.

    Slope zero where the norm is; equal largest elements share. Source: ``norm_backward`` of PyTorch.
    """
    if p == 0:
        return None
    if math.isinf(p):
        size = x.abs()
        return x.sgn() * _shared(g, (size == norm) | (size.isnan() & norm.isnan()), dims)
    if p == 1:
        return x.sgn() * g
    if p >= 2:
        direction = x if p == 2 else x * x.abs().pow(p - 2)
        return direction * (g / norm.pow(p - 1)).masked_fill(norm == 0, 0)
    power, scale = x.sgn() * x.abs().pow(p - 1), g * norm.pow(1 - p)
    return power * scale.masked_fill(norm == 0, 0) if p > 1 else power.masked_fill(x == 0, 0) * scale


def _norm(call: Call, p: Any, dim: Any, keepdim: bool) -> Cotangents:
    x = call.args[0].to(call.grad.dtype) if not call.args[0].is_complex() else call.args[0]
    dims = reduced_dims(dim, x.dim())
    g, norm = restored(call.grad, dims, keepdim), restored(call.result, dims, keepdim)
    return {0: norm_backward(g, x, 2.0 if p is None else float(p), norm, dims)}


@vjp(aten.linalg_vector_norm.default)
def vector_norm(call: Call) -> Cotangents:
    """A vector norm of any order."""
    return _norm(call, call.arg(1, "ord", 2), call.arg(2, "dim"), call.arg(3, "keepdim", False))


@vjp(
    aten.norm.Scalar,
    aten.norm.ScalarOpt_dim,
    aten.norm.ScalarOpt_dtype,
    aten.norm.ScalarOpt_dim_dtype,
)
def norm(call: Call) -> Cotangents:
    """The older spellings of a vector norm."""
    return _norm(call, call.arg(1, "p", 2), call.arg(2, "dim"), call.arg(3, "keepdim", False))


@vjp(aten.dist.default)
def dist(call: Call) -> Cotangents:
    """The norm of a difference."""
    a, b = call.args[:2]
    difference = a - b
    dims = tuple(range(difference.dim()))
    p = float(call.arg(2, "p", 2))
    g, size = restored(call.grad, dims, False), restored(call.result, dims, False)
    carried = norm_backward(g, difference, p, size, dims)
    found: dict[Key, Tensor] = {}
    if carried is None:
        return found
    if call.needs(0):
        found[0] = carried.sum_to_size(a.shape)
    if call.needs(1):
        found[1] = -carried.sum_to_size(b.shape)
    return found


@vjp(aten.renorm.default)
def renorm(call: Call) -> Cotangents:
    """Slices along a dimension, scaled down to a largest norm."""
    x, p, dim, largest = call.args
    g = call.grad
    dims = tuple(d for d in range(x.dim()) if d != dim % x.dim())
    size = torch.linalg.vector_norm(x, p, dims, True)
    along = x.conj() * g
    along = (torch.view_as_real(along)[..., 0] if along.is_complex() else along).sum(dims, True)
    inverse = (size + 1e-7).reciprocal()
    radial = norm_backward(along, x, float(p), size, dims)
    scaled = g if radial is None else g - inverse * radial
    return {0: torch.where(size > largest, largest * inverse * scaled, g)}

"""Sparse matrices: constants, as graphs have them, or made of learned values. Plain products are in products.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hzo.rules.arithmetic import scaled
from hzo.rules.base import Call, Cotangents, vjp
from hzo.rules.products import addend, adjoint, may_read, right_factor

aten = torch.ops.aten


@vjp(aten._sparse_addmm.default, measures=True)
def sparse_addmm(call: Call) -> Cotangents:
    """``beta * c + alpha * a @ b`` with a sparse ``a``, whose cotangent has the entries that it has."""
    a, b = call.args[1:3]
    alpha = call.kwargs.get("alpha", 1)
    found = addend(call)
    if call.needs(1):
        right = b if may_read(call, 2, 1) else right_factor(call, 1)
        found[1] = scaled((call.grad @ right.mH).sparse_mask(a.coalesce()), alpha)
    if call.needs(2):
        found[2] = scaled(adjoint(a) @ call.grad, alpha)
    return found


@vjp(aten._sparse_mm_reduce_impl.default)
def sparse_reduce(call: Call) -> Cotangents:
    """Sums, means or extremes of the rows of a matrix that those of a sparse one select."""
    a, b, reduce = call.args
    mask = [call.needs(0), call.needs(1)]
    found = aten._sparse_mm_reduce_impl_backward(a, call.grad, b, reduce, call.out[1], mask)
    return {k: found[k] for k in (0, 1) if mask[k]}


@vjp(aten._to_dense.default)
def to_dense(call: Call) -> Cotangents:
    """The cotangent at the entries that the sparse matrix has."""
    a = call.args[0]
    return {0: call.grad.sparse_mask(a.coalesce() if a.layout == torch.sparse_coo else a)}


@vjp(aten._coalesce.default)
def coalesce(call: Call) -> Cotangents:
    """The same matrix, every entry stored once."""
    return {0: call.grad}


@vjp(aten._to_sparse.default, aten._to_sparse.sparse_dim)
def to_sparse(call: Call) -> Cotangents:
    """The entries of a dense matrix that are not zero."""
    return {0: call.grad.to_dense()}


@vjp(aten._sparse_softmax.default)
def sparse_softmax(call: Call) -> Cotangents:
    """Softmax over the entries of each row that a sparse matrix has."""
    return {0: aten._sparse_softmax_backward_data(_sparse(call), call.result, call.args[1], call.args[0])}


@vjp(aten._sparse_log_softmax.default)
def sparse_log_softmax(call: Call) -> Cotangents:
    """Its logarithm."""
    return {0: aten._sparse_log_softmax_backward_data(_sparse(call), call.result, call.args[1], call.args[0])}


def _sparse(call: Call) -> Tensor:
    """The cotangent at the entries of the result."""
    g = call.grad
    return g if g.is_sparse else g.sparse_mask(call.result)


@vjp(aten._sparse_coo_tensor_with_dims_and_tensors.default)
def sparse_from_values(call: Call) -> Cotangents:
    """A sparse tensor from indices and values: the cotangents at these places."""
    indices = call.args[3]
    g = call.grad.to_dense() if call.grad.is_sparse else call.grad
    return {4: g[tuple(indices)]}

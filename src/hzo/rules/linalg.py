"""Inverses, solutions, decompositions and functions of matrices, from the results that the call left behind.

Where a matrix is a weight and what it is applied to an activation (``solve``), the inverse is measured: the operator
runs on an identity. Cost: as many samples as the matrix has rows. Source: PyTorch's derivatives, and their limits:
vectors of a decomposition have a derivative where their values are distinct, and up to a phase where they are complex.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo.errors import TapeError
from hzo.rules.base import Call, Cotangents, Key, present, unbroadcast, vjp
from hzo.rules.products import may_read

aten = torch.ops.aten


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)


def _identity(call: Call, matrix: Tensor) -> Tensor:
    """An identity for every matrix of a batch."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=call.grad.device)
    return eye.expand(*matrix.shape[:-2], -1, -1)


def _result(call: Call, k: int) -> Tensor:
    out = call.out[k]
    assert out is not None
    return out


def _with_half_of_diagonal(x: Tensor) -> Tensor:
    """``x`` with its diagonal halved, in place."""
    _diagonal(x).mul_(0.5)
    return x


# -- inverses and solutions -------------------------------------------------------------------------------------------


@vjp(aten.linalg_inv_ex.default)
def linalg_inv_ex(call: Call) -> Cotangents:
    """``A^-1``."""
    adjoint = call.result.mH
    return {0: -(adjoint @ call.grad @ adjoint)}


@vjp(aten._linalg_solve_ex.default, measures=True)
def linalg_solve_ex(call: Call) -> Cotangents:
    """``X`` with ``A X = B``, or with ``X A = B``; also for one vector on the right."""
    a, b = call.args[:2]
    left = call.kwargs.get("left", True)
    g, x = call.grad, call.result
    vector = b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])
    if vector:
        g, x = g.unsqueeze(-1), x.unsqueeze(-1)
    if may_read(call, 0, 1):
        grad_b = torch.linalg.solve(a.mH, g, left=left)
    else:
        eye = _identity(call, a)
        grad_b = _applied(call.measure({1: eye}, eye)[0].mH, g, left)
    return _of_solution(call, x, grad_b, left, vector)


def _applied(inverse: Tensor, g: Tensor, left: bool) -> Tensor:
    return inverse @ g if left else g @ inverse


def _of_solution(call: Call, x: Tensor, grad_b: Tensor, left: bool, vector: bool = False) -> dict[Key, Tensor]:
    """From the cotangent of ``B`` those of both operands, ``A`` the first."""
    a, b = call.args[:2]
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = unbroadcast(-(grad_b @ x.mH) if left else -(x.mH @ grad_b), a)
    if call.needs(1):
        found[1] = unbroadcast(grad_b.squeeze(-1) if vector else grad_b, b)
    return found


@vjp(aten.linalg_solve_triangular.default, measures=True)
def linalg_solve_triangular(call: Call) -> Cotangents:
    """``X`` with ``A X = B``, or with ``X A = B``, of which one triangle of ``A`` is read."""
    a = call.args[0]
    upper, left = call.kwargs["upper"], call.kwargs.get("left", True)
    unit = call.kwargs.get("unitriangular", False)
    if may_read(call, 0, 1):
        grad_b = torch.linalg.solve_triangular(a.mH, call.grad, upper=not upper, left=left, unitriangular=unit)
    else:
        eye = _identity(call, a)
        grad_b = _applied(call.measure({1: eye}, eye).mH, call.grad, left)
    found = _of_solution(call, call.result, grad_b, left)
    if 0 in found:
        found[0] = found[0].triu(int(unit)) if upper else found[0].tril(-int(unit))
    return found


@vjp(aten.triangular_solve.default, measures=True)
def triangular_solve(call: Call) -> Cotangents:
    """``X`` with ``A X = B``, or with the transpose of ``A``, and ``A`` again. The operands are ``B`` and ``A``."""
    b, a = call.args[:2]
    upper, transpose, unit = (
        call.arg(2, "upper", True),
        call.arg(3, "transpose", False),
        call.arg(4, "unitriangular", False),
    )
    g, passed = call.grads
    found: dict[Key, Tensor] = {}
    if passed is not None:
        found[1] = passed
    if g is None:
        return found
    if may_read(call, 1, 0):
        grad_b = aten.triangular_solve(g, a.conj(), upper, not transpose, unit)[0]
    else:
        eye = _identity(call, a)
        grad_b = call.measure({0: eye}, eye)[0].mH @ g
    if call.needs(0):
        found[0] = unbroadcast(grad_b, b)
    if call.needs(1):
        x = call.result
        grad = -(x.conj() @ grad_b.mT) if transpose else -(grad_b @ x.mH)
        grad = unbroadcast(grad.triu(int(unit)) if upper else grad.tril(-int(unit)), a)
        found[1] = grad if passed is None else grad + passed
    return found


@vjp(aten.linalg_lstsq.default, measures=True)
def linalg_lstsq(call: Call) -> Cotangents:
    """Least squares: ``X = pinv(A) B``, and the sums of squares that remain."""
    a, b = call.args[:2]
    g, of_residuals = call.grads[:2]
    x = call.result
    found: dict[Key, Tensor] = {}
    vector = b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])
    if vector:
        b, x, g = b.unsqueeze(-1), x.unsqueeze(-1), None if g is None else g.unsqueeze(-1)
    grad_a = grad_b = None
    if g is not None:
        if may_read(call, 0, 1):
            inverse = torch.linalg.pinv(a)
        else:
            eye = torch.eye(a.shape[-2], dtype=a.dtype, device=g.device).expand(*a.shape[:-2], -1, -1)
            inverse = call.measure({1: eye}, eye)[0]
        grad_b = inverse.mH @ g
        if call.needs(0):
            grad_a = _of_pseudoinverse(g @ b.mH, inverse, a)
    if of_residuals is not None and of_residuals.numel():
        gap = 2 * of_residuals.unsqueeze(-2) * (a @ x - b)
        if call.needs(0):
            grad_a = gap @ x.mH if grad_a is None else grad_a + gap @ x.mH
        grad_b = -gap if grad_b is None else grad_b - gap
    if grad_a is not None:
        found[0] = grad_a
    if grad_b is not None and call.needs(1):
        found[1] = grad_b.squeeze(-1) if vector else grad_b
    return found


@vjp(aten.linalg_pinv.atol_rtol_tensor)
def linalg_pinv(call: Call) -> Cotangents:
    """The pseudoinverse, where the rank does not change."""
    return {0: _of_pseudoinverse(call.grad, call.result, call.args[0])}


def _of_pseudoinverse(grad: Tensor, inverse: Tensor, a: Tensor) -> Tensor:
    adjoint, g = inverse.mH, grad.mH
    if a.shape[-2] <= a.shape[-1]:
        k = g @ inverse
        inner = k @ adjoint
        return -(inverse @ k).mH + inner - (a @ inverse) @ inner + (adjoint @ inverse) @ (g - k @ a)
    k = inverse @ g
    inner = adjoint @ k
    return -(k @ inverse).mH + (g - a @ k) @ inverse @ adjoint + inner - (inner @ inverse) @ a


# -- Cholesky ---------------------------------------------------------------------------------------------------------


@vjp(aten.linalg_cholesky_ex.default, *present("aten::cholesky"))  # the second until torch 2.13
def cholesky(call: Call) -> Cotangents:
    """``L`` with ``A = L L^H``."""
    upper = call.arg(1, "upper", False)
    factor = call.result.mH if upper else call.result
    g = call.grad.mH if upper else call.grad
    grad = (factor.mH @ g).tril()
    grad = 0.5 * (grad + grad.tril(-1).mH)
    grad = torch.linalg.solve_triangular(factor.mH, grad, upper=True)
    return {0: torch.linalg.solve_triangular(factor, grad, upper=False, left=False)}


@vjp(aten.cholesky_inverse.default)
def cholesky_inverse(call: Call) -> Cotangents:
    """``A^-1`` from the factor of ``A``."""
    factor, inverse = call.args[0], call.result
    common = inverse @ ((call.grad + call.grad.mH) @ inverse)
    return {0: -(factor @ common) if call.arg(1, "upper", False) else -(common @ factor)}


@vjp(aten.cholesky_solve.default, measures=True)
def cholesky_solve(call: Call) -> Cotangents:
    """``A^-1 B`` from the factor of ``A``; ``B`` is the first operand."""
    b, factor = call.args[:2]
    upper = call.arg(2, "upper", False)
    if may_read(call, 1, 0):
        grad_b = aten.cholesky_solve(call.grad, factor, upper)
    else:
        eye = _identity(call, factor)
        grad_b = call.measure({0: eye}, eye).mH @ call.grad
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = unbroadcast(grad_b, b)
    if call.needs(1):
        common = grad_b @ call.result.mH
        common = common + common.mH
        found[1] = unbroadcast(-(factor @ common) if upper else -(common @ factor), factor)
    return found


# -- LU ---------------------------------------------------------------------------------------------------------------


@vjp(aten.linalg_lu_factor_ex.default)
def linalg_lu_factor_ex(call: Call) -> Cotangents:
    """``L`` and ``U`` packed into one matrix, and the pivots."""
    lu, pivots = _result(call, 0), _result(call, 1)
    pivot = call.kwargs.get("pivot", True)
    p, lower, upper = aten.lu_unpack(lu, pivots, True, pivot)
    k = min(lu.shape[-2:])
    return {0: _of_lu(call.grad[..., :k], call.grad[..., :k, :], p if pivot else None, lower, upper)}


@vjp(aten.linalg_lu.default)
def linalg_lu(call: Call) -> Cotangents:
    """``A = P L U``."""
    pivot = call.kwargs.get("pivot", True)
    _, grad_l, grad_u = call.grads
    return {0: _of_lu(grad_l, grad_u, _result(call, 0) if pivot else None, _result(call, 1), _result(call, 2))}


def _of_lu(grad_l: Tensor | None, grad_u: Tensor | None, p: Tensor | None, lower: Tensor, upper: Tensor) -> Tensor:
    """From cotangents of the factors that of ``A``; a tall or wide rest follows from the square part."""
    k = lower.shape[-1]
    m, n = lower.shape[-2], upper.shape[-1]
    l1, u1 = lower[..., :k, :], upper[..., :k]
    like = lower if grad_l is None else grad_l
    square = like.new_zeros(*l1.shape[:-2], k, k)
    rest = None
    if grad_l is not None:
        square = square + (l1.mH @ grad_l[..., :k, :]).tril(-1)
    if grad_u is not None:
        square = square + (grad_u[..., :k] @ u1.mH).triu()
    if m > k and grad_l is not None:
        l2, grad_l2 = lower[..., k:, :], grad_l[..., k:, :]
        square = square - (l2.mH @ grad_l2).triu()
        rest = torch.linalg.solve_triangular(u1.mH, grad_l2, upper=False, left=False)
    if n > k and grad_u is not None:
        u2, grad_u2 = upper[..., k:], grad_u[..., k:]
        square = square - (grad_u2 @ u2.mH).tril(-1)
        rest = torch.linalg.solve_triangular(l1.mH, grad_u2, upper=True, unitriangular=True)
    grad = torch.linalg.solve_triangular(l1.mH, square, upper=True, unitriangular=True)
    grad = torch.linalg.solve_triangular(u1.mH, grad, upper=False, left=False)
    if m != n:
        if rest is None:
            rest = grad.new_zeros(*grad.shape[:-2], *((m - k, n) if m > k else (m, n - k)))
        grad = torch.cat([grad, rest], -2 if m > k else -1)
    found: Tensor = grad if p is None else p @ grad
    return found


@vjp(aten.lu_unpack.default)
def lu_unpack(call: Call) -> Cotangents:
    """The factors out of one matrix."""
    packed = call.args[0]
    _, grad_l, grad_u = call.grads
    given = grad_l if grad_l is not None else grad_u
    assert given is not None
    grad = given.new_zeros(packed.shape)
    k = min(packed.shape[-2:])
    if grad_l is not None:
        grad[..., :k] += grad_l.tril(-1)
    if grad_u is not None:
        grad[..., :k, :] += grad_u.triu()
    return {0: grad}


@vjp(aten.linalg_lu_solve.default, measures=True)
def linalg_lu_solve(call: Call) -> Cotangents:
    """``X`` with ``A X = B`` (or ``X A``, or the adjoint of ``A``) from packed factors."""
    lu, pivots, b = call.args[:3]
    left, adjoint = call.kwargs.get("left", True), call.kwargs.get("adjoint", False)
    g, x = call.grad, call.result
    if may_read(call, 0, 2):
        grad_b = aten.linalg_lu_solve(lu, pivots, g, left=left, adjoint=not adjoint)
    else:
        eye = _identity(call, lu)
        grad_b = _applied(call.measure({2: eye}, eye).mH, g, left)
    found: dict[Key, Tensor] = {}
    if call.needs(2):
        found[2] = unbroadcast(grad_b, b)
    if call.needs(0):
        of_matrix = grad_b @ x.mH if left else x.mH @ grad_b
        p, lower, upper = aten.lu_unpack(lu, pivots)
        of_matrix = p.mT @ -(of_matrix.mH if adjoint else of_matrix)
        grad = (of_matrix @ upper.mH).tril(-1) + (lower.mH @ of_matrix).triu()
        found[0] = unbroadcast(grad, lu)
    return found


# -- determinants -----------------------------------------------------------------------------------------------------


@vjp(aten._linalg_det.default)
def linalg_det(call: Call) -> Cotangents:
    """The determinant: its derivative is the matrix of cofactors, also where the matrix is singular.

    Computed from singular values as a product without one of them, which needs no division.
    """
    a = call.args[0]
    u, s, vh = torch.linalg.svd(a)
    n = s.shape[-1]
    others = s.unsqueeze(-2).expand(*s.shape, n).clone()
    _diagonal(others).fill_(1)
    phase = (torch.linalg.det(u) * torch.linalg.det(vh)).conj()
    cofactors = (u * (others.prod(-1) * phase.unsqueeze(-1)).unsqueeze(-2)) @ vh
    return {0: call.grad[..., None, None] * cofactors}


@vjp(aten._linalg_slogdet.default)
def linalg_slogdet(call: Call) -> Cotangents:
    """Sign and logarithm of the determinant."""
    a, sign = call.args[0], _result(call, 0)
    of_sign, of_log = call.grads[:2]
    g: Any = 0 if of_log is None else of_log
    if of_sign is not None and sign.is_complex():
        g = g - 1j * (of_sign.conj() * sign).imag
    if not isinstance(g, Tensor):  # the sign of a real matrix
        return {}
    inverse, _ = aten.linalg_inv_ex(a)
    return {0: g[..., None, None] * inverse.mH}


# -- orthogonal factors -----------------------------------------------------------------------------------------------


@vjp(aten.linalg_qr.default)
def linalg_qr(call: Call) -> Cotangents:
    """``A = Q R``.

    Raises:
        TapeError: ``Q`` is larger than ``A`` determines (``mode="complete"`` of a tall matrix), or was not computed
            (``mode="r"``): PyTorch has no derivative there either.
    """
    q, r = _result(call, 0), _result(call, 1)
    mode = call.arg(1, "mode", "reduced")
    m, n = call.args[0].shape[-2:]
    if mode == "r" or (mode == "complete" and m > n):
        raise TapeError(
            f"expected linalg.qr with mode='reduced' on the path of a gradient, got mode={mode!r} for {m} x {n}: the "
            "factor Q is not determined or not computed; use mode='reduced'"
        )
    grad_q, grad_r = call.grads
    if m >= n:
        return {0: _of_square_qr(grad_q, grad_r, q, r)}
    # A wide matrix [X, Y]: X = Q U, and V = Q^H Y is what Q makes of the rest.
    u, v = r[..., :m], r[..., m:]
    if grad_r is None:
        grad_x = _of_square_qr(grad_q, None, q, u)
        return {0: torch.cat([grad_x, grad_x.new_zeros(*grad_x.shape[:-1], n - m)], -1)}
    grad_v = grad_r[..., m:]
    of_q = (q @ v) @ grad_v.mH
    grad_x = _of_square_qr(of_q if grad_q is None else grad_q + of_q, grad_r[..., :m], q, u)
    return {0: torch.cat([grad_x, q @ grad_v], -1)}


def _of_square_qr(grad_q: Tensor | None, grad_r: Tensor | None, q: Tensor, r: Tensor) -> Tensor:
    """Of a matrix that is not wide: the part of the rotation that keeps ``R`` triangular, and what leaves the span."""
    inner: Any = 0
    if grad_r is not None:
        inner = grad_r @ r.mH
    if grad_q is not None:
        inner = inner - q.mH @ grad_q
    inner = inner.triu()
    grad = q @ _with_half_of_diagonal(inner + inner.mH)
    if grad_q is not None:
        grad = grad + grad_q
    found: Tensor = torch.linalg.solve_triangular(r.mH, grad, upper=False, left=False)
    return found


@vjp(aten.linalg_householder_product.default)
def linalg_householder_product(call: Call) -> Cotangents:
    """The first columns of a product of reflections ``1 - tau v v^H``."""
    vectors, taus = call.args
    grad_v, grad_tau = _of_reflections(vectors, taus, call.grad, call.result)
    return {0: grad_v, 1: grad_tau}


@vjp(aten.ormqr.default)
def ormqr(call: Call) -> Cotangents:
    """A product of reflections, or its adjoint, times a matrix, from the left or from the right."""
    vectors, taus, other = call.args[:3]
    left, adjoint = call.arg(3, "left", True), call.arg(4, "transpose", False)
    g = call.grad
    grad_other = aten.ormqr(vectors, taus, g, left, not adjoint)
    found: dict[Key, Tensor] = {}
    if call.needs(2):
        found[2] = grad_other
    if call.needs(0) or call.needs(1):
        # As a product Q M with a cotangent of its own: of Q^H M that of M is Q times it, and of M Q all is transposed.
        if left:
            cotangent, product = (other, grad_other) if adjoint else (g, call.result)
        else:
            cotangent, product = (g.mH, call.result.mH) if adjoint else (other.mH, grad_other.mH)
        found[0], found[1] = _of_reflections(vectors, taus, cotangent, product)
    return found


def _of_reflections(vectors: Tensor, taus: Tensor, cotangent: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of the reflections ``H_1 ... H_k`` whose product with some matrix is known, one after the other.

    Each reflection is taken off the product by its inverse, so that no product in between is kept.
    """
    grad_vectors, grad_taus = torch.zeros_like(vectors), torch.zeros_like(taus)
    lower = vectors.tril(-1)
    for k in range(taus.shape[-1]):
        v = lower[..., k : k + 1].clone()
        v[..., k, 0] = 1
        tau = taus[..., k, None, None]
        inverse = tau / (tau * (v.mH @ v) - 1)
        product = product - inverse * (v @ (v.mH @ product))
        seen = product.mH @ v
        sent = cotangent.mH @ v
        along = sent.mH @ seen
        grad_taus[..., k] = -along[..., 0, 0]
        grad = -tau.conj() * (cotangent @ seen) - tau * (product @ sent)
        grad_vectors[..., k + 1 :, k] = grad[..., k + 1 :, 0]
        cotangent = cotangent - tau.conj() * (v @ sent.mH)
    return grad_vectors, grad_taus


# -- singular values and eigenvalues ----------------------------------------------------------------------------------


@vjp(aten._linalg_svd.default)
def linalg_svd(call: Call) -> Cotangents:
    """``A = U S V^H``.

    Raises:
        TapeError: the loss looks at the phase of complex singular vectors, which is not determined.
    """
    u, s, vh = (_result(call, k) for k in range(3))
    grad_u, grad_s, grad_vh = call.grads
    k = s.shape[-1]
    if call.arg(1, "full_matrices", False):  # what completes a basis has no derivative
        u, vh = u[..., :k], vh[..., :k, :]
        grad_u = None if grad_u is None else grad_u[..., :k]
        grad_vh = None if grad_vh is None else grad_vh[..., :k, :]
    if grad_u is None and grad_vh is None:
        assert grad_s is not None
        return {0: (u * grad_s.unsqueeze(-2).to(u.dtype)) @ vh}
    by_u = None if grad_u is None else u.mH @ grad_u
    by_v = None if grad_vh is None else vh @ grad_vh.mH
    if u.is_complex():
        _check_phase(sum(_diagonal(x) for x in (by_u, by_v) if x is not None), "singular vectors")
    gaps = (s * s).unsqueeze(-2) - (s * s).unsqueeze(-1)
    _diagonal(gaps).fill_(1)
    inner: Any = 0
    if by_u is not None:
        skew = by_u - by_u.mH
        inner = inner + (skew / gaps) * s.unsqueeze(-2)
        if u.is_complex() and by_v is not None:
            inner = inner + (_diagonal(skew) / (2 * s)).diag_embed()
    if by_v is not None:
        inner = inner + s.unsqueeze(-1) * ((by_v - by_v.mH) / gaps)
    if grad_s is not None:
        inner = inner + grad_s.diag_embed()
    grad = u @ inner @ vh
    if grad_u is not None and u.shape[-2] > k:
        outside = grad_u / s.unsqueeze(-2)
        grad = grad + (outside - u @ (u.mH @ outside)) @ vh
    if grad_vh is not None and vh.shape[-1] > k:
        outside = grad_vh / s.unsqueeze(-1)
        grad = grad + u @ (outside - (outside @ vh.mH) @ vh)
    return {0: grad}


def _check_phase(diagonal: Any, what: str) -> None:
    if not torch.allclose(diagonal.imag, torch.zeros_like(diagonal.imag), atol=1e-2, rtol=1e-2):
        raise TapeError(
            f"expected a loss that does not depend on the phase of complex {what}, which is not determined; use "
            "their absolute values, or products with their conjugates"
        )


@vjp(aten._linalg_eigh.default)
def linalg_eigh(call: Call) -> Cotangents:
    """Eigenvalues and eigenvectors of a Hermitian matrix.

    Raises:
        TapeError: the loss looks at the phase of complex eigenvectors, which is not determined.
    """
    values, vectors = _result(call, 0), _result(call, 1)
    of_values, of_vectors = call.grads
    if of_vectors is None:
        assert of_values is not None
        return {0: (vectors * of_values.unsqueeze(-2)) @ vectors.mH}
    inner = vectors.mH @ of_vectors
    if vectors.is_complex():
        _check_phase(_diagonal(inner), "eigenvectors")
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    _diagonal(gaps).fill_(1)
    inner = 0.5 * (inner - inner.mH) / gaps
    _diagonal(inner).fill_(0) if of_values is None else _diagonal(inner).copy_(of_values)
    return {0: vectors @ inner @ vectors.mH}


@vjp(aten.linalg_eig.default)
def linalg_eig(call: Call) -> Cotangents:
    """Eigenvalues and eigenvectors of any square matrix.

    Raises:
        TapeError: the loss looks at the phase of eigenvectors, which is not determined.
    """
    values, vectors = _result(call, 0), _result(call, 1)
    of_values, of_vectors = call.grads
    if of_vectors is None:
        assert of_values is not None
        inner = of_values.unsqueeze(-1) * vectors.mH
    else:
        inner = vectors.mH @ of_vectors
        diagonal = _diagonal(inner)
        _check_phase(diagonal, "eigenvectors")
        inner = inner - vectors.mH @ (vectors * diagonal.real.unsqueeze(-2))  # they stay of length 1
        gaps = (values.unsqueeze(-2) - values.unsqueeze(-1)).conj().resolve_conj()
        _diagonal(gaps).fill_(1)
        inner = inner / gaps
        _diagonal(inner).fill_(0) if of_values is None else _diagonal(inner).copy_(of_values)
        inner = inner @ vectors.mH
    grad = torch.linalg.solve(vectors.mH, inner)
    return {0: grad if call.args[0].is_complex() else grad.real}


# -- functions and products -------------------------------------------------------------------------------------------


@vjp(aten.linalg_matrix_exp.default)
def linalg_matrix_exp(call: Call) -> Cotangents:
    """``exp(A)``: the derivative stands beside the exponential of a matrix of twice the size."""
    adjoint, g = call.args[0].mH, call.grad
    n = adjoint.shape[-1]
    whole = torch.cat([torch.cat([adjoint, g], -1), torch.cat([torch.zeros_like(adjoint), adjoint], -1)], -2)
    return {0: torch.linalg.matrix_exp(whole)[..., :n, n:]}


@vjp(aten.linalg_cross.default, measures=True)
def linalg_cross(call: Call) -> Cotangents:
    """The product of two vectors of three; where one is a weight, what it makes of the three axes is measured."""
    dim = call.kwargs.get("dim", -1)
    g = call.grad
    found: dict[Key, Tensor] = {}
    for of, by in ((0, 1), (1, 0)):
        if not call.needs(of):
            continue
        if may_read(call, by, of):
            other = call.args[by].conj()
            grad = torch.linalg.cross(*((other, g) if of == 0 else (g, other)), dim=dim)
        else:
            parts = []
            for axis in range(3):
                probe = torch.zeros(g.shape, dtype=call.args[of].dtype, device=g.device)
                probe.select(dim, axis).fill_(1)
                parts.append((call.measure({of: probe}, probe).conj() * g).sum(dim))
            grad = torch.stack(parts, dim)
        found[of] = unbroadcast(grad, call.args[of])
    return found

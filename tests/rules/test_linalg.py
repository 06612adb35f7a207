"""Functions of matrices, each against autograd."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from hzo.errors import TapeError
from hzo.reverse import record
from hzo.rules import linalg
from hzo.rules.base import rules
from support.tape_oracle import check, leaves_of

# Still there, and said to go.
pytestmark = pytest.mark.filterwarnings("ignore:torch.(triangular_solve|cholesky) is deprecated")

L = torch.linalg
aten = torch.ops.aten
TYPES = [torch.float64, torch.complex128]


def positive(a):
    return a @ a.mH + 0.5 * torch.eye(a.shape[-1], dtype=a.dtype)


def symmetric(a):
    return a + a.mH


def triangle(a):
    return a.tril() + 2 * torch.eye(a.shape[-1], dtype=a.dtype)


def invariant(u):
    """Of vectors up to a phase, what does not depend on it."""
    return u.abs(), u[..., None, :] * u[..., :, None, :].conj()


def with_values(w, v):
    return w, *invariant(v)


# name of the operator, a function of leaves, their shapes
CASES = [
    ("aten.linalg_inv_ex.default", L.inv, [(2, 3, 3)]),
    ("aten.linalg_inv_ex.default", lambda a: L.inv_ex(a)[0].inverse(), [(3, 3)]),
    ("aten._linalg_solve_ex.default", L.solve, [(3, 3), (3, 2)]),
    ("aten._linalg_solve_ex.default", L.solve, [(2, 3, 3), (2, 3)]),
    ("aten._linalg_solve_ex.default", L.solve, [(3, 3), (3,)]),
    ("aten._linalg_solve_ex.default", L.solve, [(4, 1, 3, 3), (2, 3, 5)]),
    ("aten._linalg_solve_ex.default", lambda a, b: L.solve(a, b, left=False), [(3, 3), (2, 2, 3)]),
    ("aten._linalg_solve_ex.default", lambda a, b: L.solve(a.mT, b), [(2, 3, 3), (3, 2)]),
    (
        "aten.linalg_solve_triangular.default",
        lambda a, b: L.solve_triangular(triangle(a), b, upper=False),
        [(3, 3), (2, 3, 2)],
    ),
    (
        "aten.linalg_solve_triangular.default",
        lambda a, b: L.solve_triangular(triangle(a).mH, b, upper=True, left=False),
        [(2, 3, 3), (2, 3)],
    ),
    (
        "aten.linalg_solve_triangular.default",
        lambda a, b: L.solve_triangular(a, b, upper=True, unitriangular=True),
        [(3, 3), (3, 2)],
    ),
    (
        "aten.linalg_solve_triangular.default",
        lambda a, b: L.solve_triangular(a, b, upper=False, left=False, unitriangular=True),
        [(3, 3), (2, 3)],
    ),
    (
        "aten.triangular_solve.default",
        lambda a, b: torch.triangular_solve(b, triangle(a), upper=False),
        [(3, 3), (3, 2)],
    ),
    (
        "aten.triangular_solve.default",
        lambda a, b: torch.triangular_solve(b, triangle(a).mT, transpose=True)[0],
        [(3, 3), (2, 3, 2)],
    ),
    (
        "aten.triangular_solve.default",
        lambda a, b: torch.triangular_solve(b, a, unitriangular=True)[0],
        [(3, 3), (3, 2)],
    ),
    ("aten.triangular_solve.default", lambda a, b: torch.triangular_solve(b, a * b.sum())[1], [(3, 3), (3, 2)]),
    ("aten.linalg_lstsq.default", lambda a, b: L.lstsq(a, b)[:1], [(5, 3), (5, 2)]),
    ("aten.linalg_lstsq.default", lambda a, b: L.lstsq(a, b)[:2], [(2, 5, 3), (2, 5, 2)]),
    ("aten.linalg_lstsq.default", lambda a, b: L.lstsq(a, b)[0], [(3, 5), (3, 2)]),
    ("aten.linalg_pinv.atol_rtol_tensor", L.pinv, [(2, 3, 4)]),
    ("aten.linalg_pinv.atol_rtol_tensor", L.pinv, [(4, 3)]),
    ("aten.linalg_pinv.atol_rtol_tensor", lambda a: L.pinv(symmetric(a), hermitian=True), [(3, 3)]),
    ("aten.linalg_cholesky_ex.default", lambda a: L.cholesky(positive(a)), [(2, 3, 3)]),
    ("aten.linalg_cholesky_ex.default", lambda a: L.cholesky(positive(a), upper=True), [(3, 3)]),
    *[  # gone after torch 2.13
        ("aten.cholesky.default", lambda a, upper=upper: torch.cholesky(positive(a), upper=upper), [(3, 3)])
        for upper in (False, True)
        if hasattr(torch.ops.aten, "cholesky")
    ],
    ("aten.cholesky_inverse.default", lambda a: torch.cholesky_inverse(triangle(a)), [(2, 3, 3)]),
    ("aten.cholesky_inverse.default", lambda a: torch.cholesky_inverse(triangle(a).mH, upper=True), [(3, 3)]),
    ("aten.cholesky_solve.default", lambda a, b: torch.cholesky_solve(b, triangle(a)), [(3, 3), (2, 3, 2)]),
    (
        "aten.cholesky_solve.default",
        lambda a, b: torch.cholesky_solve(b, triangle(a).mH, upper=True),
        [(2, 3, 3), (3, 2)],
    ),
    ("aten.linalg_lu_factor_ex.default", lambda a: L.lu_factor(a)[0], [(2, 3, 3)]),
    ("aten.linalg_lu_factor_ex.default", lambda a: L.lu_factor(a)[0], [(5, 3)]),
    ("aten.linalg_lu_factor_ex.default", lambda a: L.lu_factor(a)[0], [(3, 5)]),
    ("aten.linalg_lu.default", lambda a: L.lu(a)[1:], [(2, 3, 3)]),
    ("aten.linalg_lu.default", lambda a: L.lu(a)[1:], [(5, 3)]),
    ("aten.linalg_lu.default", lambda a: L.lu(a)[1:], [(3, 5)]),
    ("aten.linalg_lu.default", lambda a: L.lu(a)[1], [(3, 5)]),
    ("aten.linalg_lu.default", lambda a: L.lu(a)[2], [(5, 3)]),
    ("aten.lu_unpack.default", lambda a: torch.lu_unpack(*L.lu_factor(a)), [(2, 3, 3)]),
    ("aten.lu_unpack.default", lambda a: torch.lu_unpack(*L.lu_factor(a))[1], [(5, 3)]),
    ("aten.lu_unpack.default", lambda a: torch.lu_unpack(*L.lu_factor(a))[2], [(3, 5)]),
    *[
        (
            "aten.linalg_lu_solve.default",
            lambda a, b, left=left, adjoint=adjoint: L.lu_solve(*L.lu_factor(a), b, left=left, adjoint=adjoint),
            [(3, 3), (2, 3, 3)],
        )
        for left in (True, False)
        for adjoint in (True, False)
    ],
    ("aten._linalg_det.default", L.det, [(2, 3, 3)]),
    ("aten._linalg_det.default", lambda a: L.det(a.mT), [(4, 4)]),
    ("aten._linalg_det.default", L.det, [(1, 1)]),
    ("aten._linalg_slogdet.default", L.slogdet, [(2, 3, 3)]),
    ("aten._linalg_slogdet.default", lambda a: torch.logdet(positive(a)).real, [(3, 3)]),
    ("aten.linalg_qr.default", L.qr, [(2, 3, 3)]),
    ("aten.linalg_qr.default", L.qr, [(5, 3)]),
    ("aten.linalg_qr.default", lambda a: L.qr(a)[0], [(5, 3)]),
    ("aten.linalg_qr.default", lambda a: L.qr(a)[1], [(5, 3)]),
    ("aten.linalg_householder_product.default", lambda a, t: L.householder_product(a * 0.3, t), [(2, 5, 3), (2, 3)]),
    ("aten.linalg_householder_product.default", lambda a, t: L.householder_product(a, t * 0.1), [(4, 4), (2,)]),
    ("aten._linalg_svd.default", L.svdvals, [(2, 3, 4)]),
    ("aten._linalg_svd.default", L.svdvals, [(4, 3)]),
    ("aten._linalg_svd.default", lambda a: L.matrix_norm(a, "nuc") + L.matrix_norm(a, 2), [(4, 3)]),
    ("aten._linalg_eigh.default", lambda a: L.eigvalsh(symmetric(a)), [(2, 3, 3)]),
    ("aten._linalg_eigh.default", L.eigvalsh, [(3, 3)]),
    ("aten._linalg_eigh.default", lambda a: L.eigvalsh(a, UPLO="U"), [(3, 3)]),
    ("aten._linalg_eigh.default", lambda a: invariant(L.eigh(symmetric(a))[1]), [(2, 3, 3)]),
    ("aten._linalg_eigh.default", lambda a: with_values(*L.eigh(symmetric(a))), [(3, 3)]),
    ("aten.linalg_eig.default", L.eigvals, [(2, 3, 3)]),
    ("aten.linalg_eig.default", lambda a: invariant(L.eig(a)[1]), [(3, 3)]),
    ("aten.linalg_eig.default", lambda a: with_values(*L.eig(a)), [(2, 3, 3)]),
    ("aten.linalg_matrix_exp.default", L.matrix_exp, [(2, 3, 3)]),
    ("aten.linalg_matrix_exp.default", lambda a: L.matrix_exp(a - a.mH), [(4, 4)]),
    ("aten.linalg_cross.default", L.cross, [(4, 3), (4, 3)]),
    ("aten.linalg_cross.default", lambda a, b: L.cross(a, b, dim=0), [(3, 4), (3, 1)]),
    ("aten.mm.default", lambda a: L.matrix_power(a, 5), [(3, 3)]),
    ("aten.linalg_inv_ex.default", lambda a: L.matrix_power(a, -2), [(3, 3)]),
    ("aten.mul.Tensor", torch.kron, [(2, 3), (3, 2)]),
    ("aten.mm.default", lambda a, b, c: L.multi_dot([a, b, c]), [(2, 3), (3, 4), (4, 2)]),
    ("aten._linalg_solve_ex.default", L.tensorsolve, [(2, 3, 6), (2, 3)]),
    ("aten.linalg_inv_ex.default", lambda a: L.tensorinv(a, ind=1), [(6, 2, 3)]),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("name", "function", "shapes"), CASES)
def test_gradient(name, function, shapes, dtype):
    torch.manual_seed(5)
    check(function, leaves_of(*shapes, dtype=dtype), calls=[name], tolerance=1e-8)


REAL = [
    ("aten.linalg_qr.default", L.qr, [(2, 3, 5)]),
    ("aten.linalg_qr.default", lambda a: L.qr(a)[0], [(3, 5)]),
    ("aten.linalg_qr.default", lambda a: L.qr(a)[1], [(3, 5)]),
    ("aten.linalg_qr.default", lambda a: L.qr(a, mode="complete"), [(3, 5)]),
    ("aten._linalg_svd.default", lambda a: L.svd(a, full_matrices=False), [(2, 3, 3)]),
    ("aten._linalg_svd.default", lambda a: L.svd(a, full_matrices=False), [(5, 3)]),
    ("aten._linalg_svd.default", lambda a: L.svd(a, full_matrices=False), [(3, 5)]),
    ("aten._linalg_svd.default", lambda a: L.svd(a, full_matrices=False)[0], [(5, 3)]),
    ("aten._linalg_svd.default", lambda a: L.svd(a, full_matrices=False)[2], [(5, 3)]),
    ("aten._linalg_svd.default", lambda a: L.svd(a, full_matrices=False)[:2], [(3, 5)]),
    ("aten._linalg_svd.default", lambda a: (*L.svd(a)[:2], L.svd(a)[2][:3]), [(3, 5)]),
    ("aten._linalg_eigh.default", lambda a: L.eigh(symmetric(a)), [(2, 3, 3)]),
    ("aten._linalg_eigh.default", lambda a: L.eigh(a, UPLO="U"), [(3, 3)]),
    ("aten.linalg_pinv.atol_rtol_tensor", lambda a: L.pinv(a @ a.mT), [(4, 2)]),
    ("aten._linalg_slogdet.default", L.slogdet, [(3, 3)]),
    *[
        (
            "aten.ormqr.default",
            lambda a, t, c, left=left, transpose=transpose: torch.ormqr(a * 0.4, t, c, left, transpose),
            [(4, 3), (3,), (4, 4)],
        )
        for left in (True, False)
        for transpose in (True, False)
    ],
]


@pytest.mark.parametrize(("name", "function", "shapes"), REAL)
def test_gradient_of_real_matrices(name, function, shapes):
    torch.manual_seed(5)
    check(function, leaves_of(*shapes), calls=[name], tolerance=1e-8)


def test_complex_singular_vectors():
    def function(a):
        u, s, vh = L.svd(a, full_matrices=False)
        return (u[:, :2] * s[:2] ** 2) @ vh[:2], u.abs(), vh.abs()

    check(function, leaves_of((4, 3), dtype=torch.complex128), tolerance=1e-8)


def test_complex_qr_of_a_wide_matrix():
    check(L.qr, leaves_of((3, 5), dtype=torch.complex128), tolerance=1e-8)


@pytest.mark.parametrize("function", [lambda a: L.svd(a)[0], lambda a: L.eigh(symmetric(a))[1], lambda a: L.eig(a)[1]])
def test_phases_have_no_derivative(function):
    (a,) = leaves_of((3, 3), dtype=torch.complex128)
    with record() as step:
        loss = function(a).imag.sum()
    with pytest.raises(TapeError, match="phase"):
        step.gradients(loss)


@pytest.mark.parametrize("mode", ["complete", "r"])
def test_qr_without_a_derivative(mode):
    (a,) = leaves_of((5, 3))
    with record() as step:
        loss = L.qr(a, mode=mode)[1].sum()
    with pytest.raises(TapeError, match="mode='reduced'"):
        step.gradients(loss)


@pytest.mark.parametrize("rank", [1, 2])
def test_determinant_of_a_singular_matrix(rank):
    """The cofactors are there, where PyTorch divides by a determinant of zero."""
    a = torch.randn(3, rank, dtype=torch.float64) @ torch.randn(rank, 3, dtype=torch.float64)
    a.requires_grad_()
    with record() as step:
        loss = L.det(a)
    ((_, gradient),) = step.gradients(loss)
    minors = torch.zeros(3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            rows, columns = [r for r in range(3) if r != i], [c for c in range(3) if c != j]
            minors[i, j] = (-1) ** (i + j) * L.det(a.detach()[rows][:, columns])
    torch.testing.assert_close(gradient, minors, atol=1e-12, rtol=1e-9)


MEASURED = [
    ("aten._linalg_solve_ex.default", L.solve, [(3, 3), (3, 2)]),
    ("aten._linalg_solve_ex.default", L.solve, [(3, 3), (3,)]),
    ("aten._linalg_solve_ex.default", lambda w, x: L.solve(w, x, left=False), [(3, 3), (4, 2, 3)]),
    ("aten.linalg_solve_triangular.default", lambda w, x: L.solve_triangular(w, x, upper=True), [(3, 3), (3, 2)]),
    (
        "aten.linalg_solve_triangular.default",
        lambda w, x: L.solve_triangular(w, x, upper=False, left=False),
        [(3, 3), (2, 3)],
    ),
    ("aten.triangular_solve.default", lambda w, x: torch.triangular_solve(x, w)[0], [(3, 3), (3, 2)]),
    ("aten.triangular_solve.default", lambda w, x: torch.triangular_solve(x, w, transpose=True)[0], [(3, 3), (3, 2)]),
    ("aten.cholesky_solve.default", lambda w, x: torch.cholesky_solve(x, w), [(3, 3), (3, 2)]),
    ("aten.linalg_lstsq.default", lambda w, x: L.lstsq(w, x)[0], [(5, 3), (5, 2)]),
    (
        "aten.linalg_lu_solve.default",
        lambda w, x: L.lu_solve(w, torch.tensor([1, 2, 3], dtype=torch.int32), x),
        [(3, 3), (3, 2)],
    ),
    (
        "aten.linalg_lu_solve.default",
        lambda w, x: L.lu_solve(w, torch.tensor([1, 2, 3], dtype=torch.int32), x, left=False, adjoint=True),
        [(3, 3), (2, 3)],
    ),
    ("aten.linalg_cross.default", L.cross, [(1, 3), (4, 3)]),
    ("aten.linalg_cross.default", lambda w, x: L.cross(x, w, dim=0), [(3, 1), (3, 4)]),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("name", "function", "shapes"), MEASURED)
def test_weight_is_measured(name, function, shapes, dtype):
    check(lambda w, x: function(w, x * x), leaves_of(*shapes, dtype=dtype), weights=(0,), calls=[name], tolerance=1e-8)


def chip(gain):
    """A device whose results of these operators are off by a gain."""

    class Chip(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if str(func) not in {name for name, *_ in MEASURED}:
                return result
            if isinstance(result, torch.Tensor):
                return result.mul_(gain)
            result[0].mul_(gain)
            return result

    return Chip()


@pytest.mark.parametrize(("name", "function", "shapes"), MEASURED)
def test_no_weight_is_read_for_an_activation(name, function, shapes):
    """On a device with a gain of its own, what activations receive is what the device does."""
    w, x = leaves_of(*shapes)
    w = nn.Parameter(w.detach())
    exact = torch.func.vjp(lambda x: function(w.detach(), x), x.detach())
    cotangent = torch.randn_like(exact[0])
    with chip(1.5), record() as step:
        loss = (function(w, x) * cotangent).sum()
    with chip(1.5):
        found = {id(leaf): g for leaf, g in step.gradients(loss)}
    torch.testing.assert_close(found[id(x)], 1.5 * exact[1](cotangent)[0], rtol=1e-9, atol=1e-9)


class Parametrized(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer = make()

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


LAYERS = {
    "matrix_exp": lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp"),
    "cayley": lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"),
    "householder": lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="householder"),
    "matrix_exp, free": lambda: parametrizations.orthogonal(
        nn.Linear(4, 4), orthogonal_map="matrix_exp", use_trivialization=False
    ),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "spectral_norm of a kernel": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), parametrizations.spectral_norm(nn.Conv1d(1, 1, 3, padding=1)), nn.Flatten()
    ),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_parametrizations(name, cached):
    torch.manual_seed(0)
    model = Parametrized(LAYERS[name]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    twin = copy.deepcopy(model)
    x = torch.randn(3, 4, dtype=torch.float64)

    def loss_of(m):
        if cached:
            with nn.utils.parametrize.cached():
                return m(x).square().sum()
        return m(x).square().sum()

    loss_of(twin).backward()
    with record() as step:
        loss = loss_of(model)
    step.backward(loss)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)


def test_every_rule_has_a_case():
    named = {name for name, *_ in CASES + REAL}
    own = {str(target) for target, rule in rules.items() if rule.vjp.__module__ == linalg.__name__}
    assert own <= named, own - named

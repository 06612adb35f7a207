"""Reductions, scans and softmax: autograd's gradients in float64, at ties, zeros and masks too."""

import math

import pytest
import torch
import torch.nn.functional as F

from hzo.reverse import record
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten
DIMS = [None, 0, -1, (0, 2), (1,), ()]


def ties(x):
    """Many equal elements, and some zeros."""
    return (x * 2).round() / 2 + x * 0


def values(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype, requires_grad=True)


# ---- over some dimensions --------------------------------------------------------------------------------------------

OVER_DIMS = {
    "sum": (torch.sum, None),
    "mean": (torch.mean, None),
    "nansum": (torch.nansum, "aten.nansum.default"),
    "var": (torch.var, "aten.var.correction"),
    "std": (torch.std, "aten.std.correction"),
    "var of all": (lambda x, dim, keepdim: torch.var(x, dim, correction=0, keepdim=keepdim), "aten.var.correction"),
    "std, correction 2": (lambda x, dim, keepdim: torch.std(x, dim, correction=2, keepdim=keepdim), None),
    "var, correction 0.5": (lambda x, dim, keepdim: torch.var(x, dim, correction=0.5, keepdim=keepdim), None),
    "var_mean": (lambda x, dim, keepdim: torch.var_mean(x, dim, keepdim=keepdim), "aten.var_mean.correction"),
    "std_mean": (lambda x, dim, keepdim: torch.std_mean(x, dim, keepdim=keepdim), "aten.std_mean.correction"),
    "var alone": (lambda x, dim, keepdim: torch.var_mean(x, dim, keepdim=keepdim)[0], "aten.var_mean.correction"),
    "mean alone": (lambda x, dim, keepdim: torch.std_mean(x, dim, keepdim=keepdim)[1], "aten.std_mean.correction"),
    "amax": (torch.amax, "aten.amax.default"),
    "amin": (torch.amin, "aten.amin.default"),
    "amax, ties": (lambda x, dim, keepdim: torch.amax(ties(x), dim, keepdim), "aten.amax.default"),
    "logsumexp": (torch.logsumexp, "aten.logsumexp.default"),
    "norm": (lambda x, dim, keepdim: torch.norm(x, 2, dim, keepdim), None),
    "norm 3": (lambda x, dim, keepdim: torch.norm(x, 3, dim, keepdim), None),
    "frobenius": (lambda x, dim, keepdim: torch.norm(x, "fro", dim, keepdim), None),
}  # fmt: skip


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", DIMS, ids=str)
@pytest.mark.parametrize("case", OVER_DIMS)
def test_over_dimensions(case, dim, keepdim):
    function, call = OVER_DIMS[case]
    if dim is None and ("amax" in case or "amin" in case or case == "logsumexp"):
        dim = ()
    if case == "logsumexp" and dim == ():
        dim = (0, 1, 2)
    if dim == () and ("var" in case or "std" in case or case == "mean alone"):
        dim = None  # see below
    check(lambda x: function(x, dim, keepdim), leaves_of((3, 4, 5)), calls=[call] if call else None)


@pytest.mark.parametrize("function", [torch.var, torch.std], ids=lambda f: f.__name__)
def test_spreads_over_an_empty_list_of_dimensions(function):
    """Which means all; PyTorch's own derivative takes it for none, and is wrong."""
    (x,) = leaves_of((3, 4))
    with record() as step:
        loss = function(x, dim=())
    ((_, found),) = step.gradients(loss)
    (expected,) = torch.autograd.grad(function(x), x)
    assert torch.allclose(found, expected)


WHOLE = {
    "sum": (torch.sum, "aten.sum.default"),
    "mean": (torch.mean, "aten.mean.default"),
    "nansum": (torch.nansum, "aten.nansum.default"),
    "var": (torch.var, "aten.var.correction"),
    "std": (torch.std, "aten.std.correction"),
    "var_mean": (torch.var_mean, "aten.var_mean.correction"),
    "max": (torch.max, "aten.max.default"),
    "min": (torch.min, "aten.min.default"),
    "amax": (torch.amax, "aten.amax.default"),
    "amin": (torch.amin, "aten.amin.default"),
    "median": (torch.median, "aten.median.default"),
    "nanmedian": (torch.nanmedian, "aten.nanmedian.default"),
    "prod": (torch.prod, "aten.prod.default"),
    "norm": (torch.norm, None),
    "aminmax": (torch.aminmax, "aten.aminmax.default"),
    "argmax": (lambda x: x * torch.argmax(x), None),
    "counted": (lambda x: x * torch.count_nonzero(x) * x.any() * x.all(), None),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (3, 4)], ids=str)
@pytest.mark.parametrize("case", WHOLE)
def test_of_all_elements(case, shape, tied):
    function, call = WHOLE[case]
    if shape in ((), (1,)) and case in ("var", "std", "var_mean"):
        pytest.skip("not defined for one element")
    check(lambda x: function(ties(x) if tied else x), leaves_of(shape), calls=[call] if call else None)


SELECTED = {
    "max": (torch.max, "aten.max.dim"),
    "min": (torch.min, "aten.min.dim"),
    "median": (torch.median, "aten.median.dim"),
    "nanmedian": (torch.nanmedian, "aten.nanmedian.dim"),
    "mode": (torch.mode, "aten.mode.default"),
    "kthvalue": (lambda x, dim, keepdim: torch.kthvalue(x, 1, dim, keepdim), "aten.kthvalue.default"),
    "aminmax": (lambda x, dim, keepdim: torch.aminmax(x, dim=dim, keepdim=keepdim), "aten.aminmax.default"),
    "maximum alone": (lambda x, dim, keepdim: torch.aminmax(x, dim=dim, keepdim=keepdim)[1], "aten.aminmax.default"),
    "prod": (torch.prod, "aten.prod.dim_int"),
    "argmin": (lambda x, dim, keepdim: x * torch.argmin(x, dim, keepdim).sum(), None),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("shape", [(), (4,), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("case", SELECTED)
def test_along_a_dimension(case, dim, shape, keepdim, tied):
    function, call = SELECTED[case]
    check(lambda x: function(ties(x) if tied else x, dim, keepdim), leaves_of(shape), calls=[call] if call else None)


def test_dtypes_of_reductions():
    for function in (torch.sum, torch.mean, torch.prod, torch.nansum, lambda x, dtype: x.cumsum(0, dtype=dtype),
                     lambda x, dtype: x.cumprod(0, dtype=dtype), lambda x, dtype: x.softmax(0, dtype=dtype),
                     lambda x, dtype: x.log_softmax(0, dtype=dtype), lambda x, dtype: torch.norm(x, dtype=dtype),
                     lambda x, dtype: torch.linalg.vector_norm(x, 3, dtype=dtype)):  # fmt: skip
        check(lambda x, f=function: f(x, dtype=torch.float64), leaves_of((5,), dtype=torch.float32), tolerance=1e-5)


def test_reductions_of_nothing():
    for function in (torch.sum, torch.prod, torch.nansum, lambda x: x.sum(1), lambda x: x.prod(0), lambda x: x.sum(0),
                     lambda x: x.cumsum(0), lambda x: x.cumprod(1), lambda x: x.softmax(1), lambda x: x.norm(dim=1),
                     lambda x: x.logsumexp(1), lambda x: x.logcumsumexp(0), lambda x: x.amax(1)):  # fmt: skip
        check(function, leaves_of((0, 3)))


@pytest.mark.parametrize("function", [torch.sum, torch.mean, torch.var, torch.std, torch.prod, torch.norm],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_reductions_of_complex_numbers(function):
    check(function, leaves_of((5,), dtype=torch.complex128))
    check(lambda z: function(z, 1), leaves_of((2, 5), dtype=torch.complex128))


def test_spreads_of_equal_elements():
    check(lambda x: torch.std(x * 0 + 2), leaves_of((5,)))
    check(lambda x: torch.std_mean(x * 0 + 2, 0), leaves_of((5, 2)))
    check(lambda x: torch.var(x[:, None], 0), leaves_of((5,)))


def test_sums_without_what_is_not_a_number():
    check(torch.nansum, [values(1.0, math.nan, 3.0)])
    check(lambda x: x.nanmean(0), [values(1.0, math.nan, 3.0)])
    check(torch.nanmedian, [values(1.0, math.nan, 3.0, 3.0)])
    check(lambda x: x.nanmedian(0)[0], [values(1.0, math.nan, 3.0)])


# ---- products with zeros ---------------------------------------------------------------------------------------------

ZEROS = [(2.0, 3.0, 4.0), (0.0, 3.0, 4.0), (2.0, 0.0, 4.0), (2.0, 3.0, 0.0), (2.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0,)]


@pytest.mark.parametrize("numbers", ZEROS, ids=str)
def test_products_with_zeros(numbers):
    check(torch.prod, [values(*numbers)])
    check(lambda x: x.prod(0), [values(*numbers)])
    check(lambda x: torch.stack([x, x * 0 + 1]).prod(1, keepdim=True), [values(*numbers)])
    check(lambda x: x.cumprod(0), [values(*numbers)])
    check(lambda x: torch.stack([x, x.flip(0)], 1).cumprod(-2), [values(*numbers)])
    check(torch.prod, [values(*numbers, dtype=torch.complex128)])
    check(lambda x: x.cumprod(0), [values(*numbers, dtype=torch.complex128)])


# ---- norms -----------------------------------------------------------------------------------------------------------

ORDERS = [0, 0.5, 1, 1.5, 2, 2.0, 2.5, 3, math.inf, -math.inf, -1]


@pytest.mark.parametrize("dim", [None, 0, (0, 1), -1], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_vector_norms(order, keepdim, dim):
    call = ["aten.linalg_vector_norm.default"]
    check(lambda x: torch.linalg.vector_norm(x, order, dim, keepdim), leaves_of((3, 4)), calls=call)
    if order >= 0:
        check(lambda x: torch.linalg.vector_norm(ties(x), order, dim, keepdim), leaves_of((3, 4)))
        check(lambda x: torch.linalg.vector_norm(x * 0, order, dim, keepdim), leaves_of((3, 4)))
    check(lambda x: torch.linalg.vector_norm(x, order, dim), leaves_of((3, 4), dtype=torch.complex128))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_other_spellings_of_norms(order):
    (x,) = leaves_of((3, 4))
    check(lambda x: aten.norm.Scalar(x, order), [x], calls=["aten.norm.Scalar"])
    check(lambda x: aten.norm.ScalarOpt_dim(x, order, [1], True), [x], calls=["aten.norm.ScalarOpt_dim"])
    check(lambda x: aten.norm.ScalarOpt_dim(x, None, [1]), [x])
    single = leaves_of((3, 4), dtype=torch.float32)
    options = {"dtype": torch.float64}
    check(lambda x: aten.norm.ScalarOpt_dtype(x, order, **options), single, tolerance=1e-5)
    check(lambda x: aten.norm.ScalarOpt_dim_dtype(x, order, [0], False, **options), single, tolerance=1e-5)
    check(lambda x: torch.norm(x, order, 1), [x])


@pytest.mark.parametrize("order", ["fro", 1, -1, math.inf, -math.inf], ids=str)
def test_norms_of_matrices(order):
    check(lambda x: torch.linalg.matrix_norm(x, order), leaves_of((2, 3, 4)))
    check(lambda x: torch.linalg.norm(x, order, (0, 1), True), leaves_of((3, 4)))


@pytest.mark.parametrize("order", [0, 0.5, 1, 1.5, 2, 3, math.inf], ids=str)
def test_distances(order):
    if order:  # PyTorch fails on the derivative by the second operand, which is zero
        check(lambda a, b: torch.dist(a, b, order), leaves_of((3, 4), (3, 4)), calls=["aten.dist.default"])
        check(lambda a, b: torch.dist(a, b, order), leaves_of((3, 4), (4,)))
    check(lambda a: torch.dist(a, a.detach(), order), leaves_of((3, 4)))
    check(lambda a, b: F.pairwise_distance(a, b, order), leaves_of((3, 4), (3, 4)))


@pytest.mark.parametrize("order", [0.5, 1, 1.5, 2, 3, math.inf], ids=str)
def test_renorm(order):
    for dim in (0, 1, -1):
        check(lambda x, d=dim: torch.renorm(x, order, d, 1.5), leaves_of((3, 4, 2)), calls=["aten.renorm.default"])
    check(lambda x: torch.renorm(x, order, 0, 0.5), leaves_of((3, 4), dtype=torch.complex128))
    check(lambda x: (x * 1).renorm_(order, 0, 0.5), leaves_of((3, 4)))


@pytest.mark.parametrize("function", [F.normalize, lambda x: F.normalize(x, 1, 0), lambda x: F.normalize(x * 0)])
def test_normalized_vectors(function):
    check(function, leaves_of((3, 4)))


def test_similarities():
    check(F.cosine_similarity, leaves_of((3, 4), (3, 4)))
    check(lambda a, b: F.cosine_similarity(a[:, None], b[None], dim=-1), leaves_of((3, 4), (5, 4)))
    check(lambda a, b: F.cosine_similarity(a * 0, b), leaves_of((3, 4), (3, 4)))


# ---- scans -----------------------------------------------------------------------------------------------------------

SCANS = {
    "cumsum": torch.cumsum,
    "cumprod": torch.cumprod,
    "cummax": torch.cummax,
    "cummin": torch.cummin,
    "logcumsumexp": torch.logcumsumexp,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("case", SCANS)
def test_scans(case, dim, shape, tied):
    name = "default" if case.startswith("cum") or case == "logcumsumexp" else "dim"
    function = SCANS[case]
    check(lambda x: function(ties(x) if tied else x, dim), leaves_of(shape), calls=[f"aten.{case}.{name}"])


def test_scans_in_place_and_of_complex_numbers():
    check(lambda x: (x * 1).cumsum_(1), leaves_of((3, 4)))
    check(lambda x: (x * 1).cumprod_(1), leaves_of((3, 4)))
    for function in (torch.cumsum, torch.cumprod, torch.logcumsumexp):
        check(lambda x, f=function: f(x, 1), leaves_of((3, 4), dtype=torch.complex128))


def test_logarithms_of_running_sums_that_would_overflow():
    check(lambda x: torch.logcumsumexp(x * 200, 0), leaves_of((8,)))
    check(lambda x: torch.logsumexp(x * 500, 0), leaves_of((8,)))


# ---- softmax ---------------------------------------------------------------------------------------------------------

SOFTMAX = {
    "softmax": (lambda x: x.softmax(-1), "aten._softmax.default"),
    "softmax of columns": (lambda x: x.softmax(0), "aten._softmax.default"),
    "softmin": (lambda x: F.softmin(x, 1), "aten._softmax.default"),
    "log_softmax": (lambda x: x.log_softmax(-1), "aten._log_softmax.default"),
    "log_softmax of columns": (lambda x: x.log_softmax(0), "aten._log_softmax.default"),
    "safe softmax": (lambda x: aten._safe_softmax(x, -1), "aten._safe_softmax.default"),
    "safe softmax, all masked": (
        lambda x: aten._safe_softmax(x.masked_fill(torch.tensor([[True], [False], [False]]), -math.inf), -1), None,
    ),
    "masked": (lambda x: x.masked_fill(torch.ones(3, 4).triu(2) > 0, -math.inf).softmax(-1), None),
    "masked by the least number": (
        lambda x: (x + torch.ones(3, 4).triu(2).double() * torch.finfo(torch.float64).min).softmax(-1), None,
    ),
    "masked softmax": (
        lambda x: aten._masked_softmax(x, torch.ones(3, 4).triu(2) > 0, 1, 2), "aten._masked_softmax.default",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SOFTMAX)
def test_softmax(case):
    function, call = SOFTMAX[case]
    check(function, leaves_of((3, 4)), calls=[call] if call else None)


def test_softmax_of_one_number():
    check(lambda x: x.softmax(0) + x.log_softmax(0), leaves_of(()))


def test_softmax_from_half_to_single():
    with record() as step:
        x = torch.randn(3, 4, dtype=torch.bfloat16).requires_grad_()
        loss = F.softmax(x, -1, dtype=torch.float32).square().sum()
    ((_, found),) = step.gradients(loss)
    (expected,) = torch.autograd.grad(F.softmax(x, -1, dtype=torch.float32).square().sum(), x)
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, rtol=1e-2)

"""Products: autograd's gradients in float64; where a factor is a weight, what the hardware does with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hzo import count_queries
from hzo.reverse import record
from support.chip import follows, ramp
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten
WEIGHTS = [(), (0,), (1,), (0, 1)]


def complex_leaves(*shapes):
    return leaves_of(*shapes, dtype=torch.complex128)


# ---- two factors: none, one or both of them a weight ----------------------------------------------------------------

PAIRS = {
    "mm": (torch.mm, [(3, 4), (4, 5)], "aten.mm.default"),
    "mm of one row": (torch.mm, [(1, 4), (4, 1)], "aten.mm.default"),
    "mm empty": (torch.mm, [(3, 0), (0, 5)], "aten.mm.default"),
    "mm without rows": (torch.mm, [(0, 4), (4, 5)], "aten.mm.default"),
    "mm transposed": (lambda a, b: a.t() @ b.t(), [(4, 3), (5, 4)], "aten.mm.default"),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)], "aten.bmm.default"),
    "bmm transposed": (lambda a, b: torch.bmm(a.mT, b.mT), [(2, 4, 3), (2, 5, 4)], "aten.bmm.default"),
    "bmm without batch": (torch.bmm, [(0, 3, 4), (0, 4, 5)], "aten.bmm.default"),
    "mv": (torch.mv, [(3, 4), (4,)], "aten.mv.default"),
    "dot": (torch.dot, [(4,), (4,)], "aten.dot.default"),
    "vdot": (torch.vdot, [(4,), (4,)], "aten.vdot.default"),
    "matmul of four": (torch.matmul, [(2, 3, 4, 5), (2, 3, 5, 2)], "aten.bmm.default"),
    "matmul broadcast": (torch.matmul, [(2, 1, 4, 5), (3, 5, 2)], "aten.bmm.default"),
    "matmul, matrix on the left": (torch.matmul, [(4, 5), (2, 5, 3)], "aten.mm.default"),
    "matmul, matrix on the right": (torch.matmul, [(2, 4, 5), (5, 3)], "aten.mm.default"),
    "matmul, vector on the left": (torch.matmul, [(4,), (4, 3)], "aten.mm.default"),
    "matmul, batch and vector": (torch.matmul, [(2, 3, 4), (4,)], "aten.mv.default"),
    "linear": (F.linear, [(2, 3, 4), (5, 4)], "aten.mm.default"),
    "einsum of two": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(2, 3, 4), (2, 4, 5)], "aten.bmm.default"),
    "einsum of attention": (
        lambda a, b: torch.einsum("bqhd,bkhd->bhqk", a, b), [(2, 3, 2, 4), (2, 5, 2, 4)], "aten.bmm.default",
    ),
    "einsum, heads": (lambda a, b: torch.einsum("btd,hde->bhte", a, b), [(2, 3, 4), (2, 4, 5)], "aten.bmm.default"),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), [(3, 4, 5), (4, 5, 2)], "aten.mm.default"),
    "inner": (torch.inner, [(3, 4), (2, 4)], "aten.mm.default"),
    "kron": (torch.kron, [(2, 3), (3, 2)], None),
    "outer": (torch.outer, [(3,), (4,)], None),
    "cosine similarity": (F.cosine_similarity, [(3, 4), (3, 4)], None),
}  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", PAIRS)
def test_two_factors(case, weights):
    function, shapes, call = PAIRS[case]
    check(function, leaves_of(*shapes), weights=weights, calls=[call] if call else None)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", ["mm", "bmm", "mv", "dot", "vdot", "matmul, matrix on the left"])
def test_complex_factors(case, weights):
    function, shapes, call = PAIRS[case]
    check(function, complex_leaves(*shapes), weights=weights, calls=[call])


# ---- and an addend --------------------------------------------------------------------------------------------------

SUMS = {
    "addmm": (torch.addmm, [(3, 5), (3, 4), (4, 5)]),
    "addmm, bias": (torch.addmm, [(5,), (3, 4), (4, 5)]),
    "addmm, number": (torch.addmm, [(), (3, 4), (4, 5)]),
    "baddbmm": (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)]),
    "baddbmm, broadcast": (torch.baddbmm, [(3, 1), (2, 3, 4), (2, 4, 5)]),
    "addbmm": (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)]),
    "addbmm, broadcast": (torch.addbmm, [(5,), (2, 3, 4), (2, 4, 5)]),
    "addmv": (torch.addmv, [(3,), (3, 4), (4,)]),
    "addmv, number": (torch.addmv, [(1,), (3, 4), (4,)]),
    "addr": (torch.addr, [(3, 4), (3,), (4,)]),
    "addr, broadcast": (torch.addr, [(4,), (3,), (4,)]),
}


@pytest.mark.parametrize("weights", [(), (0,), (1,), (2,), (0, 2), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "beta": 2}, {"alpha": -1.5, "beta": 0}], ids=str)
@pytest.mark.parametrize("case", SUMS)
def test_with_an_addend(case, options, weights):
    function, shapes = SUMS[case]
    call = f"aten.{case.partition(',')[0]}.default"
    check(lambda *leaves: function(*leaves, **options), leaves_of(*shapes), weights=weights, calls=[call])


@pytest.mark.parametrize("weights", [(), (1,), (2,)], ids=str)
@pytest.mark.parametrize("case", SUMS)
def test_complex_with_an_addend(case, weights):
    function, shapes = SUMS[case]
    options = {"alpha": 0.5 - 1j, "beta": 2 + 0.5j}
    check(lambda *leaves: function(*leaves, **options), complex_leaves(*shapes), weights=weights)


def test_linear_in_all_shapes():
    for shape in [(4,), (3, 4), (2, 3, 4)]:
        check(F.linear, leaves_of(shape, (5, 4), (5,)), weights=(1, 2), calls=["aten.addmm.default"])


# ---- products of three ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(), (2, 3), (0, 2, 3), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("batch", [(3,), (2, 3), (), (0,)], ids=str)
def test_bilinear(weights, batch):
    check(F.bilinear, leaves_of((*batch, 4), (*batch, 3), (5, 4, 3), (5,)), weights=weights,
          calls=["aten._trilinear.default"])  # fmt: skip


@pytest.mark.parametrize("sizes", [[2, 5], [0, 7], [3, 3]], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_grouped_products(sizes, weights):
    offs = torch.tensor(sizes).cumsum(0).clamp(max=7).to(torch.int32)
    rows = int(offs[-1])
    x, w = leaves_of((rows, 8), (2, 8, 12), dtype=torch.float32)
    grouped = lambda x, w: torch._grouped_mm(x, w, offs=offs) * 1.0  # noqa: E731
    check(grouped, [x, w], weights=weights, calls=["aten._grouped_mm.default"], tolerance=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_grouped_products_of_a_batch(weights):
    leaves = leaves_of((2, 4, 8), (2, 8, 12), dtype=torch.float32)
    check(lambda x, w: torch._grouped_mm(x, w) * 1.0, leaves, weights=weights, calls=["aten._grouped_mm.default"],
          tolerance=1e-5)  # fmt: skip


def test_rows_that_no_group_has_seen():
    x, w = leaves_of((6, 8), (2, 8, 12), dtype=torch.float32)
    offs = torch.tensor([1, 4], dtype=torch.int32)
    with record() as step:
        loss = torch._grouped_mm(x, w, offs=offs)[:4].sum()
    found = {id(t): g for t, g in step.gradients(loss)}
    assert not found[id(x)][4:].any()
    assert found[id(x)][:4].any()


# ---- what is read, and what is measured -----------------------------------------------------------------------------


def linear_chip(out):
    return out * ramp(out) + 0.3


def left_chip(out):
    return out * ramp(out, -2) - 0.2


FOLLOWING = {
    "mm": (torch.mm, [(3, 4), (4, 5)], (1,), aten.mm.default, linear_chip),
    "mm, left": (torch.mm, [(3, 4), (4, 5)], (0,), aten.mm.default, left_chip),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)], (1,), aten.bmm.default, linear_chip),
    "bmm, left": (torch.bmm, [(2, 3, 4), (2, 4, 5)], (0,), aten.bmm.default, left_chip),
    "linear": (F.linear, [(3, 4), (5, 4), (5,)], (1, 2), aten.addmm.default, linear_chip),
    "addmm": (
        lambda *a: torch.addmm(*a, alpha=0.5, beta=2), [(5,), (3, 4), (4, 5)], (0, 2), aten.addmm.default, linear_chip,
    ),
    "baddbmm": (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], (0, 2), aten.baddbmm.default, linear_chip),
    "addbmm": (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], (0, 2), aten.addbmm.default, linear_chip),
    "addbmm, left": (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], (0, 1), aten.addbmm.default, left_chip),
    "mv": (torch.mv, [(3, 4), (4,)], (0,), aten.mv.default, linear_chip),
    "mv of a learned vector": (torch.mv, [(3, 4), (4,)], (1,), aten.mv.default, lambda out: out * 1.3 + 0.1),
    "addmv": (torch.addmv, [(3,), (3, 4), (4,)], (0, 1), aten.addmv.default, linear_chip),
    "dot": (torch.dot, [(4,), (4,)], (1,), aten.dot.default, lambda out: out * 1.3 + 0.1),
    "vdot": (torch.vdot, [(4,), (4,)], (0,), aten.vdot.default, lambda out: out * 1.3 + 0.1),
    "addr": (torch.addr, [(3, 4), (3,), (4,)], (0, 2), aten.addr.default, linear_chip),
    "addr, left": (torch.addr, [(3, 4), (3,), (4,)], (0, 1), aten.addr.default, left_chip),
    "bilinear": (F.bilinear, [(3, 4), (3, 2), (5, 4, 2)], (2,), aten._trilinear.default, linear_chip),
    "matmul": (torch.matmul, [(2, 3, 4), (4, 5)], (1,), aten.mm.default, linear_chip),
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), [(3, 4), (5, 4)], (1,), aten.bmm.default, None),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWING)
def test_cotangents_follow_the_hardware(case):
    function, shapes, weights, operator, change = FOLLOWING[case]
    change = change or (lambda out: out * 1.5 + 0.25)
    follows(function, lambda *leaves: change(function(*leaves)), leaves_of(*shapes), weights, {operator: change})


def test_complex_cotangents_follow_the_hardware():
    change = lambda out: out * (ramp(out.real) * (1 - 0.5j)) + 0.1  # noqa: E731
    w, x = complex_leaves((4, 5), (3, 4))

    def real(function):
        return lambda x, w: torch.view_as_real(function(x, w))

    follows(real(torch.mm), real(lambda x, w: change(x @ w)), [x, w], (1,), {aten.mm.default: change})


@pytest.mark.filterwarnings("ignore")
def test_grouped_cotangents_follow_the_hardware():
    offs = torch.tensor([2, 5], dtype=torch.int32)
    function = lambda x, w: torch._grouped_mm(x, w, offs=offs) * 1.0  # noqa: E731
    follows(function, lambda x, w: linear_chip(torch._grouped_mm(x, w, offs=offs)) * 1.0,
            leaves_of((5, 8), (2, 8, 12), dtype=torch.float32), (1,), {aten._grouped_mm.default: linear_chip},
            tolerance=1e-5)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_factors_are_exact(dtype):
    """An identity times a matrix is that matrix, whatever the precision; a large bias takes nothing away."""
    layer = nn.Linear(64, 64).to(dtype)
    nn.init.constant_(layer.bias, 1e6)
    x = torch.randn(8, 64, dtype=dtype, requires_grad=True)
    with record() as step:
        loss = layer(x).sum()
    found = {id(t): g for t, g in step.gradients(loss)}
    with torch.no_grad():
        assert torch.equal(found[id(x)], torch.ones(8, 64, dtype=dtype) @ layer.weight)


def test_factors_that_were_overwritten():
    """PyTorch saves a factor where the other one needs a gradient; elsewhere the code may write over it."""
    constant = torch.randn(4, 4, dtype=torch.float64)

    def over(x, w):
        left, right, bias = x * 2, x * 3, x[0] * 4
        out = left @ constant + constant @ right + F.linear(x, w, bias)
        left += 1
        right *= 2
        bias += 1
        return out + left + right + bias

    check(over, leaves_of((4, 4), (4, 4)), weights=(1,))


def test_what_a_measured_factor_costs():
    layer = nn.Linear(7, 5).double()
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    with record() as step:
        loss = layer(x).sum()
    with count_queries() as count:
        step.gradients(loss)
    assert count.queries == 7 + 1
    with record() as step:  # nobody asks for the cotangent of x
        loss = layer(x.detach()).sum()
    with count_queries() as count:
        step.gradients(loss)
    assert count.queries == 0


def test_gradients_of_transposed_weights_lie_as_the_weight_does():
    layer = nn.Linear(7, 5)
    with record() as step:
        loss = layer(torch.randn(3, 7)).sum()
    found = {id(t): g for t, g in step.gradients(loss)}
    assert found[id(layer.weight)].is_contiguous()


# ---- weights that several calls read --------------------------------------------------------------------------------


def queries_of(loss):
    with record() as step:
        value = loss()
    with count_queries() as count:
        gradients = step.gradients(value)
    return count.queries, {id(t): g for t, g in gradients}


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_matrix_of_a_recurrent_layer_is_measured_once(kind):
    layer = kind(3, 5).double()
    x = torch.randn(20, 2, 3, dtype=torch.float64)
    queries, _ = queries_of(lambda: layer(x)[0].square().sum())
    assert queries == 5 + 1
    queries, found = queries_of(lambda: layer(x.requires_grad_())[0].square().sum())
    assert queries == 5 + 1 + 3 + 1
    (expected,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    assert torch.allclose(found[id(x)], expected)


def test_a_weight_that_changes_is_measured_anew():
    """In place, or in memory that is used again."""
    w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def changing():
        h = x
        for k in range(4):
            h = (h @ (w * (k + 1)).t().contiguous()).tanh()
        return h.sum()

    _, found = queries_of(changing)
    expected = torch.autograd.grad(changing(), [x, w])
    for leaf, g in zip((x, w), expected, strict=True):
        assert torch.allclose(found[id(leaf)], g)

    def written():
        held = w * 1
        h = (x @ held).tanh()
        with torch.no_grad():
            held.mul_(2)
        return (h @ w).sum() + (h @ w.detach()).sum() + (h @ w.t()).sum() + (h @ w.conj()).sum()

    with torch.no_grad():
        product = (x @ w).cosh().pow(-2)
    total = (2 * w + w.detach() + w.t()).sum(1)
    expected = (product * total) @ w.t()
    _, found = queries_of(written)
    assert torch.allclose(found[id(x)], expected.detach())


def test_layers_that_share_a_kernel():
    layer = nn.Conv2d(2, 2, 3, padding=1).double()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)

    def loss():
        h = x
        for k in range(3):
            h = torch.tanh(layer(h)) if k < 2 else torch.tanh(F.conv2d(h, layer.weight, layer.bias, stride=2))
        return h.sum()

    queries, found = queries_of(loss)
    assert queries == 2 + 1
    (expected,) = torch.autograd.grad(loss(), x)
    assert torch.allclose(found[id(x)], expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_an_offset_that_is_zero_but_for_one_column_is_taken_off_large_probes(rows):
    offset = torch.zeros(300, dtype=torch.float64)
    offset[7] = 0.5

    def change(out):
        return 1.1 * out + offset

    leaves = leaves_of((rows, 300), (300, 300))
    follows(torch.mm, lambda x, w: change(x @ w), leaves, (1,), {aten.mm.default: change})

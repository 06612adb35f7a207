"""Closed parameter gradients against autograd in float64, one case for every entry of the tables."""

import operator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from hzo import parameter_rules
from hzo.errors import InputError
from hzo.parameter_rules import FUNCTIONS, MODULES, closed_form, find_rule

T = torch.Tensor
# Sums of at most a few thousand products of order one, in another order than autograd's.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-4}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module):
    """The module in float64, every parameter and buffer away from its initial zeros and ones."""
    generator = torch.Generator().manual_seed(3)
    module = module.double()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5)
    return module


def assert_close(found, expected, dtype=torch.float64):
    torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def check_module(module, *args, **kwargs):
    """All parameters together, then each by itself; buffers must not move."""
    names = [name for name, _ in module.named_parameters()]
    output = module(*args, **kwargs)
    cotangent = normal(*output.shape, seed=9).to(output.dtype)
    expected = dict(zip(names, torch.autograd.grad(output, list(module.parameters()), cotangent), strict=True))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for wanted in (frozenset(names), *(frozenset([name]) for name in names)):
        rule = find_rule(module, args, kwargs, wanted)
        assert rule is not None
        found = rule(module, args, kwargs, cotangent, wanted)
        assert set(found) == wanted
        for name in wanted:
            assert not found[name].requires_grad
            assert not found[name].is_inference()
            assert_close(found[name], expected[name], output.dtype)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name])


def check_function(target, args, kwargs=None, wanted=frozenset()):
    """Gradients of the slots in ``wanted``, all together and each by itself."""
    kwargs = kwargs or {}

    def leaf(slot, value):
        return value.clone().requires_grad_() if slot in wanted else value

    args = tuple(leaf(i, value) for i, value in enumerate(args))
    kwargs = {name: leaf(name, value) for name, value in kwargs.items()}
    # In-place methods write into a copy: rules get the arguments from before.
    left = args[0].clone() if isinstance(args[0], T) and 0 not in wanted else args[0]
    output = target(left, *args[1:], **kwargs)
    cotangent = normal(*output.shape, seed=9)
    slots = sorted(wanted, key=str)
    leaves = [args[s] if isinstance(s, int) else kwargs[s] for s in slots]
    expected = dict(zip(slots, torch.autograd.grad(output, leaves, cotangent), strict=True))
    for asked in {frozenset(wanted), *(frozenset([s]) for s in slots)}:
        rule = find_rule(target, args, kwargs, asked)
        assert rule is not None
        found = rule(target, args, kwargs, cotangent, asked)
        assert set(found) == asked
        for slot in asked:
            assert not found[slot].requires_grad
            assert_close(found[slot], expected[slot])


# --- modules ---

MODULE_CASES = [
    (nn.Linear(3, 4), (normal(5, 3),)),
    (nn.Linear(3, 4, bias=False), (normal(2, 5, 3),)),
    (nn.Linear(3, 4), (normal(3),)),
    (nn.Bilinear(3, 2, 4), (normal(2, 5, 3), normal(2, 5, 2))),
    (nn.Bilinear(3, 2, 4, bias=False), (normal(5, 3), normal(5, 2))),
    (nn.Embedding(5, 3), (torch.tensor([[0, 1, 1], [4, 2, 1]]),)),
    (nn.Embedding(5, 3, padding_idx=1), (torch.tensor([0, 1, 1, 4]),)),
    (nn.Embedding(5, 3, padding_idx=-1), (torch.tensor([0, 1, 1, 4]),)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (normal(2, 4, 9),)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (normal(2, 4, 6, 5),)),
    (nn.Conv2d(4, 6, 3, bias=False), (normal(4, 6, 5),)),
    (nn.Conv2d(4, 4, 3, padding="same", groups=4), (normal(2, 4, 6, 5),)),
    (nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 3)), (normal(2, 2, 6, 9),)),
    (nn.Conv2d(2, 3, 3, padding="valid"), (normal(2, 2, 6, 5),)),
    (nn.Conv3d(2, 4, 2, groups=2, padding=1), (normal(2, 2, 4, 3, 4),)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (normal(2, 4, 5),)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), dilation=2), (normal(2, 4, 4, 3),)),
    (nn.ConvTranspose2d(4, 6, 3, bias=False), (normal(4, 4, 3),)),
    (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), (normal(2, 2, 4, 3), [8, 6])),
    (nn.ConvTranspose3d(2, 3, 2, stride=2), (normal(2, 2, 2, 3, 2),)),
    (nn.BatchNorm1d(3), (normal(5, 3),)),
    (nn.BatchNorm1d(3, track_running_stats=False).eval(), (normal(5, 3, 4),)),
    (nn.BatchNorm2d(3), (normal(5, 3, 2, 2),)),
    (nn.BatchNorm2d(3).eval(), (normal(5, 3, 2, 2),)),
    (nn.BatchNorm2d(3, momentum=None), (normal(5, 3, 2, 2),)),
    (nn.BatchNorm3d(3), (normal(2, 3, 2, 2, 2),)),
    (nn.LayerNorm(4), (normal(5, 2, 4),)),
    (nn.LayerNorm((2, 4), eps=0.1), (normal(5, 2, 4),)),
    (nn.LayerNorm(4, bias=False), (normal(4),)),
    (nn.RMSNorm(4), (normal(5, 2, 4),)),
    (nn.RMSNorm((2, 4), eps=0.1), (normal(5, 2, 4),)),
    (nn.GroupNorm(2, 4), (normal(5, 4, 3),)),
    (nn.GroupNorm(1, 4, eps=0.1), (normal(5, 4),)),
    (nn.InstanceNorm1d(3, affine=True), (normal(5, 3, 4),)),
    (nn.InstanceNorm1d(3, affine=True), (normal(3, 4),)),
    (nn.InstanceNorm2d(3, affine=True), (normal(5, 3, 2, 2),)),
    (nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(), (normal(3, 2, 2),)),
    (nn.InstanceNorm3d(3, affine=True), (normal(5, 3, 2, 2, 2),)),
    (nn.PReLU(), (normal(5, 3),)),
    (nn.PReLU(3), (normal(5, 3, 4),)),
]


@pytest.mark.parametrize(("module", "args"), MODULE_CASES, ids=[str(module) for module, _ in MODULE_CASES])
def test_module(module, args):
    check_module(randomised(module), *args)


def test_every_module_has_a_case():
    assert {type(module) for module, _ in MODULE_CASES} == set(MODULES)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), "same"])
@pytest.mark.parametrize("batch", [(2,), ()])
def test_padding_modes(mode, padding, batch):
    module = nn.Conv2d(2, 3, (3, 2), padding=padding, padding_mode=mode, dilation=(1, 2))
    check_module(randomised(module), normal(*batch, 2, 5, 6))


def test_keyword_arguments():
    check_module(randomised(nn.Linear(3, 4)), input=normal(5, 3))
    check_module(randomised(nn.ConvTranspose1d(2, 3, 3, stride=2)), normal(2, 2, 4), output_size=[10])


@settings(deadline=None, max_examples=60)
@given(
    axes=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 3),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    transposed=st.booleans(),
    extra=st.integers(0, 2),
    size=st.integers(3, 6),
)
def test_convolution_of_any_shape(
    axes, groups, per_group, kernel, stride, dilation, padding, mode, transposed, extra, size
):
    channels = groups * per_group[0], groups * per_group[1]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    reach = dilation * (kernel - 1)
    if transposed:
        assume(extra < max(stride, dilation) and (size - 1) * stride - 2 * padding + reach + extra + 1 > 0)
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        module = kind(*channels, kernel, output_padding=extra, **options)
    else:
        assume(size + 2 * padding > reach and padding < size)
        module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](*channels, kernel, padding_mode=mode, **options)
    check_module(randomised(module), normal(2, channels[0], *range(size, size + axes)))


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 0.0])
def test_batch_norm_keeps_eps_and_survives_a_zero_scale(scale):
    """x̂ from the output's own standardisation would be off by eps/v here, and 0/0 at a zero scale."""
    module = nn.BatchNorm2d(3).double()
    nn.init.zeros_(module.weight)
    check_module(module, scale * normal(5, 3, 2, 2) + 1)


# --- functions ---

X, Y, P, ROW = normal(5, 3, 4), normal(5, 3, 4, seed=1), normal(3, 1, seed=2) + 3, normal(4, seed=4) + 3
SQUARE = normal(4, 4, seed=5)
RUNNING = (normal(3, seed=6), normal(3, seed=7).square() + 0.1)

FUNCTION_CASES = [
    (F.linear, (X, normal(2, 4), normal(2)), {}, {1, 2}),
    (F.linear, (X, normal(2, 4)), {"bias": normal(2)}, {1, "bias"}),
    (F.linear, (X,), {"weight": normal(2, 4)}, {"weight"}),
    (F.bilinear, (X, Y, normal(2, 4, 4), normal(2)), {}, {2, 3}),
    (F.embedding, (torch.tensor([[0, 2], [2, 3]]), SQUARE), {}, {1}),
    (F.embedding, (torch.tensor([[0, 2], [2, 3]]), SQUARE), {"padding_idx": 2}, {1}),
    (F.conv1d, (X, normal(2, 3, 2), normal(2)), {"padding": "same"}, {1, 2}),
    (torch.conv1d, (X, normal(2, 3, 2), normal(2), 2, (1,), [2]), {}, {1, 2}),
    (F.conv2d, (normal(2, 4, 6, 5), normal(4, 2, 3, 3)), {"groups": 2, "stride": 2}, {1}),
    (torch.conv2d, (normal(2, 4, 6, 5), normal(4, 4, 3, 3)), {"bias": normal(4), "padding": 1}, {1, "bias"}),
    (F.conv3d, (normal(2, 2, 3, 4, 3), normal(2, 2, 2, 2, 2), normal(2)), {}, {1, 2}),
    (F.conv_transpose1d, (X, normal(3, 2, 2), normal(4), 3, 1, 2, 1, 3), {"groups": 1}, None),
    (F.conv_transpose1d, (X, normal(3, 2, 2), normal(2), 3, 1, 2, 1, 3), {}, {1, 2}),
    (F.conv_transpose2d, (normal(2, 4, 3, 3), normal(4, 1, 2, 2)), {"groups": 2}, {1}),
    (F.conv_transpose3d, (normal(2, 2, 2, 3, 2), normal(2, 1, 2, 2, 2), normal(1)), {}, {1, 2}),
    (F.layer_norm, (X, (4,), ROW, ROW), {"eps": 0.1}, {2, 3}),
    (F.layer_norm, (X, (4,)), {"weight": ROW, "bias": ROW}, {"weight", "bias"}),
    (torch.layer_norm, (X, (4,), ROW, ROW, 1e-3, True), {}, {2, 3}),
    (F.rms_norm, (X, (4,), ROW), {}, {2}),
    (torch.rms_norm, (X, (4,), ROW, 0.1), {}, {2}),
    (F.group_norm, (X, 3), {"weight": normal(3), "bias": normal(3)}, {"weight", "bias"}),
    (torch.group_norm, (X, 1, normal(3), normal(3), 0.1, True), {}, {2, 3}),
    (F.batch_norm, (X, None, None, normal(3), normal(3), True), {}, {3, 4}),
    (F.batch_norm, (X, *RUNNING, normal(3)), {"bias": normal(3), "eps": 0.1}, {3, "bias"}),
    (F.instance_norm, (X,), {"weight": normal(3), "bias": normal(3), "eps": 0.1}, {"weight", "bias"}),
    (F.instance_norm, (X, *RUNNING, normal(3)), {"use_input_stats": False}, {3}),
    (F.prelu, (X, normal(3)), {}, {1}),
    (torch.prelu, (X, normal(1)), {}, {1}),
    (torch.addmm, (normal(2), normal(5, 3), normal(3, 2)), {"beta": 2, "alpha": 3}, {0, 1, 2}),
    (torch.neg, (P,), {}, {0}),
    (T.neg, (P,), {}, {0}),
    (T.__neg__, (P,), {}, {0}),
    (operator.neg, (P,), {}, {0}),
    (torch.add, (X, P), {"alpha": 3}, {0, 1}),
    (T.add, (P, X), {"alpha": -2}, {0}),
    (T.sub, (X, ROW), {"alpha": 3}, {1}),
    (torch.add, (P, 2), {}, {0}),
    (torch.add, (X,), {"other": P}, {"other"}),
    (torch.mul, (P, 2), {}, {0}),
    (torch.mul, (X, torch.tensor(2.0).double()), {}, {1}),
    (torch.mul, (torch.arange(4), ROW), {}, {1}),
    (torch.div, (P, 2), {}, {0}),
    (T.__rsub__, (P, 1), {}, {0}),
    (T.__rtruediv__, (P, 1), {}, {0}),
    (T.expand, (P, 5, 3, 4), {}, {0}),
    (T.expand, (ROW, 3, -1), {}, {0}),
    (T.expand_as, (P, X), {}, {0}),
    *[(f, (SQUARE,), {}, {0}) for f in (T.contiguous, T.clone, T.double)],
    (T.float, (SQUARE,), {}, None),
    (T.half, (SQUARE,), {}, None),
    (T.bfloat16, (SQUARE,), {}, None),
    (T.type_as, (SQUARE, X), {}, {0}),
    (T.to, (SQUARE, torch.float64), {}, {0}),
    (T.to, (SQUARE,), {"dtype": torch.float64, "copy": True}, {0}),
    *[(f, (SQUARE, (2, 8)), {}, {0}) for f in (torch.reshape, T.reshape, T.view)],
    *[(f, (SQUARE, normal(2, 8)), {}, {0}) for f in (T.view_as, T.reshape_as)],
    *[(f, (SQUARE,), {}, {0}) for f in (torch.flatten, T.flatten)],
    *[(f, (SQUARE, 1), {}, {0}) for f in (torch.unsqueeze, T.unsqueeze)],
    *[(f, (P, -1), {}, {0}) for f in (torch.squeeze, T.squeeze)],
    (T.unflatten, (SQUARE, 1, (2, 2)), {}, {0}),
    *[(f, (X, 0, 2), {}, {0}) for f in (torch.transpose, T.transpose, torch.movedim, T.movedim)],
    *[(f, (X, (2, 0, 1)), {}, {0}) for f in (torch.permute, T.permute)],
    (T.permute, (X, 2, 0, 1), {}, {0}),
    *[(f, (SQUARE,), {}, {0}) for f in (torch.t, T.t, T.T.__get__, T.mT.__get__)],
    *[(f, (X, (slice(None), [0, 0, 2])), {}, {0}) for f in (T.__getitem__, operator.getitem)],
    (operator.getitem, (X, X > 0), {}, {0}),
    *[(f, (X, 1, 1, 2), {}, {0}) for f in (torch.narrow, T.narrow)],
    *[(f, (X, 2, 1), {}, {0}) for f in (torch.select, T.select)],
    (T.repeat, (P, 2, 3), {}, {0}),
    *[(f, (X, [0, 2]), {}, {0}) for f in (torch.flip, T.flip)],
    *[(f, (X,), {"shifts": 2, "dims": 1}, {0}) for f in (torch.roll, T.roll)],
    (torch.bmm, (X, normal(5, 4, 2)), {}, {0, 1}),
    (T.bmm, (X, normal(5, 4, 2)), {}, {0, 1}),
    (torch.mm, (SQUARE, ROW[:, None]), {}, {0, 1}),
    (T.mm, (SQUARE, ROW[:, None]), {}, {0, 1}),
]
BINARY = [f for f, e in FUNCTIONS.items() if e.names[:2] in (("input", "other"), ("other", "input"))]
PRODUCTS = [torch.matmul, T.matmul, T.__matmul__, T.__rmatmul__, operator.matmul]
MATRICES = [*PRODUCTS, torch.mm, T.mm, torch.bmm, T.bmm]
ELEMENTWISE = [f for f in BINARY if f not in MATRICES]


def name_of(value):
    return getattr(value, "__qualname__", getattr(value, "__name__", "")) if callable(value) else ""


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "wanted"), [case for case in FUNCTION_CASES if case[3]], ids=name_of
)
def test_function(target, args, kwargs, wanted):
    check_function(target, args, kwargs, frozenset(wanted))


@pytest.mark.parametrize("target", ELEMENTWISE, ids=name_of)
@pytest.mark.parametrize(
    "parameter", [P, ROW, torch.tensor(3.0).double(), X + 5], ids=["column", "row", "number", "whole"]
)
def test_elementwise_with_broadcasting(target, parameter):
    check_function(target, (X, parameter), wanted=frozenset({1}))
    if "input" in FUNCTIONS[target].parameters:
        check_function(target, (parameter, Y + 5), wanted=frozenset({0}))
        check_function(target, (parameter, Y + 5), wanted=frozenset({0, 1}))


@pytest.mark.parametrize("target", PRODUCTS, ids=name_of)
@pytest.mark.parametrize(
    ("left", "right"),
    [((3,), (3,)), ((3,), (3, 2)), ((4, 3), (3,)), ((4, 3), (3, 2)), ((5, 4, 3), (3, 2)), ((5, 4, 3), (3,)),
     ((4, 3), (5, 3, 2)), ((3,), (5, 3, 2)), ((1, 6, 4, 3), (5, 1, 3, 2)), ((5, 4, 3), (5, 3, 2))],
)  # fmt: skip
def test_matrix_products(target, left, right):
    operands = normal(*left), normal(*right, seed=1)
    check_function(target, operands[::-1] if target is T.__rmatmul__ else operands, wanted=frozenset({0, 1}))


def test_every_function_has_a_case():
    tested = [case[0] for case in FUNCTION_CASES] + ELEMENTWISE + PRODUCTS
    assert set(tested) == set(FUNCTIONS)


@pytest.mark.parametrize("cast", [T.float, T.half, T.bfloat16])
def test_casts_to_narrower_dtypes_pass_the_cotangent_on(cast):
    cotangent = normal(4, 4)
    found = find_rule(cast, (SQUARE,), {}, frozenset({0}))(cast, (SQUARE,), {}, cotangent, frozenset({0}))
    assert torch.equal(found[0], cotangent)


def test_a_parameter_in_two_slots_has_a_gradient_in_each():
    check_function(torch.mul, (P, P), wanted=frozenset({0, 1}))


# --- no rule ---


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def changed(change, module=None):
    module = module or nn.Linear(3, 4)
    return change(module) or module


def own_forward(module):
    module.forward = lambda x: 2 * x


def own_conv_forward(module):
    module._conv_forward = lambda x, weight, bias: 2 * F.conv2d(x, weight, bias)


def deprecated_weight_norm(module):
    return nn.utils.weight_norm(module)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled(3, 4),
        lambda: changed(lambda m: m.register_forward_hook(lambda *a: None) and None),
        lambda: changed(lambda m: m.register_forward_pre_hook(lambda *a: None) and None),
        lambda: changed(own_forward),
        lambda: changed(own_conv_forward, nn.Conv2d(1, 1, 1)),
        lambda: changed(parametrizations.weight_norm),
        lambda: changed(parametrizations.spectral_norm),
        lambda: changed(deprecated_weight_norm),
        lambda: nn.Bilinear,
        lambda: nn.GRU(3, 3),
        lambda: nn.SyncBatchNorm(3),
        lambda: lambda x: x,
        lambda: partial(F.linear, bias=None),
        lambda: torch.Tensor.detach,
    ],
)
def test_what_is_not_exactly_in_the_table_has_no_rule(make):
    target = make()
    assert not closed_form(target)
    for slot in ("weight", 1):
        assert find_rule(target, (normal(5, 3).float(),), {}, frozenset({slot})) is None


def test_global_hooks_are_in_the_way():
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    try:
        assert not closed_form(nn.Linear(3, 4))
    finally:
        handle.remove()
    assert closed_form(nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "wanted"),
    [
        (nn.Linear(3, 4), (X,), {}, {"weigth"}),
        (nn.Linear(3, 4), (X,), {}, {0}),
        (nn.Linear(3, 4, bias=False), (X,), {}, {"bias"}),
        (nn.Embedding(5, 3, max_norm=1.0), (torch.tensor([1]),), {}, {"weight"}),
        (nn.Embedding(5, 3, scale_grad_by_freq=True), (torch.tensor([1]),), {}, {"weight"}),
        (nn.Linear(3, 4, dtype=torch.complex64), (normal(5, 3).to(torch.complex64),), {}, {"weight"}),
        (nn.BatchNorm1d(3, affine=False), (normal(5, 3),), {}, {"weight"}),
        (F.embedding, (torch.tensor([1]), SQUARE, None, 1.0), {}, {1}),
        (F.linear, (SQUARE, SQUARE), {}, {0}),
        (F.linear, (X, ROW), {}, {1}),
        (torch.div, (X, P), {"rounding_mode": "floor"}, {1}),
        (torch.add, (X, P), {"out": X.clone()}, {1}),
        (torch.mul, (X.to(torch.complex128), P), {}, {1}),
        (torch.mul, (X, 2), {}, {1}),
        (T.add_, (X, P), {}, {0}),
        (operator.imul, (X, P), {}, {0}),
        (T.expand_as, (P, X), {}, {1}),
        (T.view, (P, torch.int64), {}, {0}),
    ],
)
def test_calls_without_a_rule(target, args, kwargs, wanted):
    assert closed_form(target)
    assert find_rule(target, args, kwargs, frozenset(wanted)) is None
    with pytest.raises(InputError, match="find_rule"):
        parameter_rules._apply(target, args, kwargs, normal(1), frozenset(wanted))


# --- precision and autograd ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(64, 4), normal(256, 64)),
        (nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), normal(8, 4, 8, 8)),
        (nn.ConvTranspose2d(4, 3, 3, padding=1), normal(8, 4, 8, 8)),
        (nn.BatchNorm2d(4), normal(8, 4, 8, 8)),
        (nn.BatchNorm2d(4).eval(), normal(8, 4, 8, 8)),
        (nn.LayerNorm(8), normal(64, 8)),
        (nn.RMSNorm(8), 1e-3 * normal(64, 8)),
        (nn.PReLU(), normal(64, 8)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_low_precision_forwards_get_float32_gradients(module, x, dtype):
    """The gradients at the rounded parameters and input, computed in float32: nothing else is rounded."""
    narrow, x = randomised(module).to(dtype), x.to(dtype)
    names = frozenset(name for name, _ in narrow.named_parameters())
    cotangent = normal(*narrow(x).shape, seed=9).float()
    found = find_rule(narrow, (x,), {}, names)(narrow, (x,), {}, cotangent, names)
    if isinstance(module, nn.RMSNorm):  # its eps is that of float32, for narrow inputs too
        wide = nn.RMSNorm(8, eps=torch.finfo(torch.float32).eps).double()
        wide.load_state_dict(narrow.state_dict())
    else:
        wide = module.double()
    expected = torch.autograd.grad(wide(x.double()), list(wide.parameters()), cotangent.double())
    for (name, _), gradient in zip(wide.named_parameters(), expected, strict=True):
        assert found[name].dtype == torch.float32
        error = (found[name].double() - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5  # float32's 6e-8 over sums of at most 2048; bfloat16 would leave 1e-3


def test_autocast_does_not_reach_the_products():
    module, x, cotangent = nn.Linear(64, 8), normal(32, 64).float(), normal(32, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rule = find_rule(module, (x,), {}, frozenset({"weight"}))
        found = rule(module, (x,), {}, cotangent, frozenset({"weight"}))["weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cotangent.T @ x, rtol=1e-5, atol=1e-5)


def test_the_result_has_the_dtype_of_the_cotangent():
    module = nn.Linear(3, 4)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        rule = find_rule(module, (normal(5, 3),), {}, frozenset({"bias"}))
        found = rule(module, (normal(5, 3),), {}, normal(5, 4).to(dtype), frozenset({"bias"}))
        assert found["bias"].dtype == dtype


def test_autograd_is_not_used(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("autograd was called")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    names = frozenset({"weight", "bias"})
    for module, x in ((nn.Linear(3, 4), X[..., :3]), (nn.Conv1d(3, 2, 2), X), (nn.BatchNorm1d(3), X)):
        args = (x.float().requires_grad_(),)
        cotangent = torch.ones_like(module(*args))
        found = find_rule(module, args, {}, names)(module, args, {}, cotangent, names)
        assert all(not gradient.requires_grad for gradient in found.values())

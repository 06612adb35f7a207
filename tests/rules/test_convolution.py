"""Convolutions: autograd's gradients in float64; where the kernel is a weight, what the hardware does with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hzo import count_queries
from hzo.reverse import record
from support.chip import follows, ramp
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten
CONV = "aten.convolution.default"
WEIGHTS = [(), (1, 2), (0, 1, 2), (0,)]

PLAIN = {  # function, image, kernel, channels out, options
    "1d": (F.conv1d, (2, 3, 7), (4, 3, 3), {}),
    "2d": (F.conv2d, (2, 3, 6, 5), (4, 3, 3, 2), {}),
    "3d": (F.conv3d, (2, 2, 4, 5, 4), (3, 2, 2, 3, 1), {}),
    "point": (F.conv2d, (2, 3, 4, 4), (5, 3, 1, 1), {}),
    "padding": (F.conv2d, (2, 3, 5, 5), (4, 3, 3, 3), {"padding": 1}),
    "padding beyond the kernel": (F.conv2d, (2, 3, 4, 4), (4, 3, 1, 2), {"padding": (2, 3)}),
    "stride": (F.conv2d, (2, 3, 7, 8), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "stride beyond the kernel": (F.conv2d, (2, 3, 9, 8), (4, 3, 2, 2), {"stride": (3, 4)}),
    "patches": (F.conv2d, (2, 3, 8, 8), (5, 3, 4, 4), {"stride": 4}),
    "dilation": (F.conv2d, (2, 3, 9, 9), (4, 3, 3, 3), {"dilation": (2, 3), "padding": 2}),
    "groups": (F.conv2d, (2, 4, 5, 5), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": (F.conv2d, (2, 4, 5, 5), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    "depthwise, twice the channels": (F.conv1d, (2, 3, 9), (6, 1, 4), {"groups": 3, "dilation": 2, "stride": 2}),
    "causal": (F.conv1d, (2, 4, 6), (4, 1, 4), {"groups": 4, "padding": 3}),
    "same": (F.conv2d, (2, 3, 5, 6), (4, 3, 3, 5), {"padding": "same"}),
    "same, even": (F.conv1d, (2, 3, 6), (4, 3, 4), {"padding": "same"}),
    "all at once": (F.conv2d, (2, 4, 12, 13), (6, 2, 3, 2), {"stride": (2, 3), "padding": (3, 1), "dilation": (2, 1),
                                                            "groups": 2}),
    "without batch": (F.conv2d, (3, 5, 5), (4, 3, 3, 3), {}),
    "one sample": (F.conv2d, (1, 1, 3, 3), (1, 1, 3, 3), {}),
}  # fmt: skip

TRANSPOSED = {
    "1d": (F.conv_transpose1d, (2, 3, 4), (3, 4, 3), {}),
    "2d": (F.conv_transpose2d, (2, 3, 4, 3), (3, 4, 3, 2), {}),
    "3d": (F.conv_transpose3d, (2, 2, 3, 2, 2), (2, 3, 2, 3, 1), {}),
    "upsampling": (F.conv_transpose2d, (2, 3, 4, 4), (3, 4, 2, 2), {"stride": 2}),
    "padding": (F.conv_transpose2d, (2, 3, 4, 4), (3, 4, 4, 4), {"stride": 2, "padding": 1}),
    "output padding": (F.conv_transpose2d, (2, 3, 4, 4), (3, 4, 3, 3), {"stride": 2, "output_padding": 1}),
    "dilation": (F.conv_transpose2d, (2, 3, 4, 4), (3, 4, 3, 2), {"dilation": (2, 3)}),
    "groups": (F.conv_transpose2d, (2, 4, 4, 4), (4, 3, 3, 3), {"groups": 2, "stride": 2}),
    "depthwise": (F.conv_transpose1d, (2, 4, 5), (4, 1, 3), {"groups": 4, "stride": 3}),
    "all at once": (F.conv_transpose2d, (2, 4, 4, 3), (4, 3, 3, 2), {"stride": (2, 3), "padding": (1, 2), "groups": 2,
                                                                     "dilation": (2, 1), "output_padding": (1, 2)}),
}  # fmt: skip


def channels(kernel, options, transposed):
    return kernel[1] * options.get("groups", 1) if transposed else kernel[0]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", PLAIN)
def test_plain(case, weights):
    function, image, kernel, options = PLAIN[case]
    leaves = leaves_of(image, kernel, (kernel[0],))
    check(lambda x, w, b: function(x, w, b, **options), leaves, weights=weights, calls=[CONV])
    check(lambda x, w: function(x, w, **options), leaves[:2], weights=[k for k in weights if k < 2], calls=[CONV])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed(case, weights):
    function, image, kernel, options = TRANSPOSED[case]
    leaves = leaves_of(image, kernel, (channels(kernel, options, True),))
    check(lambda x, w, b: function(x, w, b, **options), leaves, weights=weights, calls=[CONV])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_modes_of_padding(mode):
    layer = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode).double()
    weights = [p.detach() for p in layer.parameters()]

    def function(x, *held):
        named = dict(zip(("weight", "bias"), held, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    check(function, [*leaves_of((2, 2, 5, 6)), *weights], weights=(1, 2), calls=[CONV])


def test_complex():
    check(F.conv2d, leaves_of((2, 3, 5, 5), (4, 3, 3, 3), (4,), dtype=torch.complex128), weights=(1, 2))
    check(F.conv_transpose1d, leaves_of((2, 3, 5), (3, 4, 3), (4,), dtype=torch.complex128), weights=(1, 2))


def test_memory_formats_and_views():
    def function(x, w, b):
        return F.conv2d(x.to(memory_format=torch.channels_last), w, b, padding=1) * 2

    check(function, leaves_of((2, 3, 5, 5), (4, 3, 3, 3), (4,)), weights=(1, 2))
    check(lambda x, w: F.conv2d(x.mT[:, ::2], w.mT), leaves_of((2, 6, 5, 5), (4, 3, 3, 2)), weights=(1,))
    check(lambda x, w: F.conv2d(x, w).sum((2, 3)), leaves_of((2, 3, 5, 5), (4, 3, 3, 3)), weights=(1,))


def test_no_samples():
    check(F.conv2d, leaves_of((0, 3, 5, 5), (4, 3, 3, 3), (4,)), weights=(1, 2))


def test_only_what_is_asked_for():
    x, w, b = leaves_of((2, 3, 5, 5), (4, 3, 3, 3), (4,))
    for asked in [(x,), (w,), (b,), (x, b), (w, b)]:
        given = [t if any(t is a for a in asked) else t.detach() for t in (x, w, b)]
        factor = torch.randn(2, 4, 3, 3, dtype=torch.float64)
        expected = torch.autograd.grad((F.conv2d(*given) * factor).sum(), asked)
        with record() as step:
            loss = (F.conv2d(*given) * factor).sum()
        found = {id(t): g for t, g in step.gradients(loss)}
        assert len(found) == len(asked)
        for t, g in zip(asked, expected, strict=True):
            assert torch.allclose(found[id(t)], g)


def _convolution(x, w, b, transposed, output_padding):
    return aten._convolution(x, w, b, [2, 1], [1, 0], [1, 1], transposed, output_padding, 1, False, False, True, True)


OTHERS = {
    "_convolution": (
        lambda x, w, b: _convolution(x, w, b, False, [0, 0]),
        (2, 3, 6, 5), (4, 3, 3, 3), 4,
    ),
    "_convolution, transposed": (
        lambda x, w, b: _convolution(x, w, b, True, [1, 0]),
        (2, 3, 6, 5), (3, 4, 3, 3), 4,
    ),
    "slow_conv2d": (
        lambda x, w, b: aten._slow_conv2d_forward(x, w, [3, 2], b, [2, 1], [1, 0]), (2, 3, 6, 5), (4, 3, 3, 2), 4,
    ),
    "slow_conv3d": (
        lambda x, w, b: aten.slow_conv3d_forward(x, w, [2, 3, 1], b, [2, 1, 1], [1, 0, 0]),
        (2, 2, 5, 5, 4), (3, 2, 2, 3, 1), 3,
    ),
    "slow_conv_dilated2d": (
        lambda x, w, b: aten.slow_conv_dilated2d(x, w, [3, 2], b, [2, 1], [1, 0], [2, 1]),
        (2, 3, 9, 5), (4, 3, 3, 2), 4,
    ),
    "slow_conv_dilated3d": (
        lambda x, w, b: aten.slow_conv_dilated3d(x, w, [3, 2, 1], b, [2, 1, 1], [1, 0, 0], [2, 1, 1]),
        (2, 2, 9, 5, 3), (4, 2, 3, 2, 1), 4,
    ),
    "slow_conv_transpose2d": (
        lambda x, w, b: aten.slow_conv_transpose2d(x, w, [3, 2], b, [2, 1], [1, 0], [1, 0], [1, 2]),
        (2, 3, 5, 5), (3, 4, 3, 2), 4,
    ),
    "slow_conv_transpose3d": (
        lambda x, w, b: aten.slow_conv_transpose3d(x, w, [3, 2, 1], b, [2, 1, 1]), (2, 3, 3, 3, 2), (3, 4, 3, 2, 1), 4,
    ),
    "conv_tbc": (lambda x, w, b: torch.conv_tbc(x, w, b, 2), (6, 2, 3), (3, 3, 4), 4),
}  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", OTHERS)
def test_operators_that_few_call_by_name(case, weights):
    function, image, kernel, out = OTHERS[case]
    check(function, leaves_of(image, kernel, (out,)), weights=weights)


def test_onednn_by_name():
    leaves = leaves_of((2, 4, 6, 5), (6, 2, 3, 3), (6,), dtype=torch.float32)

    def function(x, w, b):
        return torch.mkldnn_convolution(x, w, b, (1, 0), (2, 1), (1, 1), 2) * 1.0

    check(function, leaves, weights=(1, 2), calls=["aten.mkldnn_convolution.default"], tolerance=1e-5)


# ---- what is measured -----------------------------------------------------------------------------------------------


def chip(out):
    """A gain for each channel, and an offset."""
    return out * ramp(out, 1) - 0.2


FOLLOWING = [
    *((PLAIN[k], False) for k in ("1d", "3d", "all at once", "patches", "depthwise, twice the channels")),
    *((TRANSPOSED[k], True) for k in ("1d", "all at once", "depthwise")),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", range(len(FOLLOWING)))
def test_cotangents_follow_the_hardware(k, bias):
    (function, image, kernel, options), transposed = FOLLOWING[k]
    leaves = leaves_of(image, kernel, *([(channels(kernel, options, transposed),)] if bias else []))
    weights = tuple(range(1, len(leaves)))

    def written(x, *more):
        return function(x, *more, **options)

    follows(written, lambda *a: chip(written(*a)), leaves, weights, {aten.convolution.default: chip})


@pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
def test_a_learned_image_is_measured(function):
    """Generators that begin with a constant, and kernels that depend on the input."""
    leaves = leaves_of((1, 4, 5, 5), (4, 2, 3, 3))
    change = lambda out: out * 1.3 + 0.2  # noqa: E731
    written = lambda x, w: function(x, w, groups=2, padding=1)  # noqa: E731
    follows(written, lambda *a: change(written(*a)), leaves, (0,), {aten.convolution.default: change})


def test_conv_tbc_follows_the_hardware():
    written = lambda x, w, b: torch.conv_tbc(x, w, b, 1)  # noqa: E731
    follows(written, lambda *a: written(*a) * 1.3 + 0.1, leaves_of((6, 2, 3), (3, 3, 4), (4,)), (1, 2),
            {aten.conv_tbc.default: lambda out: out * 1.3 + 0.1})  # fmt: skip


def test_measured_kernels_are_exact_in_float32():
    layer = nn.Conv2d(8, 6, 3, padding=1, groups=2)
    nn.init.constant_(layer.bias, 1e6)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    with record() as step:
        loss = layer(x).sum()
    found = {id(t): g for t, g in step.gradients(loss)}
    g = torch.ones(2, 6, 6, 6)
    with torch.no_grad():
        expected = aten.convolution_backward(
            g, x, layer.weight, [6], [1, 1], [1, 1], [1, 1], False, [0, 0], 2, [True] * 3
        )
    for leaf, e in zip((x, layer.weight, layer.bias), expected, strict=True):
        assert torch.equal(found[id(leaf)], e)


@pytest.mark.parametrize(("small", "large"), [(2**62, 2**62), (0, 2**62), (0, 0)], ids=["one row", "single", "rows"])
@pytest.mark.parametrize("taps", [(1,), (3,), (12,), (1, 1), (3, 3), (1, 2), (7, 5), (2, 3, 2)], ids=str)
@pytest.mark.parametrize(("channels", "groups"), [(23, 1), (24, 3), (5, 5)])
def test_impulses_of_several_rows_show_every_tap(taps, channels, groups, small, large, monkeypatch):
    monkeypatch.setattr("hzo.rules.convolution._SMALL", small)
    monkeypatch.setattr("hzo.rules.convolution._LARGE", large)
    leaves = leaves_of((2, channels, *[k + 1 for k in taps]), (2 * groups, channels // groups, *taps), (2 * groups,))
    function = (F.conv1d, F.conv2d, F.conv3d)[len(taps) - 1]
    check(lambda x, w, b: function(x, w, b, groups=groups), leaves, weights=(1, 2), calls=[CONV])


def test_what_a_measured_kernel_costs():
    layer = nn.Conv2d(8, 6, 3, padding=1, groups=2)
    with record() as step:
        loss = layer(torch.randn(2, 8, 6, 6, requires_grad=True)).sum()
    with count_queries() as count:
        step.gradients(loss)
    assert count.queries == 4 + 1  # the channels of a group, and zeros


# ---- derivatives taken inside the model -----------------------------------------------------------------------------


def penalty(function):
    """Of the gradient with respect to the first operand, as critics have it."""

    def penalized(x, *more):
        (g,) = torch.autograd.grad(function(x, *more).pow(3).sum(), x, create_graph=True)
        return g.square()

    return penalized


@pytest.mark.parametrize("weights", [(), (1,), (1, 2)], ids=str)
@pytest.mark.parametrize("case", ["1d", "3d", "all at once", "depthwise", "point"])
def test_penalties_of_gradients(case, weights):
    function, image, kernel, options = PLAIN[case]
    leaves = leaves_of(image, kernel, (kernel[0],))
    check(penalty(lambda x, w, b: function(x, w, b, **options)), leaves, weights=weights, calls=[
        "aten.convolution_backward.default"])  # fmt: skip


@pytest.mark.parametrize("weights", [(), (1,)], ids=str)
@pytest.mark.parametrize("case", ["1d", "3d", "all at once", "depthwise", "output padding"])
def test_penalties_of_gradients_of_transposed_convolutions(case, weights):
    function, image, kernel, options = TRANSPOSED[case]
    check(penalty(lambda x, w: function(x, w, **options)), leaves_of(image, kernel), weights=weights, calls=[
        "aten.convolution_backward.default"])  # fmt: skip


def test_gradients_of_kernels_carry_gradients():
    """A step of training inside the model."""

    def adapted(x, w, b):
        of_w, of_b = torch.autograd.grad(F.conv2d(x, w, b).square().sum(), (w, b), create_graph=True)
        return F.conv2d(x, w - 0.1 * of_w, b - 0.1 * of_b)

    check(adapted, leaves_of((2, 3, 5, 5), (4, 3, 3, 3), (4,)), weights=(1, 2))

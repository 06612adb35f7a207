"""Every adjoint that the tables hold: modules, and functions of activities and weights, against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import resolve_name

from hzo.adjoints import FUNCTIONS, MODULES, affine
from support.adjoint_cases import BATCH, Run, apply_all, normal, operands, worst
from support.forms import FORMS, functions_named

CLOSED = 1e-9
MEASURED = 1e-9  # differences of affine maps have no curvature, so that rounding alone is left


def gamma(module, *, zeros=True):
    """Scales and shifts that are not the trivial ones; some scales are zero."""
    with torch.no_grad():
        module.weight.uniform_(0.5, 2.0)
        if zeros:
            module.weight.view(-1)[0] = 0
        if getattr(module, "bias", None) is not None:
            module.bias.uniform_(-1, 1)
    return module


def moved(module):
    """Running statistics that are not the trivial ones, and evaluation mode."""
    module.running_mean.uniform_(-1, 1)
    module.running_var.uniform_(0.5, 2.0)
    return module.eval()


LAYERS = [
    (nn.Linear(6, 5), (6,)),
    (nn.Linear(6, 5, bias=False), (2, 3, 6)),
    (nn.Linear(1, 4), (1,)),
    (nn.Linear(4, 1), (3, 4)),
    (nn.Identity(), (4,)),
    (nn.Flatten(), (2, 3)),
    (nn.Flatten(2), (2, 3, 4)),
    (nn.Unflatten(1, (2, 3)), (6,)),
    (nn.PixelShuffle(2), (8, 2, 3)),
    (nn.PixelUnshuffle(2), (2, 4, 6)),
    (nn.ChannelShuffle(2), (4, 2, 3)),
    (nn.ZeroPad1d((1, 2)), (2, 4)),
    (nn.ZeroPad2d((1, -1, 0, 2)), (2, 4, 4)),
    (nn.ReflectionPad2d((1, 2, 0, 1)), (2, 4, 4)),
    (nn.ReplicationPad2d((1, 2, 3, 0)), (2, 3, 3)),
    (nn.CircularPad2d((1, 2, 3, 0)), (2, 3, 3)),
    (nn.BatchNorm1d(4), (4,)),
    (gamma(nn.BatchNorm1d(4)), (4, 5)),
    (gamma(nn.BatchNorm2d(3, eps=0.1)), (3, 4, 5)),
    (gamma(nn.BatchNorm2d(1), zeros=False), (1, 1, 2)),
    (nn.BatchNorm2d(3, affine=False, momentum=None), (3, 2, 2)),
    (gamma(nn.BatchNorm3d(2)), (2, 2, 3, 2)),
    (gamma(nn.BatchNorm1d(4, track_running_stats=False)), (4, 3)),
    (gamma(nn.BatchNorm2d(4, track_running_stats=False)).eval(), (4, 3, 3)),
    (moved(gamma(nn.BatchNorm1d(4))), (4,)),
    (moved(gamma(nn.BatchNorm2d(4))), (4, 2, 3)),
    (moved(nn.BatchNorm3d(2, affine=False)), (2, 2, 2, 2)),
    (gamma(nn.LayerNorm(6)), (6,)),
    (gamma(nn.LayerNorm(5, eps=0.1)), (3, 5)),
    (gamma(nn.LayerNorm([3, 5])), (2, 3, 5)),
    (nn.LayerNorm([1, 5], elementwise_affine=False), (2, 1, 5)),
    (gamma(nn.LayerNorm(4, bias=False)), (2, 3, 4)),
    (gamma(nn.LayerNorm(1), zeros=False), (3, 1)),
    (gamma(nn.LayerNorm(2)), (3, 2)),
    (gamma(nn.RMSNorm(6)), (6,)),
    (gamma(nn.RMSNorm([3, 5], eps=0.1)), (2, 3, 5)),
    (nn.RMSNorm(1, elementwise_affine=False, eps=0.5), (3, 1)),
    (gamma(nn.GroupNorm(2, 6)), (6, 2, 3)),
    (gamma(nn.GroupNorm(1, 6, eps=0.1)), (6, 5)),
    (gamma(nn.GroupNorm(3, 6)), (6,)),
    (nn.GroupNorm(4, 4, affine=False), (4, 3, 2)),
    (nn.Softmax(dim=1), (4, 3)),
    (nn.Softmax(dim=-1), (4, 3)),
    (nn.LogSoftmax(dim=-2), (4, 3)),
    (nn.AvgPool1d(3, 2, padding=1, count_include_pad=False), (2, 7)),
    (nn.AvgPool2d(2), (2, 4, 5)),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 6, 5)),
    (nn.AvgPool2d((2, 3), (1, 2), divisor_override=5), (2, 5, 5)),
    (nn.AvgPool3d(2, 1), (2, 3, 2, 4)),
    (nn.AdaptiveAvgPool1d(3), (2, 7)),
    (nn.AdaptiveAvgPool2d(1), (3, 4, 4)),
    (nn.AdaptiveAvgPool2d((2, None)), (3, 5, 3)),
    (nn.AdaptiveAvgPool3d((1, 2, 2)), (2, 3, 3, 4)),
    (nn.Upsample(scale_factor=2), (2, 3, 4)),
    (nn.Upsample(size=(5, 3), mode="bilinear", align_corners=True), (2, 3, 4)),
    (nn.Upsample(scale_factor=1.5, mode="linear"), (2, 5)),
    (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 2, 3)),
    (nn.MaxPool1d(2), (3, 7)),
    (nn.MaxPool2d(3, 2, 1), (2, 6, 5)),
    (nn.MaxPool2d(2, 1, dilation=2, ceil_mode=True), (2, 6, 5)),
    (nn.MaxPool3d((1, 2, 3), (1, 1, 2)), (2, 2, 4, 5)),
    (nn.ReLU(), (4, 3)),
    (nn.ReLU(inplace=True), (4, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_layer(layer, shape):
    layer.double()
    found = apply_all(Run(lambda m, x: m(x * 1.5 + 0.3), layer), normal(*shape), target=type(layer))
    assert operands(found) == 1
    assert worst(found) <= MEASURED


NORMS = [
    (nn.BatchNorm1d(4), (4,)),
    (nn.BatchNorm2d(4), (4, 3, 3)),
    (nn.LayerNorm(4), (3, 4)),
    (nn.RMSNorm(4), (3, 4)),
    (nn.GroupNorm(2, 4), (4, 3, 3)),
]


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-5, 1e3])
@pytest.mark.parametrize(("norm", "shape"), NORMS, ids=[str(norm) for norm, _ in NORMS])
class TestNorms:
    """Statistics come from the input, so that nothing is lost where the output is scaled to nothing."""

    def test_scale_of_the_input(self, norm, shape, scale):
        found = apply_all(gamma(norm.double()), normal(*shape) * scale)
        assert worst(found) <= 1e-8

    def test_constant_channels(self, norm, shape, scale):
        x = normal(*shape) * scale
        x[:, :2] = 0.7 * scale
        (found,) = apply_all(gamma(norm.double()), x)
        # Where the variance vanishes, so does what is left of a cotangent when its mean is taken off.
        assert float((found.estimate - found.exact).norm()) <= 1e-8 * float(found.exact.norm())

    def test_no_scale_at_all(self, norm, shape, scale):
        norm = norm.double()
        nn.init.zeros_(norm.weight)
        (found,) = apply_all(norm, normal(*shape) * scale)
        assert float(found.estimate.norm()) <= 1e-12 / scale


WEIGHTED = {
    F.linear: [
        (lambda w, b, x: F.linear(x, w, b), ((5, 4), (5,)), (3, 4)),
        (lambda w, x: F.linear(input=x, weight=w * 2), ((5, 4),), (4,)),
    ],
    F.layer_norm: [
        (lambda w, b, x: F.layer_norm(x, (4,), w, b), ((4,), (4,)), (3, 4)),
        (lambda x: F.layer_norm(x, x.shape[1:], eps=0.1), (), (3, 4)),
        (lambda w, x: F.layer_norm(input=x, normalized_shape=[3, 4], weight=w), ((3, 4),), (3, 4)),
        (lambda x: F.layer_norm(x.mT, [3]), (), (3, 4)),
    ],
    F.rms_norm: [
        (lambda w, x: F.rms_norm(x, (4,), w), ((4,),), (3, 4)),
        (lambda w, x: F.rms_norm(x, (4,), w, 1e-2), ((4,),), (3, 4)),
        (lambda x: F.rms_norm(x, normalized_shape=(3, 4), eps=0.5), (), (3, 4)),
    ],
    F.group_norm: [
        (lambda w, b, x: F.group_norm(x, 2, w, b), ((4,), (4,)), (4, 3)),
        (lambda x: F.group_norm(x, num_groups=4, eps=0.2), (), (4, 2, 3)),
        (lambda w, x: F.group_norm(x.mT, 1, w), ((3,),), (4, 3)),
    ],
}


@pytest.mark.parametrize(("function", "k"), [(f, k) for f, calls in WEIGHTED.items() for k in range(len(calls))])
def test_function_with_weights(function, k):
    call, weights, shape = WEIGHTED[function][k]
    parts = [torch.randn(size, dtype=torch.float64) for size in weights]
    found = apply_all(Run(call, *parts), normal(*shape), target=function)
    assert operands(found) == 1
    assert worst(found) <= MEASURED


SPACE = {
    F.avg_pool1d: [((2, 7), lambda f, x: f(x, 3, 2, 1)), ((2, 7), lambda f, x: f(x, kernel_size=2, ceil_mode=True))],
    F.avg_pool2d: [
        ((2, 5, 6), lambda f, x: f(x, (3, 2), 1)),
        ((2, 5, 6), lambda f, x: f(x, 3, stride=2, padding=1, count_include_pad=False, ceil_mode=True)),
    ],
    F.avg_pool3d: [((1, 3, 4, 2), lambda f, x: f(x, 2, 1))],
    F.adaptive_avg_pool1d: [((2, 5), lambda f, x: f(x, 3))],
    F.adaptive_avg_pool2d: [
        ((2, 5, 4), lambda f, x: f(x, (1, 1))),
        ((2, 5, 4), lambda f, x: f(x, output_size=(None, 2))),
    ],
    F.adaptive_avg_pool3d: [((1, 3, 4, 2), lambda f, x: f(x, 2))],
    F.interpolate: [
        ((2, 3, 4), lambda f, x: f(x, scale_factor=2)),
        ((2, 3, 4), lambda f, x: f(x, (5, 7), mode="bilinear", align_corners=False)),
        ((2, 3, 4), lambda f, x: f(x, size=5, mode="bilinear", align_corners=True)),
        ((2, 4, 4), lambda f, x: f(x, scale_factor=0.5, mode="area")),
        ((2, 4, 4), lambda f, x: f(x, scale_factor=(1.5, 2), mode="bicubic", antialias=True)),
        ((2, 5), lambda f, x: f(x, size=9, mode="nearest-exact")),
    ],
    F.max_pool1d: [((2, 7), lambda f, x: f(x, 3, 2, 1)), ((2, 7), lambda f, x: f(x, kernel_size=2, ceil_mode=True))],
    F.max_pool2d: [
        ((2, 6, 5), lambda f, x: f(x, 2)),
        ((2, 6, 5), lambda f, x: f(x, (3, 2), 1, 1, 2, True)),
        ((2, 6, 5), lambda f, x: f(input=x, kernel_size=3, stride=(2, 1))),
        ((2, 6, 5), lambda f, x: f(x.round(), 3, 1)),  # ties
    ],
    F.max_pool3d: [((1, 3, 4, 2), lambda f, x: f(x, 2, 1))],
}  # fmt: skip


@pytest.mark.parametrize(("function", "k"), [(f, k) for f, calls in SPACE.items() for k in range(len(calls))])
def test_function_over_space(function, k):
    shape, call = SPACE[function][k]
    found = apply_all(Run(lambda x: call(function, x)), normal(*shape), target=function)
    assert operands(found) == 1
    assert worst(found) <= MEASURED


MASK = torch.tensor([[True, False, True, True], [True, True, False, False], [False, False, False, True]])
ATTENTION = {
    "plain": F.scaled_dot_product_attention,
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.3),
    "bool mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK),
    "empty row": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=MASK & (torch.arange(3) > 0)[:, None]
    ),
    "float mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.where(MASK, 0.3, -math.inf).double()),
    "heads": lambda q, k, v: F.scaled_dot_product_attention(
        *(t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (q, k, v))
    ),
    "keys are values": lambda q, k, v: F.scaled_dot_product_attention(q, k, k) + v[:, :3],
    "self": lambda q, k, v: F.scaled_dot_product_attention(k, k, k)[:, :3] + q + v[:, :3],
    "padding": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (k[..., :1] > -1).mT),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    q, k, v = normal(3, 6), normal(4, 6), normal(4, 6)
    found = apply_all(Run(ATTENTION[name]), q, k, v, target=F.scaled_dot_product_attention)
    assert operands(found) == {"keys are values": 2, "self": 1}.get(name, 3)
    assert worst(found) <= CLOSED


@pytest.mark.parametrize("function", affine.BY_WEIGHT, ids=lambda f: resolve_name(f) or f.__name__)
@pytest.mark.parametrize("derived", [False, True])
def test_product_with_a_weight(function, derived):
    shape = (5,) if function.__name__ == "mm" else (3, 5)
    weight = torch.randn(5, 2, dtype=torch.float64)
    model = Run((lambda w, x: function(x, w.mT.mT)) if derived else (lambda w, x: function(x, w)), weight)
    found = apply_all(model, normal(*shape))
    assert operands(found) == 1
    assert worst(found) <= MEASURED


def test_every_entry_has_a_case():
    layers = {type(layer) for layer, _ in LAYERS}
    convolutions = {kind for kind in MODULES if kind.__name__.startswith("Conv")}  # test_adjoints_convolution
    assert layers | convolutions == set(MODULES)
    named = {f for name, (calls, *_) in FORMS.items() if calls for f in functions_named(name)}
    convolving = {f for f in FUNCTIONS if f.__name__.startswith("conv")}
    tested = named | set(WEIGHTED) | set(SPACE) | convolving | {F.scaled_dot_product_attention}
    assert tested == set(FUNCTIONS)
    assert BATCH > 1

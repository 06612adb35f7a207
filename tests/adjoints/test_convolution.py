"""Convolutions of any geometry: the measured kernel is the weight, and the adjoint is autograd's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import hzo
from hzo.adjoints import Call, convolution, find_adjoint
from hzo.execution.operation import resolve
from hzo.execution.passes import base_pass, run_alone
from support.adjoint_cases import Run, apply_all, normal, operands, worst

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of torch's

MEASURED = 1e-9
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MODES = ("zeros", "reflect", "replicate", "circular")


def kernel_of(layer, x):
    """What impulses tell of a layer's kernel."""
    chain = hzo.trace(layer, x)
    (op,) = chain.traced.operations
    with torch.no_grad():
        activities = base_pass(chain.traced, [x])
        args, kwargs = resolve(op, activities.values.__getitem__, activities.batch)
        outputs = tuple(activities.values[v] for v in op.writes)

        def measure(value, probe):
            return run_alone(chain.traced, op, activities, value, probe)[0]

        call = Call(chain.traced, op, args, kwargs, outputs, dict(zip(op.writes, outputs, strict=True)), measure)
        (value,) = op.reads
        return convolution.measured_weight(call, value, convolution.geometry(op))


def check(layer, x):
    layer.double()
    found = apply_all(layer, x)
    assert operands(found) == 1
    assert worst(found) <= MEASURED
    torch.testing.assert_close(kernel_of(layer, x), layer.weight.detach(), rtol=1e-9, atol=1e-9)


@st.composite
def plain(draw):
    axes = draw(st.integers(1, 3))
    largest = {1: 5, 2: 4, 3: 2}[axes]

    def each(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    groups = draw(st.integers(1, 3))
    inside, outside = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, stride, dilation = each(1, largest), each(1, 3), each(1, 2)
    mode = draw(st.sampled_from(MODES))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.just(each(0, 3))))
    stride = (1,) * axes if padding == "same" else stride
    size = each(1, {1: 9, 2: 6, 3: 4}[axes])
    options = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "padding_mode": mode}
    return PLAIN[axes](inside, outside, kernel, bias=draw(st.booleans()), **options), (inside, *size)


@st.composite
def transposed(draw):
    axes = draw(st.integers(1, 3))
    largest = {1: 5, 2: 4, 3: 2}[axes]

    def each(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    groups = draw(st.integers(1, 3))
    inside, outside = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, stride, dilation = each(1, largest), each(1, 3), each(1, 2)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    options = {"stride": stride, "dilation": dilation, "padding": each(0, 2), "output_padding": extra, "groups": groups}
    layer = TRANSPOSED[axes](inside, outside, kernel, bias=draw(st.booleans()), **options)
    return layer, (inside, *each(1, {1: 6, 2: 4, 3: 3}[axes]))


@settings(max_examples=150)
@given(plain())
def test_any_geometry(case):
    layer, shape = case
    x = normal(*shape, batch=2)
    try:
        layer.double()(x)
    except RuntimeError:  # torch takes no such padding, or nothing would come out
        assume(False)
    check(layer, x)


@settings(max_examples=100)
@given(transposed())
def test_any_transposed_geometry(case):
    layer, shape = case
    x = normal(*shape, batch=2)
    try:
        layer.double()(x)
    except RuntimeError:
        assume(False)
    check(layer, x)


LAYERS = [
    (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    (nn.Conv2d(4, 4, 7, padding=3, groups=4), (4, 6, 5)),
    (nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), (3, 7, 6)),
    (nn.Conv2d(2, 3, 2, stride=3), (2, 8, 7)),
    (nn.Conv2d(2, 2, 4, padding="same", padding_mode="circular"), (2, 5, 6)),
    (nn.Conv2d(2, 2, (1, 4), padding="same", dilation=(1, 2)), (2, 5, 8)),
    (nn.Conv2d(1, 2, 3, padding=5), (1, 1, 1)),
    (nn.Conv1d(2, 2, 1, stride=4), (2, 3)),
    (nn.ConvTranspose2d(2, 3, 2, 2), (2, 3, 4)),
    (nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=4), (4, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_usual_layers(layer, shape):
    check(layer, normal(*shape))


FUNCTIONS = {
    "conv1d": lambda w, b, x: F.conv1d(x, w, b, 2, 1),
    "conv2d": lambda w, b, x: F.conv2d(x, w, b, stride=(1, 2), padding=1, dilation=2),
    "conv2d same": lambda w, b, x: F.conv2d(input=x, weight=w, bias=b, padding="same"),
    "conv3d": lambda w, b, x: F.conv3d(x, w, padding=1),
    "conv_transpose1d": lambda w, b, x: F.conv_transpose1d(x, w, b, 2, 1, 1),
    "conv_transpose2d": lambda w, b, x: F.conv_transpose2d(x, w, stride=(2, 1), output_padding=(1, 0), dilation=1),
    "conv_transpose3d": lambda w, b, x: F.conv_transpose3d(x, w, b, 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    axes = int(name.split()[0][-2])
    weight = torch.randn(2, 2, *(3, 2, 2)[:axes], dtype=torch.float64)
    x = normal(2, *(5, 6, 3)[:axes])
    found = apply_all(Run(FUNCTIONS[name], weight, torch.randn(2, dtype=torch.float64)), x)
    assert operands(found) == 1
    assert worst(found) <= MEASURED


def test_grouped_functions():
    weight = torch.randn(4, 1, 3, dtype=torch.float64)
    assert worst(apply_all(Run(lambda w, x: F.conv1d(x, w, groups=4), weight), normal(4, 6))) <= MEASURED
    assert worst(apply_all(Run(lambda w, x: F.conv_transpose1d(x, w, groups=4), weight), normal(4, 6))) <= MEASURED


def test_what_is_no_plain_convolution_is_refused():
    """An output size asked for; a weight that differs from sample to sample; one sample without a batch."""
    layer = nn.ConvTranspose1d(2, 2, 3, stride=2).double()
    sized = Run(lambda m, x: m(x, output_size=[8]), layer)
    assert apply_all(sized, normal(2, 3)) == []
    own = Run(lambda x: F.conv1d(x.view(1, -1, 5), x[:, :1, :2].reshape(-1, 1, 2).repeat(2, 1, 1), groups=2 * len(x)))
    chain = hzo.trace(own, normal(2, 5))
    op = next(op for op in chain.traced.operations if op.target is F.conv1d)
    assert all(find_adjoint(chain.traced, op, value) is None for value in op.reads)

"""Recurrent layers and cells: autograd's gradients, whatever their options."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import hzo
from hzo.errors import TapeError
from hzo.reverse import record
from hzo.rules.base import rules
from hzo.tape.custom import CustomFunction
from support.chip import Chip, follows

aten = torch.ops.aten
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


def agree(function, leaves, dtype=torch.float64):
    """Gradients of a random functional of the results, under the same random numbers."""

    def loss():
        torch.manual_seed(7)
        results = function()
        generator = torch.Generator().manual_seed(3)
        return sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors(results))

    expected = torch.autograd.grad(loss(), leaves, allow_unused=True)
    with record() as step:
        value = loss()
    unknown = [op.target for op in step.tape.operations if op.target not in rules]
    assert all(isinstance(target, CustomFunction) for target in unknown)
    found = {id(t): g for t, g in step.gradients(value)}
    for k, (leaf, g) in enumerate(zip(leaves, expected, strict=True)):
        if g is None:
            assert id(leaf) not in found
            continue
        error = float((found[id(leaf)] - g).abs().max()) / max(float(g.abs().max()), 1e-3)
        assert error <= TOLERANCE[dtype], f"leaf {k} of shape {tuple(leaf.shape)} is off by {error:.1e}"


def tensors(results):
    if isinstance(results, PackedSequence):
        return [results.data]
    if isinstance(results, torch.Tensor):
        return [results]
    return [t for r in results for t in tensors(r)]


def inputs(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


LAYERS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU, "ReLU": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}
OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 2, "dropout": 0.4},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layers(kind, options, dtype):
    layer = LAYERS[kind](3, 4, **options).to(dtype)
    (x,) = inputs((5, 2, 3), dtype=dtype)
    agree(lambda: layer(x), [x, *layer.parameters()], dtype)


@pytest.mark.parametrize(
    "options", [{"proj_size": 2}, {"proj_size": 3, "num_layers": 2, "bidirectional": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_projections(options, dtype):
    layer = nn.LSTM(3, 4, **options).to(dtype)
    (x,) = inputs((5, 2, 3), dtype=dtype)
    agree(lambda: layer(x), [x, *layer.parameters()], dtype)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("directions", [1, 2])
def test_states_to_begin_with(kind, directions):
    layer = LAYERS[kind](3, 4, num_layers=2, bidirectional=directions == 2).double()
    x, h, c = inputs((5, 2, 3), (2 * directions, 2, 4), (2 * directions, 2, 4))
    states = (h, c) if kind == "LSTM" else h
    agree(lambda: layer(x, states), [x, h, c, *layer.parameters()] if kind == "LSTM" else [x, h, *layer.parameters()])
    agree(lambda: layer(x, states)[0][-1], [x, h, *layer.parameters()])  # the last step alone
    agree(lambda: layer(x, states)[1], [x, h, *layer.parameters()])  # the states alone


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.3}], ids=str)
@pytest.mark.parametrize("ordered", [True, False])
def test_sequences_of_different_lengths(kind, options, ordered):
    layer = LAYERS[kind](3, 4, **options).double()
    (x,) = inputs((5, 3, 3))
    lengths = [5, 3, 2] if ordered else [2, 5, 3]

    def function():
        packed = pack_padded_sequence(x, lengths, enforce_sorted=ordered)
        out, states = layer(packed)
        return pad_packed_sequence(out)[0], states

    agree(function, [x, *layer.parameters()])


def test_packed_sequences_with_projections_and_states():
    layer = nn.LSTM(3, 4, proj_size=2, bidirectional=True).double()
    x, h, c = inputs((2, 5, 3), (2, 2, 2), (2, 2, 4))

    def function():
        packed = pack_padded_sequence(x, [3, 5], batch_first=True, enforce_sorted=False)
        return layer(packed, (h, c))

    agree(function, [x, h, c, *layer.parameters()])


@pytest.mark.parametrize("kind", LAYERS)
def test_without_a_batch_and_in_evaluation(kind):
    layer = LAYERS[kind](3, 4, num_layers=2, dropout=0.5).double().eval()
    for shape in ((5, 3), (1, 2, 3)):
        (x,) = inputs(shape)
        agree(lambda: layer(x), [x, *layer.parameters()])  # noqa: B023


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cells(cell, bias, dtype):
    step = cell(3, 4, bias=bias).to(dtype)
    x, h, c = inputs((6, 2, 3), (2, 4), (2, 4), dtype=dtype)

    def function():
        state = (h, c) if cell is nn.LSTMCell else h
        for part in x:
            state = step(part, state)
        return state

    agree(function, [x, h, *([c] if cell is nn.LSTMCell else []), *step.parameters()], dtype)
    agree(lambda: step(x[0]), [x, *step.parameters()], dtype)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layers_are_recorded_step_by_step(kind, dtype):
    """Nothing computes a layer as a whole without a rule for that, and afterwards the libraries may again."""
    before = torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    layer = LAYERS[kind](3, 4).to(dtype)
    with record() as step:
        layer(torch.randn(5, 2, 3, dtype=dtype))
    whole = [op.name for op in step.tape.operations if "rnn" in op.name or "lstm" in op.name]
    assert whole == (["aten.mkldnn_rnn_layer.default"] if kind == "LSTM" and dtype == torch.float32 else [])
    assert (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled) == before
    assert torch._VF.lstm is torch._C._VariableFunctions.lstm


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 2}, {"proj_size": 2, "bias": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_recorded_layer_computes_what_the_layer_does(kind, options, dtype):
    """To the bit, in fewer calls: one for what a cell does besides its products."""
    if kind == "GRU" and "proj_size" in options:
        pytest.skip("a GRU has no projection")
    layer = LAYERS[kind](3, 4, **options).to(dtype)
    x = torch.randn(5, 2, 3, dtype=dtype)
    torch.manual_seed(0)
    expected = tensors(layer(x))
    torch.manual_seed(0)
    with record() as step:
        found = tensors(layer(x))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    directions = layer.num_layers * (2 if layer.bidirectional else 1)
    assert len(step.tape.operations) <= directions * (4 * 5 + 10) + 5


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4), nn.GRU(3, 4), nn.LSTM(3, 4, proj_size=2)], ids=str)
def test_a_derivative_taken_inside_goes_through_a_recurrent_layer(layer):
    layer = layer.double()
    (x,) = inputs((5, 2, 3))

    def penalty():
        out = layer(x)[0].square().sum()
        (inner,) = torch.autograd.grad(out, x, create_graph=True)
        return out + inner.square().sum()

    agree(penalty, [x, *layer.parameters()])


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4), nn.GRU(3, 4)], ids=str)
def test_wrong_sizes_have_pytorchs_own_errors(layer):
    layer = layer.double()
    for arguments in (
        (torch.randn(5, 2, 3),),
        (torch.randn(5, 2, 7).double(),),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as expected:
            layer(*arguments)
        with pytest.raises(expected.type) as found, record():
            layer(*arguments)
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layers_of_onednn(options):
    """With states to begin with, of which only some results are used; in evaluation, where autograd may as well."""
    layer = nn.LSTM(3, 4, **options)
    directions = 2 * layer.num_layers if layer.bidirectional else layer.num_layers
    x, h, c = inputs((2, 5, 3), (directions, 2, 4), (directions, 2, 4), dtype=torch.float32)
    x = x if layer.batch_first else x.detach().transpose(0, 1).contiguous().requires_grad_()
    leaves = [x, h, c, *layer.parameters()]
    agree(lambda: layer(x, (h, c)), leaves, torch.float32)
    agree(lambda: layer(x, (h, c))[1], leaves, torch.float32)
    agree(lambda: layer(x.detach(), (h, c))[0][-1:], leaves[1:], torch.float32)
    layer.eval()
    agree(lambda: layer(x, (h, c)), leaves, torch.float32)


def test_one_step_after_the_other_measures_the_weights_once():
    layer = nn.LSTM(3, 4)
    (x,) = inputs((6, 2, 3), dtype=torch.float32)

    def function():
        states, results = None, []
        for part in x.split(1):
            out, states = layer(part, states)
            results.append(out)
        return results

    agree(function, [x, *layer.parameters()], torch.float32)
    with record() as step:
        loss = sum(r.sum() for r in function())
    with hzo.count_queries() as count:
        step.gradients(loss)
    assert count.queries == 3 * (3 + 1) + 3 * (4 + 1)


@pytest.mark.parametrize("size", [1e-12, 1e-5, 1, 30, 1e4])
def test_weights_of_any_size(size):
    """Each entry of the state has weights of another size, one of them none at all."""
    layer = nn.LSTM(3, 4)
    (x,) = inputs((1, 2, 3), dtype=torch.float32)
    h, c = inputs((1, 2, 4), (1, 2, 4), dtype=torch.float32)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(torch.tensor([size, 1, 0, 0.1]))
        layer.weight_ih_l0.mul_(torch.tensor([0, 1, size]))
    loss = layer(x * 1e-5, (h * 1e-5, c))[0].square().sum()
    expected = torch.autograd.grad(loss, [x, h])
    with record() as step:
        value = layer(x * 1e-5, (h * 1e-5, c))[0].square().sum()
    found = {id(t): g for t, g in step.gradients(value)}
    for leaf, g in zip((x, h), expected, strict=True):
        for column, right in zip(found[id(leaf)].unbind(-1), g.unbind(-1), strict=True):
            assert torch.allclose(column, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


def test_an_lstm_that_cannot_be_measured_is_an_error():
    layer = nn.LSTM(3, 4)
    with record() as step:
        loss = layer(torch.randn(5, 2, 3))[0].sum()
    layer.weight_hh_l0.data.fill_(torch.inf)  # which PyTorch does not count as a write
    with pytest.raises(TapeError, match="could not be measured"):
        step.gradients(loss)


def test_an_lstm_follows_the_hardware():
    """The chip holds other weights than stand in the parameters, which are not numbers."""
    layer = nn.LSTM(3, 4)
    (x,) = inputs((5, 2, 3), dtype=torch.float32)
    factor = torch.randn(5, 2, 4)
    expected = torch.autograd.grad((layer(x)[0] * factor).sum(), x)[0]
    with Chip({aten.mkldnn_rnn_layer.default: lambda out: out}, list(layer.parameters())) as chip:
        with record() as step:
            loss = (layer(x)[0] * factor).sum()
        found = {id(t): g for t, g in step.gradients(loss)}
    assert chip.calls > 1
    assert layer.weight_hh_l0.isnan().all()
    assert torch.allclose(found[id(x)], expected, rtol=1e-5, atol=1e-6)


def test_frozen_layers():
    layer = nn.LSTM(3, 4).double().requires_grad_(False)
    (x,) = inputs((5, 2, 3))
    agree(lambda: layer(x), [x])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_cotangents_follow_the_hardware(kind):
    """A gain and an offset of every product are those of a layer with other weights."""
    layer = LAYERS[kind](3, 4).double()
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *held):
        return torch.func.functional_call(layer, dict(zip(names, held, strict=True)), (x,))[0]

    def on_chip(x, *held):
        changed = [1.3 * t + (0.1 if "bias" in name else 0) for name, t in zip(names, held, strict=True)]
        return function(x, *changed)

    leaves = [*inputs((5, 2, 3)), *layer.parameters()]
    follows(function, on_chip, leaves, (1, 2, 3, 4), {aten.addmm.default: lambda out: 1.3 * out + 0.1})


# ---- cells that a GPU computes in one kernel: the kernels written out for the CPU -----------------------------------


def lstm_forward(gates, hidden, cx, input_bias=None, hidden_bias=None):
    total = gates + hidden + (0 if input_bias is None else input_bias + hidden_bias)
    i, f, g, o = total.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def lstm_backward(of_hidden, of_cell, cx, cy, workspace, has_bias):
    i, f, g, o = workspace.chunk(4, 1)
    of_hidden = torch.zeros_like(cy) if of_hidden is None else of_hidden
    of_cy = of_hidden * o * (1 - cy.tanh().square()) + (0 if of_cell is None else of_cell)
    gates = torch.cat([of_cy * g * i * (1 - i), of_cy * cx * f * (1 - f), of_cy * i * (1 - g.square()),
                       of_hidden * cy.tanh() * o * (1 - o)], 1)  # fmt: skip
    return gates, of_cy * f, gates.sum(0) if has_bias else torch.empty(0, dtype=cx.dtype)


def gru_forward(gates, hidden, hx, input_bias=None, hidden_bias=None):
    if input_bias is not None:
        gates, hidden = gates + input_bias, hidden + hidden_bias
    (ir, iz, inew), (hr, hz, hn) = gates.chunk(3, 1), hidden.chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    new = (inew + r * hn).tanh()
    return (1 - z) * new + z * hx, torch.cat([r, z, new, hx, hn], 1)


def gru_backward(of_hidden, workspace, has_bias):
    r, z, new, hx, hn = workspace.chunk(5, 1)
    of_new = of_hidden * (1 - z) * (1 - new.square())
    of_z = of_hidden * (hx - new) * z * (1 - z)
    of_r = of_new * hn * r * (1 - r)
    gates, hidden = torch.cat([of_r, of_z, of_new], 1), torch.cat([of_r, of_z, of_new * r], 1)
    biases = (gates.sum(0), hidden.sum(0)) if has_bias else (torch.empty(0), torch.empty(0))
    return gates, hidden, of_hidden * z, *biases


@pytest.fixture
def kernels():
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_thnn_fused_lstm_cell", lstm_forward, "CPU")
        library.impl("_thnn_fused_lstm_cell_backward_impl", lstm_backward, "CPU")
        library.impl("_thnn_fused_gru_cell", gru_forward, "CPU")
        library.impl("_thnn_fused_gru_cell_backward", gru_backward, "CPU")
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("results", [(0,), (1,), (0, 1)])
@pytest.mark.usefixtures("kernels")
def test_fused_lstm_cell(bias, results):
    gates, hidden, cx, b1, b2 = leaves = inputs((2, 12), (2, 12), (2, 3), (12,), (12,))
    given = leaves if bias else leaves[:3]
    weights = [nn.Parameter(b.detach()) for b in (b1, b2)] if bias else []
    given = [*leaves[:3], *weights]

    def function():
        out = torch.ops.aten._thnn_fused_lstm_cell(gates * 1, hidden * 1, cx * 1, *weights)
        return [out[k] for k in results]

    agree(function, given)
    expected = lstm_forward(gates, hidden, cx, *weights)
    loss = sum(expected[k].sum() for k in results)
    with record() as step:
        value = sum(t.sum() for t in function())
    found = {id(t): g for t, g in step.gradients(value)}
    for leaf, g in zip(given, torch.autograd.grad(loss, given), strict=True):
        assert torch.allclose(found[id(leaf)], g)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("kernels")
def test_fused_gru_cell(bias):
    gates, hidden, hx, b1, b2 = inputs((2, 9), (2, 9), (2, 3), (9,), (9,))
    weights = [nn.Parameter(b.detach()) for b in (b1, b2)] if bias else []
    given = [gates, hidden, hx, *weights]
    with record() as step:
        value = torch.ops.aten._thnn_fused_gru_cell(gates, hidden, hx, *weights)[0].square().sum()
    found = {id(t): g for t, g in step.gradients(value)}
    loss = gru_forward(gates, hidden, hx, *weights)[0].square().sum()
    for leaf, g in zip(given, torch.autograd.grad(loss, given), strict=True):
        assert torch.allclose(found[id(leaf)], g)

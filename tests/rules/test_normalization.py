"""Normalizing layers: autograd's gradients in float64, with the statistics that the call returned."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo import count_queries
from hzo.reverse import record
from hzo.tape.functions import out_of_place
from support.by_hand import by_hand
from support.chip import follows, ramp
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten
WEIGHTS = [(), (1, 2), (0, 1, 2), (0,)]
BATCH = "aten.native_batch_norm.default out of place"


def running(channels, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(channels, generator=generator, dtype=torch.float64).to(dtype)
    return mean, mean.abs() + 0.3


# ---- batch normalization --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2), (2, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_batch_norm(shape, training, weights):
    def function(x, w, b):
        return F.batch_norm(x, *(t.clone() for t in running(shape[1])), w, b, training=training, eps=1e-3)

    check(function, leaves_of(shape, (shape[1],), (shape[1],)), weights=weights, calls=[BATCH])


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_parameters_or_statistics(training):
    statistics = running(3)
    check(lambda x: F.batch_norm(x, *statistics, training=training), leaves_of((4, 3, 5)), calls=[BATCH])
    check(lambda x, w: F.batch_norm(x, None, None, w, training=True), leaves_of((4, 3, 5), (3,)), weights=(1,))
    check(lambda x, b: F.batch_norm(x, *statistics, None, b, training=training), leaves_of((4, 3, 5), (3,)))


@pytest.mark.parametrize("weights", [(), (1, 2), (0,)], ids=str)
def test_batch_norm_of_other_names(weights):
    mean, variance = running(3)
    given = leaves_of((4, 3, 5), (3,), (3,))
    for function in (
        lambda x, w, b: aten._native_batch_norm_legit(x, w, b, mean.clone(), variance.clone(), True, 0.1, 1e-5)[0],
        lambda x, w, b: aten._native_batch_norm_legit(x, w, b, mean.clone(), variance.clone(), False, 0.1, 1e-5)[0],
        lambda x, w, b: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5)[0],
        lambda x, w, b: aten._native_batch_norm_legit_no_training(x, w, b, mean, variance, 0.1, 1e-5)[0],
        lambda x, w, b: aten._native_batch_norm_legit_functional(x, w, b, mean, variance, True, 0.1, 1e-5)[0],
        lambda x, w, b: aten._batch_norm_with_update(x, w, b, mean.clone(), variance.clone(), 0.1, 1e-5)[0],
        lambda x, w, b: aten._batch_norm_with_update_functional(x, w, b, mean, variance, 0.1, 1e-5)[0],
        lambda x, w, b: aten._batch_norm_no_update(x, w, b, mean, variance, 0.1, 1e-5)[0],
    ):
        check(function, given, weights=weights)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_probes_move_no_running_statistics(options, training):
    layer = nn.BatchNorm2d(3, **options).double().train(training)
    once = copy.deepcopy(layer)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    with record() as step:
        loss = layer(x).square().sum()
    step.gradients(loss)
    once(x)
    for (name, held), (_, expected) in zip(layer.named_buffers(), once.named_buffers(), strict=True):
        assert torch.equal(held, expected), name


def test_frozen_batch_norm_with_large_statistics():
    """In evaluation the probe takes no mean away: a large one would cost the slope its digits."""
    layer = nn.BatchNorm1d(3).eval()
    nn.init.constant_(layer.running_mean, 1e6)
    nn.init.normal_(layer.weight)
    x = torch.randn(4, 3, requires_grad=True)
    with record() as step:
        loss = layer(x).sum()
    (found,) = (g for t, g in step.gradients(loss) if t is x)
    assert torch.allclose(found, (layer.weight / (1 + 1e-5) ** 0.5).expand(4, 3), rtol=1e-6)


# ---- layer, group and RMS normalization -----------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "inside"), [((2, 3, 4), 1), ((2, 3, 5), 2), ((3, 5), 1), ((4,), 1)])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_layer_norm(shape, inside, weights):
    over = shape[-inside:]
    leaves = leaves_of(shape, over, over)
    check(lambda x, w, b: F.layer_norm(x, over, w, b, 1e-3), leaves, weights=weights, calls=[
        "aten.native_layer_norm.default"])  # fmt: skip
    check(lambda x: F.layer_norm(x, over), leaves[:1])
    check(lambda x, w: F.layer_norm(x, over, w), leaves[:2], weights=[k for k in weights if k < 2])


@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 4, 5), 2), ((2, 6, 3, 2), 3), ((3, 4), 1), ((2, 3, 4), 3), ((1, 4, 1), 2)]
)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_group_norm(shape, groups, weights):
    leaves = leaves_of(shape, (shape[1],), (shape[1],))
    check(lambda x, w, b: F.group_norm(x, groups, w, b, 1e-3), leaves, weights=weights, calls=[
        "aten.native_group_norm.default"])  # fmt: skip
    check(lambda x: F.group_norm(x, groups), leaves[:1])


def test_group_norm_of_constant_images_channels_last():
    """PyTorch's kernel must not be asked for less than it can give: autograd's own backward crashes here."""
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        scale, shift = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
        with record() as step:
            loss = F.group_norm(x.contiguous(memory_format=form), 2, scale, shift).pow(3).sum()
        step.backward(loss)
        found.append((scale.grad, shift.grad))
    torch.testing.assert_close(found[0], found[1])


def test_layer_norm_of_one_element():
    """It returns its bias, whatever the input."""
    x, w, b = leaves_of((2, 3, 1), (1,), (1,))
    w = nn.Parameter(w.detach())
    with record() as step:
        loss = F.layer_norm(x, (1,), w, b).square().sum()
    found = {id(t): g for t, g in step.gradients(loss)}
    assert torch.allclose(found[id(b)], 12 * b)
    assert float(found[id(x)].abs().max()) < 1e-12
    assert float(found[id(w)].abs().max()) < 1e-12


@pytest.mark.parametrize("results", [(0, 1, 2), (1, 2), (1,), (2,)])
def test_statistics_of_a_group_norm_carry_a_gradient(results):
    """They are results like others, for who calls the operator by its name; autograd loses some of them."""
    x, w, b = leaves_of((2, 4, 5), (4,), (4,))
    factors = leaves_of((2, 4, 5), (2, 2), (2, 2))

    def loss(out):
        return sum((out[k] * factors[k].detach()).sum() for k in results)

    with record() as step:
        value = loss(torch.native_group_norm(x, w, b, 2, 4, 5, 2, 1e-3))
    groups = x.view(2, 2, 10)
    mean, rstd = groups.mean(-1), (groups.var(-1, unbiased=False) + 1e-3).rsqrt()
    expected = torch.autograd.grad(loss([F.group_norm(x, 2, w, b, 1e-3), mean, rstd]), x)[0]
    (found,) = (g for t, g in step.gradients(value) if t is x)
    assert torch.allclose(found, expected)


def test_memory_formats():
    def function(x, w, b):
        x = x.to(memory_format=torch.channels_last)
        return F.group_norm(x, 2, w, b), F.batch_norm(x, None, None, w, b, training=True), F.group_norm(x.mT, 2, w, b)

    check(function, leaves_of((2, 4, 3, 5), (4,), (4,)), weights=(1, 2))
    check(lambda x, w: F.layer_norm(x.mT, (3,), w).sum(), leaves_of((2, 3, 4), (3,)), weights=(1,))
    check(lambda x, w: F.group_norm(x, 2, w).sum((2, 3)), leaves_of((2, 4, 3, 5), (4,)), weights=(1,))


@pytest.mark.parametrize("weights", [(), (1,), (0,)], ids=str)
def test_other_normalizations(weights):
    leaves = leaves_of((2, 4, 6), (4,), (4,))
    check(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), leaves, weights=weights)
    statistics = running(4)
    check(lambda x, w, b: F.instance_norm(x, *statistics, w, b, use_input_stats=False), leaves, weights=weights)
    check(lambda x, w: F.rms_norm(x, (6,), w), leaves_of((2, 4, 6), (6,)), weights=weights)
    check(lambda x: F.normalize(x, dim=1), leaves[:1])
    check(lambda x: F.local_response_norm(x, 3), leaves_of((2, 4, 6, 3)))


@pytest.mark.parametrize("eps", [1e-5, None])
@pytest.mark.parametrize("weights", [(), (1,), (0,)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_fused_rms_norm(weights, affine, eps):
    """Only other devices have the kernel; its rule is tried here on what its decomposition returns."""
    x, w = (t.detach() for t in leaves_of((2, 3, 4, 5), (4, 5)))
    given = (x.requires_grad_(), (4, 5), w.requires_grad_() if affine else None, eps)
    out = torch.ops.aten._fused_rms_norm(*given)
    cotangents = [torch.randn_like(t) for t in out]
    leaves = [x, w] if affine else [x]
    expected = torch.autograd.grad(out, leaves, cotangents)
    places = [2 * k for k in weights]
    found = by_hand(aten._fused_rms_norm.default, given, out, cotangents, weights=places)
    for key, e in zip((0, 2), expected, strict=False):
        assert torch.allclose(found[key], e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [(), (1, 2)], ids=str)
def test_batch_norm_by_cudnn(training, weights):
    """Tried by hand, with PyTorch's own kernel in the place of cuDNN's."""
    x, w, b = leaves_of((4, 3, 5, 2), (3,), (3,))
    mean, variance = running(3)

    def kernel(x, w, b, mean, variance, training, momentum, eps):
        given = mean.clone(), variance.clone(), training, momentum, eps
        return (*aten.native_batch_norm(x, w, b, *given), torch.empty(0))

    options = (mean, variance, training, 0.1, 1e-5)
    out = kernel(x, w, b, *options)
    cotangent = torch.randn_like(out[0])
    expected = torch.autograd.grad(out[0], (x, w, b), cotangent)
    target = out_of_place(aten.cudnn_batch_norm.default, (3, 4))
    found = by_hand(target, (x, w, b, *options), out, [cotangent, None, None, None], weights=weights,
                    measure=lambda op, args, kwargs, size: kernel(*args))  # fmt: skip
    for k, e in enumerate(expected):
        assert torch.allclose(found[k], e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 2])
def test_weight_norm(dim):
    shape = (1, 4)[dim == 0], 1, (3, 1)[dim == 0]
    check(lambda x, v, g: F.conv1d(x, torch._weight_norm(v, g, dim)), leaves_of((2, 2, 5), (4, 2, 3), shape),
          weights=(1, 2), calls=["aten._weight_norm_interface.default"])  # fmt: skip


# ---- what is measured -----------------------------------------------------------------------------------------------


def chip(dim):
    return lambda out: out * ramp(out, dim) + 0.3


FOLLOWING = {
    "batch": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True), aten.native_batch_norm.default, (4, 3, 5), (3,), 1,
    ),
    "batch, evaluation": (
        lambda x, w, b: F.batch_norm(x, *running(3), w, b, False), aten.native_batch_norm.default, (4, 3, 5), (3,), 1,
    ),
    "layer": (lambda x, w, b: F.layer_norm(x, (5,), w, b), aten.native_layer_norm.default, (4, 3, 5), (5,), -1),
    "layer over two": (
        lambda x, w, b: F.layer_norm(x, (3, 4), w, b), aten.native_layer_norm.default, (2, 3, 4), (3, 4), -1,
    ),
    "group": (lambda x, w, b: F.group_norm(x, 2, w, b), aten.native_group_norm.default, (3, 4, 5), (4,), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWING)
def test_cotangents_follow_the_hardware(case):
    function, operator, shape, parameters, dim = FOLLOWING[case]
    change = chip(dim)
    follows(function, lambda *leaves: change(function(*leaves)), leaves_of(shape, parameters, parameters), (1, 2),
            {operator: change})  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWING)
def test_a_learned_input_is_measured(case):
    function, operator, shape, parameters, _ = FOLLOWING[case]
    bias = torch.zeros(parameters, dtype=torch.float64)
    written = lambda x, w: function(x, w, bias)  # noqa: E731
    follows(written, lambda x, w: written(x, w) * 1.3 + 0.2, leaves_of(shape, parameters), (0,),
            {operator: lambda out: out * 1.3 + 0.2})  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWING)
def test_no_scale_and_no_spread(case):
    """γ = 0, and channels that are constant: measured on probes of their own, exact all the same."""
    function, _, shape, parameters, _ = FOLLOWING[case]
    x, w, b = leaves_of(shape, parameters, parameters)
    check(function, [x, torch.zeros_like(w), b], weights=(1, 2))
    check(function, [torch.full_like(x, 0.7), w, b], weights=(1, 2))
    check(function, [x * 1e-6, w, b], weights=(1, 2), tolerance=1e-7)


@pytest.mark.parametrize("case", FOLLOWING)
def test_float32(case):
    function, _, shape, parameters, _ = FOLLOWING[case]
    if "evaluation" in case:
        function = lambda x, w, b: F.batch_norm(x, *running(3, torch.float32), w, b, False)  # noqa: E731
    check(function, leaves_of(shape, parameters, parameters, dtype=torch.float32), weights=(1, 2), tolerance=2e-6)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(3), nn.LayerNorm(5), nn.GroupNorm(1, 3)], ids=lambda m: type(m).__name__
)
def test_mixed_precision(layer):
    """Activations in bfloat16, parameters in float32: γ is measured in float32."""
    nn.init.normal_(layer.weight)
    x = torch.randn(4, 3, 5, dtype=torch.bfloat16)
    gradients = []
    for weight in (False, True):
        leaf = x.clone().requires_grad_()
        with record() as step:
            if weight:
                loss = layer(leaf).float().square().sum()
            else:  # the same without parameters of its own: γ is read
                plain = {k: v.detach() for k, v in layer.named_parameters()}
                loss = torch.func.functional_call(layer, plain, (leaf,)).float().square().sum()
        gradients += [g for t, g in step.gradients(loss) if t is leaf]
    assert torch.equal(*gradients)


def test_what_a_measured_gamma_costs():
    for layer, rows in ((nn.BatchNorm1d(3), 2), (nn.LayerNorm(5), 2), (nn.GroupNorm(1, 3), 1)):
        with record() as step:
            loss = layer(torch.randn(4, 3, 5, requires_grad=True)).sum()
        with count_queries() as count:
            step.gradients(loss)
        assert count.queries == rows


# ---- derivatives taken inside the model -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", FOLLOWING)
@pytest.mark.parametrize("weights", [(), (1, 2)], ids=str)
def test_penalties_of_gradients(case, weights):
    function, _, shape, parameters, _ = FOLLOWING[case]

    def penalized(x, w, b):
        found = torch.autograd.grad(function(x, w, b).pow(3).sum(), (x, w, b), create_graph=True)
        return [g.square() for g in found]

    check(penalized, leaves_of(shape, parameters, parameters), weights=weights)
    check(lambda x, w, b: penalized(x, w, b)[0], leaves_of(shape, parameters, parameters), weights=weights)


def test_penalties_without_parameters():
    def penalized(x):
        (g,) = torch.autograd.grad((F.layer_norm(x, (5,)) + F.batch_norm(x, None, None, training=True)).pow(3).sum(), x,
                                   create_graph=True)  # fmt: skip
        return g.square()

    check(penalized, leaves_of((4, 3, 5)))


def test_penalties_of_other_names():
    mean, variance = running(3)

    def penalized(x, w):
        out = aten._batch_norm_with_update(x, w, None, mean.clone(), variance.clone(), 0.1, 1e-5)[0]
        (g,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return g.square()

    check(penalized, leaves_of((4, 3, 5), (3,)), calls=["aten.batch_norm_backward.default"])


def test_penalties_by_cudnn():
    """Tried by hand: autograd's second derivative of batch normalization is the oracle."""
    x, w = leaves_of((4, 3, 5), (3,))
    g = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    mean, inverse = x.detach().mean((0, 2)), (x.detach().var((0, 2), unbiased=False) + 1e-5).rsqrt()
    out = aten.native_batch_norm_backward(g, x, w, None, None, mean, inverse, True, 1e-5, [True] * 3)
    cotangents = [torch.randn_like(t) for t in out]
    expected = torch.autograd.grad(out, (x, g, w), cotangents)
    given = (x, g, w, None, None, mean, inverse, 1e-5, torch.empty(0))
    found = by_hand(aten.cudnn_batch_norm_backward.default, given, out, cotangents)
    for k, e in enumerate(expected):
        assert torch.allclose(found[k], e, rtol=1e-9, atol=1e-12)


WRITING = {
    "native": lambda x, w, b, m, v: torch.batch_norm(x, w, b, m, v, True, 0.1, 1e-5, False),
    "legit": lambda x, w, b, m, v: aten._native_batch_norm_legit(x, w, b, m, v, True, 0.1, 1e-5)[0],
    "with update": lambda x, w, b, m, v: aten._batch_norm_with_update(x, w, b, m, v, 0.1, 1e-5)[0],
}


@pytest.mark.parametrize("kind", WRITING)
def test_what_a_batch_norm_made_is_not_held(kind):
    """Neither its rule nor that of the ReLU behind it reads it: cuDNN's is recorded like these."""
    x, gamma = torch.randn(6, 4, 5, 5, requires_grad=True), torch.rand(4, requires_grad=True)
    y = x
    with hzo.record() as tape:
        for _ in range(4):
            y = torch.relu(WRITING[kind](y, gamma, torch.zeros(4, requires_grad=True), torch.zeros(4), torch.ones(4)))
        loss = y.square().mean()
    held = [t for t in tape.tape.tensors if t is not None and t.shape == x.shape]
    assert len({t.data_ptr() for t in held}) <= 1 + 4 + 2  # x, what ReLU returned, what was made last
    tape.backward(loss)

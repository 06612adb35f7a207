"""``hzo.check_structure``: what holds passes, and a liar for each promise is caught and named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import hzo
from hzo import adjoints, locality, parameter_rules, structure
from hzo.errors import StructureError
from support.cases import CASES
from support.hardware import Hardware, Opaque, as_torch_function, ramp


def normal(*shape, batch=3):
    return torch.randn(batch, *shape, dtype=torch.float64)


def caught(model, x, **options):
    with pytest.raises(StructureError) as error:
        hzo.check_structure(model, x, **options)
    return str(error.value)


# ---- what holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_networks_of_torch_layers_hold(name, dtype):
    problem = CASES[name].build()
    if dtype == torch.float32 and name == "tuple_stages":
        pytest.skip("its layers are hidden in closures, and stay in float64")
    problem.module.to(dtype)
    x = pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, problem.x)
    report = hzo.check_structure(problem.model, x)
    assert len(report.checks) > 10
    assert all(check.finding.holds for check in report.checks)
    assert str(report).startswith(f"{len(report.checks)} promises hold\n")


def test_what_could_not_be_tested_is_said():
    """One sample has no other beside it; and about values that rounding has made equal, differences say nothing."""
    assert "not tested: samples apart, 0 in stage 0 (0:Tanh): one sample alone" in str(
        hzo.check_structure(nn.Sequential(nn.Tanh()), normal(4, batch=1))
    )
    coarse = (10 + 0.02 * normal(4, 5)).bfloat16()
    assert "not tested: adjoint rule (normalizing)" in str(hzo.check_structure(nn.LayerNorm(5).bfloat16(), coarse))


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_means_are_no_lies(norm, dtype):
    """A difference of large numbers magnifies rounding, in the forward pass as in the test."""
    for seed in range(5):
        torch.manual_seed(seed)
        hzo.check_structure(norm.to(dtype), (10 + 0.01 * normal(4, 16)).to(dtype), seed=seed)


@pytest.mark.parametrize("layer", [nn.Linear(4096, 32), nn.Conv2d(256, 16, 3, padding=1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sums_are_no_lies(layer, dtype):
    x = normal(4096) if isinstance(layer, nn.Linear) else normal(256, 4, 4)
    hzo.check_structure(layer.to(dtype), x.to(dtype), coordinates=2)


def test_another_seed_every_coordinate():
    problem = CASES["convolutions"].build()
    for seed in range(5):
        hzo.check_structure(problem.model, problem.x, seed=seed, coordinates=1000)


def test_leaves_no_trace_and_counts_apart():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    chain = hzo.trace(model, normal(4))
    torch.manual_seed(3)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    with hzo.count_queries() as count:
        hzo.check_structure(chain, x)
    drawn = torch.randn(5)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randn(5))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert count.check_evaluations > 0
    assert count.queries == count.stage_evaluations == count.base_evaluations == count.forward_equivalents == 0


# ---- declared modules that lie ----------------------------------------------------------------------------------


def coupled_pair(x):
    """Element (2, 1) of a sample has a small influence on (0, 3), and on nothing else."""
    out = torch.tanh(x)
    out[:, 0, 3] = out[:, 0, 3] + 1e-6 * x[:, 2, 1]
    return out


SPACE = (hzo.Local(2, -1, 1), hzo.Local(3, -1, 1))
WIDE = nn.Conv2d(2, 2, 5, padding=2).double().requires_grad_(False)
CONV = nn.Conv2d(2, 2, 3, padding=1).double().requires_grad_(False)

# function, promises, shape of a sample, words of the error
LIARS = {
    "elementwise": (coupled_pair, ["elementwise"], (4, 5), ["'elementwise'", "moving element (2, 1)", "(0, 3)"]),
    "elementwise, another shape": (lambda x: x[:, :2], ["elementwise"], (4, 5), ["'elementwise'", "(2, 5) comes out"]),
    "affine": (torch.tanh, ["affine"], (4, 5), ["'affine'", "f(p + q)"]),
    "affine, a little curved": (lambda x: x + 1e-4 * x**2, ["affine"], (4, 5), ["'affine'"]),
    "affine, not for all alike": (lambda x: x * ramp(x, 0), ["affine"], (4, 5), ["'affine'", "equal samples"]),
    "tokens, mixing": (lambda x: x.cumsum(1), ["affine", "tokens"], (4, 5), ["'tokens'"]),
    "tokens, not alike": (lambda x: x * ramp(x, 1), ["tokens"], (4, 5), ["'tokens'", "gives another result"]),
    "tokens, another number": (lambda x: x[:, 1:], ["tokens"], (4, 5), ["'tokens'", "comes out"]),
    "local": (WIDE, [*SPACE], (2, 7, 7), ["'local'", "along axis "]),
    "local, of channels": (CONV, [hzo.Local(1)], (2, 5, 5), ["'local'", "along axis 1"]),
    "stationary": (lambda x: CONV(x) * ramp(x, 2), ["affine", "stationary", *SPACE], (2, 5, 5), ["(stationary)"]),
    "stationary, at the edge": (
        lambda x: CONV(F.pad(x, (1, 1, 1, 1), mode="circular"))[..., 1:-1, 1:-1],
        ["affine", "stationary", *SPACE],
        (2, 5, 5),
        ["(stationary)", "'local'"],
    ),
    "reindexing, with a gain": (lambda x: 2 * x.flip(1), ["reindexing"], (4, 5), ["(reindexing)"]),
    "reindexing, with a sum": (lambda x: x + x.flip(1), ["reindexing"], (4, 5), ["(reindexing)"]),
}


@pytest.mark.parametrize("name", LIARS)
def test_declared_liars(name):
    function, promises, shape, words = LIARS[name]
    liar = hzo.declare(Opaque(function), *promises)
    model = nn.Sequential(nn.Identity(), nn.Tanh(), liar)
    message = caught(model, normal(*shape))
    assert "stage 2 (2:Opaque), operation 2: promise" in message
    for word in words:
        assert word in message
    assert "hzo.declare(module" in message  # what to do
    hzo.declare(liar)
    hzo.check_structure(model, normal(*shape))  # without the lie all is well


# ---- tables that lie --------------------------------------------------------------------------------------------


class Liar(nn.Module):
    """Its type is put into a table of promises, and its forward does something else."""

    hzo_opaque = True

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        self.__dict__.update(attributes)

    def forward(self, x):
        return self.function(x)


BATCH = {"eps": 1e-5, "training": True, "running_mean": None}
CONVOLUTION = {name: getattr(CONV, name) for name in ("in_channels", "out_channels", "groups", "kernel_size")} | {
    name: getattr(CONV, name)
    for name in ("stride", "dilation", "padding", "padding_mode", "transposed", "output_padding")
}
POOL = {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}

# whose rule it claims, what it does, attributes that the rule looks at, shape of a sample, promise
CLAIMS = {
    "selection": (nn.ReLU, lambda x: F.leaky_relu(x, 0.1), {}, (4, 5), "adjoint rule (selection)"),
    "maximum": (nn.MaxPool2d, lambda x: F.avg_pool2d(x, 2), POOL, (2, 4, 4), "adjoint rule (selection)"),
    "softmax": (nn.Softmax, lambda x: torch.softmax(1.1 * x, -1), {"dim": -1}, (4, 5), "adjoint rule (softmax)"),
    "layer norm": (
        nn.LayerNorm,
        lambda x: F.layer_norm(x, (5,), eps=0.1),
        {"normalized_shape": (5,), "eps": 1e-5},
        (4, 5),
        "adjoint rule (normalizing)",
    ),
    "rms norm": (
        nn.RMSNorm,
        lambda x: F.layer_norm(x, (5,)),
        {"normalized_shape": (5,), "eps": 1e-5},
        (4, 5),
        "adjoint rule (normalizing)",
    ),
    "batch norm": (
        nn.BatchNorm1d,
        lambda x: (x - x.mean(0)) / (x - x.mean(0)).abs().mean(0),
        BATCH,
        (4,),
        "adjoint rule (normalizing)",
    ),
    "group norm": (
        nn.GroupNorm,
        lambda x: F.group_norm(x, 1),
        {"num_groups": 2, "eps": 1e-5},
        (4, 5),
        "adjoint rule (normalizing)",
    ),
    "affine": (nn.Linear, lambda x: x @ torch.eye(5).to(x) * ramp(x, 1), {}, (4, 5), "adjoint rule (affine)"),
    "affine, curved": (nn.Linear, lambda x: x.relu() + x, {}, (4, 5), "affine"),
    "shared map": (nn.AvgPool2d, lambda x: F.avg_pool2d(x, 2) * ramp(x, 1), {}, (3, 4, 4), "adjoint rule (affine)"),
    "stationary": (nn.Conv2d, lambda x: CONV(x) * ramp(x, 3), CONVOLUTION, (2, 5, 5), "adjoint rule (stationary)"),
    "stationary, wider": (nn.Conv2d, WIDE, CONVOLUTION, (2, 7, 7), "adjoint rule (stationary)"),
    "reindexing": (nn.PixelShuffle, lambda x: 2 * F.pixel_shuffle(x, 2), {}, (4, 3, 3), "adjoint rule (reindexing)"),
    "same order": (nn.Flatten, lambda x: x.transpose(1, 2).flatten(1), {}, (4, 5), "adjoint rule (reindexing)"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_adjoint_rules_of_another_type(name, monkeypatch):
    kind, function, attributes, shape, promise = CLAIMS[name]
    monkeypatch.setitem(adjoints.MODULES, Liar, adjoints.MODULES[kind])
    model = nn.Sequential(nn.Identity(), Liar(function, **attributes))
    x = normal(*shape)
    assert f"stage 1 (1:Liar), operation 1: promise '{promise}'" in caught(model, x)


def test_elementwise_by_table(monkeypatch):
    monkeypatch.setattr(structure, "_MODULES", (*structure._MODULES, Liar))
    assert "'elementwise'" in caught(nn.Sequential(Liar(coupled_pair)), normal(4, 5))
    hzo.check_structure(nn.Sequential(Liar(torch.tanh)), normal(4, 5))


def test_locality_by_table(monkeypatch):
    monkeypatch.setitem(locality.MODULES, Liar, locality.MODULES[nn.Conv2d])
    model = nn.Sequential(Liar(WIDE, **CONVOLUTION))
    assert "'local'" in caught(model, normal(2, 7, 7))
    hzo.check_structure(nn.Sequential(Liar(CONV, **CONVOLUTION)), normal(2, 7, 7))


# the function whose rule it claims, what it does, how it is called, promise
FUNCTIONS = {
    "sum": (torch.add, lambda a, b: a + 1.01 * b, lambda f, a, b: f(a, b), "sum"),
    "product": (torch.mul, lambda a, b: a * b + 0.01 * a**2, lambda f, a, b: f(a, b), "bilinear"),
    "matrix product": (torch.matmul, lambda a, b: 1.01 * a @ b, lambda f, a, b: f(a, b.transpose(1, 2)), "bilinear"),
    "concatenation": (torch.cat, lambda p, d: torch.cat(p[::-1], d), lambda f, a, b: f([a, b], -1), "reindexing"),
    "places": (torch.roll, lambda a, n, d: 2 * a.roll(n, d), lambda f, a, b: f(a, 1, 1), "reindexing"),
    "swap": (torch.transpose, lambda a, *d: a.transpose(*d).roll(1, 1), lambda f, a, b: f(a, 1, 2), "reindexing"),
    "chunks": (
        torch.chunk,
        lambda a, n, d: tuple(2 * t for t in a.chunk(n, d)),
        lambda f, a, b: f(b, 2, 1)[0] * 3,
        "reindexing",
    ),
    "choice": (torch.where, lambda c, a, b: torch.where(c, b, a), lambda f, a, b: f(MASK, a, b), "selection"),
    "rectifier": (torch.relu, F.softplus, lambda f, a, b: f(a), "selection"),
    "softmax": (torch.softmax, lambda a, d: (2 * a).softmax(d), lambda f, a, b: f(a, -1), "softmax"),
    "mean": (torch.mean, lambda a, d: a.sum(d), lambda f, a, b: f(a, 1), "sum"),
    "attention": (
        F.scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.1),
        lambda f, a, b: f(a, b, a),
        "bilinear",
    ),
}
MASK = torch.eye(4, 5, dtype=torch.bool)


class Calling(nn.Module):
    """Calls one function on two tensors made of the input."""

    def __init__(self, use, function):
        super().__init__()
        self.use, self.function = use, function

    def forward(self, x):
        return self.use(self.function, x.sin(), x.cos())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_another_kind(name, monkeypatch):
    claimed, function, use, promise = FUNCTIONS[name]
    hzo.check_structure(Calling(use, claimed), normal(4, 5))
    liar = as_torch_function(function)
    monkeypatch.setitem(adjoints.FUNCTIONS, liar, adjoints.FUNCTIONS[claimed])
    if claimed in parameter_rules.FUNCTIONS:
        monkeypatch.setitem(parameter_rules.FUNCTIONS, liar, parameter_rules.FUNCTIONS[claimed])
    message = caught(Calling(use, liar), normal(4, 5))
    assert f"operation call: promise 'adjoint rule ({promise})'" in message
    assert len(message.splitlines()) <= 4  # the liar alone is accused


def test_an_elementwise_function_that_is_not():
    with Hardware(tanh=lambda func, x: func(x + 0.01 * x.roll(1, -1))):
        message = caught(nn.Sequential(nn.Identity(), nn.Tanh()), normal(4, 5))
    assert "stage 1 (1:Tanh), operation 1: promise 'elementwise'" in message


def test_parameter_rules():
    """A layer whose weight does something else than its type says."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Conv1d(3, 2, 3), nn.Flatten(), nn.Linear(4, 2)).double()
    x = normal(3, 4)
    hzo.check_structure(model, x)
    for name in ("linear", "conv1d"):
        with Hardware(**{name: lambda func, x, w, b, *rest: func(x, 1.001 * w, b, *rest)}):
            message = caught(model, x)
        assert "promise 'parameter rule' about" in message
        assert "weight" in message


# ---- what the trace saw and no longer holds -------------------------------------------------------------------------


def test_samples_that_mix_where_the_trace_did_not_look():
    """The trace runs four samples; twice that many; the ninth and tenth influence each other."""

    def mixing(x):
        out = x.tanh()
        if len(x) > 9:
            out[9] = out[9] + 1e-3 * x[8]
        return out

    chain = hzo.trace(nn.Sequential(Opaque(mixing)), normal(4, batch=4))
    hzo.check_structure(chain, normal(4, batch=9))
    message = caught(chain, normal(4, batch=11))
    assert "'samples apart'" in message
    assert "changes sample 9" in message


def test_a_stage_that_no_longer_repeats():
    calls = []

    def drifting(x):
        calls.append(len(calls))
        return x.tanh() + (1e-3 * calls[-1] if len(x) > 10 else 0)

    chain = hzo.trace(nn.Sequential(Opaque(drifting)), normal(4, batch=4))
    assert "'repeats'" in caught(chain, normal(4, batch=12))


@pytest.mark.parametrize("gain", [1e-3, 1e-2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_lies(gain, dtype):
    """A rule off by a tenth of a percent is seen in float64, by one percent in float32."""
    if dtype == torch.float32 and gain < 1e-2:
        pytest.skip("within what rounding explains")
    liar = hzo.declare(Opaque(lambda x: (1 + gain) * x.flip(1)), "reindexing")
    assert "(reindexing)" in caught(liar, normal(4, 5).to(dtype))


def test_one_wrong_entry_is_named():
    """One of 32 copies is not one, and where it stands."""

    def nearly(x):
        out = x.flip(1)
        out[:, 7] = 0.9 * out[:, 7]  # reads element 24 of 32
        return out

    message = caught(hzo.declare(Opaque(nearly), "reindexing"), normal(32, batch=1))
    assert "(reindexing)" in message
    assert "element (24)" in message or "element (21)" in message  # 0.9 of number 25 is taken for number 22

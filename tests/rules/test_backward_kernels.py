"""Derivatives taken inside the model: PyTorch's backward operators against autograd's double backward, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hzo.reverse import record
from support.chip import Chip
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


WIDE = values(-7.0, -3.0, -1.5, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 1.5, 3.0, 7.0)
INNER = values(0.3, -0.7, 1.1, 2.0, -0.4, 0.9, 1.3, -1.6, 0.8, 0.2, -0.5, 1.7, 0.6)


def slope(function):
    """``x`` and ``g`` to the derivative inside, and both once more."""

    def inner(x, g):
        (found,) = torch.autograd.grad(function(x), x, g, create_graph=True)
        return found * x, found.sin()

    return inner


INSIDE = {
    "relu": (F.relu, "threshold_backward"),
    "threshold": (lambda x: F.threshold(x, 0.3, 5.0), "threshold_backward"),
    "sigmoid": (torch.sigmoid, "sigmoid_backward"),
    "tanh": (torch.tanh, "tanh_backward"),
    "gelu": (F.gelu, "gelu_backward"),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu_backward"),
    "silu": (F.silu, None),
    "mish": (F.mish, None),
    "elu": (lambda x: F.elu(x, 1.3), "elu_backward"),
    "selu": (F.selu, "elu_backward"),
    "celu": (lambda x: F.celu(x, 0.5), "elu_backward"),
    "elu in place": (lambda x: F.elu(x * 1, 1.3, inplace=True), "elu_backward"),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), "leaky_relu_backward"),
    "leaky_relu in place": (lambda x: F.leaky_relu(x * 1, 0.2, inplace=True), "leaky_relu_backward"),
    "rrelu": (F.rrelu, "rrelu_with_noise_backward"),
    "rrelu, training": (lambda x: F.rrelu(x, training=True), "rrelu_with_noise_backward"),
    "rrelu, in place": (lambda x: F.rrelu(x * 1, training=True, inplace=True), "rrelu_with_noise_backward"),
    "hardtanh": (lambda x: F.hardtanh(x, -0.7, 1.2), "hardtanh_backward"),
    "hardswish": (F.hardswish, "hardswish_backward"),
    "hardshrink": (F.hardshrink, "hardshrink_backward"),
    "softshrink": (F.softshrink, "softshrink_backward"),
    "softplus": (lambda x: F.softplus(x, 1.5, 4.0), "softplus_backward"),
    "logsigmoid": (F.logsigmoid, "log_sigmoid_backward"),
    "logit": (lambda x: torch.logit(x.sigmoid(), 0.01), None),
    "softmax": (lambda x: x.softmax(0), "_softmax_backward_data"),
    "log_softmax": (lambda x: x.log_softmax(0), "_log_softmax_backward_data"),
    "sin": (torch.sin, None),
    "exp": (torch.exp, None),
    "square": (torch.square, None),
    "power": (lambda x: (x * x + 1) ** 1.5, None),
    "logsumexp": (lambda x: x.logsumexp(0).expand(13), None),
    "norm": (lambda x: x.norm().expand(13), None),
    "std": (lambda x: x.std().expand(13), None),
    "amax": (lambda x: x.amax(0).expand(13), None),
    "cumsum": (lambda x: x.cumsum(0), None),
    "cumprod": (lambda x: (x + 8).cumprod(0) / 1e9, None),
    "prod": (lambda x: (x / 3 + 3).prod().expand(13), None),
    "clamp": (lambda x: x.clamp(-1.1, 1.1), None),
    "where": (lambda x: torch.where(x > 0, x.exp(), x), None),
    "dropout": (lambda x: F.dropout(x.square(), 0.4), None),
    "native dropout": (lambda x: torch.native_dropout(x.square(), 0.4, True)[0], None),
}  # fmt: skip


@pytest.mark.parametrize("case", INSIDE)
def test_a_derivative_inside(case):
    function, call = INSIDE[case]
    check(slope(function), [WIDE, INNER], calls=[f"aten.{call}.default"] if call else None)


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_a_derivative_inside_of_complex_numbers(name):
    check(slope(getattr(torch, name)), leaves_of((5,), (5,), dtype=torch.complex128))


@pytest.mark.parametrize("dim", [0, 1])
def test_glu(dim):
    function = slope(lambda x: F.glu(x, dim).repeat(2, 1))
    check(lambda x, g: function(x, g.repeat(2, 1)[: 4 if dim == 0 else 8, : 6 if dim == 0 else 3]),
          leaves_of((4, 6), (4, 6)), calls=["aten.glu_backward.default"])  # fmt: skip


@pytest.mark.parametrize("weights", [(), (1,)], ids=str)
def test_prelu(weights):
    def inner(x, slope, g):
        of_x, of_slope = torch.autograd.grad(F.prelu(x, slope), (x, slope), g, create_graph=True)
        return of_x * x, of_slope.sin()

    leaves = leaves_of((3, 4), (4,), (3, 4))
    check(inner, leaves, calls=["aten._prelu_kernel_backward.default"], weights=weights)
    check(lambda *a: inner(*a)[0], leaves, weights=weights)
    check(lambda *a: inner(*a)[1], leaves, weights=weights)


TARGET = torch.tensor([0, 2, 1, 3])
OF_LOSSES = {
    "mse_loss": F.mse_loss,
    "smooth_l1_loss": lambda a, b, reduction: F.smooth_l1_loss(a, b, reduction=reduction, beta=0.7),
    "huber_loss": lambda a, b, reduction: F.huber_loss(a, b, reduction, 0.7),
    "soft_margin_loss": lambda a, b, reduction: F.soft_margin_loss(a, b.sign().detach(), reduction=reduction),
    "binary_cross_entropy": lambda a, b, reduction: F.binary_cross_entropy(share(a), share(b), reduction=reduction),
    "nll_loss": lambda a, b, reduction: F.cross_entropy(a, TARGET, reduction=reduction),
    "nll_loss2d": lambda a, b, reduction: F.nll_loss(a.view(1, 4, 2, 2), TARGET.view(1, 2, 2), reduction=reduction),
    "with logits": lambda a, b, reduction: F.binary_cross_entropy_with_logits(a, share(b), reduction=reduction),
}


def share(x):
    return x.sigmoid()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", OF_LOSSES)
def test_a_derivative_of_a_loss_inside(case, reduction):
    function = OF_LOSSES[case]

    def inner(a, b, scale):
        loss = (function(a, b, reduction=reduction) * scale).sum() + b.sum()  # some targets are constants
        of_a, of_b = torch.autograd.grad(loss, (a, b), create_graph=True)
        return of_a * a, of_b.sin()

    call = None if case == "with logits" else [f"aten.{case}_backward.default"]
    check(inner, leaves_of((4, 4), (4, 4), ()), calls=call)


DIRECT = {
    "silu": (aten.silu_backward, F.silu),
    "mish": (aten.mish_backward, F.mish),
    "logit": (aten.logit_backward, torch.logit),
    "hardsigmoid": (aten.hardsigmoid_backward, lambda x: F.relu6(x + 3) / 6),
}


@pytest.mark.parametrize("name", DIRECT)
def test_kernels_that_pytorch_does_not_differentiate(name):
    """Called directly they have no derivative in PyTorch: compare with what it makes out of simpler calls."""
    kernel, function = DIRECT[name]
    g, x = leaves_of((6,), (6,))
    x = x.sigmoid().detach().requires_grad_()
    with record() as step:
        loss = kernel(g, x).sin().sum()
    found = {id(leaf): c for leaf, c in step.gradients(loss)}
    (inner,) = torch.autograd.grad(function(x), x, g, create_graph=True)
    for leaf, expected in zip((g, x), torch.autograd.grad(inner.sin().sum(), (g, x)), strict=True):
        assert torch.allclose(found.get(id(leaf), torch.zeros_like(leaf)), expected, rtol=1e-9)


def test_a_penalty_on_the_gradient():
    """As in WGAN-GP: a network, the norm of its gradient by the input."""

    def penalty(x, w, v):
        score = F.leaky_relu(F.gelu(x @ w) @ v, 0.2)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return (slope.norm(2, dim=1) - 1) ** 2

    check(penalty, leaves_of((5, 4), (4, 6), (6, 1)), weights=(1, 2))


def test_a_slope_that_is_a_weight_is_not_read():
    """The chip holds it; its parameter is full of NaN."""
    x, g = leaves_of((3, 4), (3, 4))
    slope = nn.Parameter(torch.rand(4, dtype=torch.float64))

    def loss():
        (inner,) = torch.autograd.grad(F.prelu(x, slope), x, g, create_graph=True)
        return inner.square().sum()

    expected = torch.autograd.grad(loss(), g)[0]
    operators = (aten._prelu_kernel.default, aten._prelu_kernel_backward.default)
    with Chip({operator: lambda result: result for operator in operators}, [slope]) as chip, record() as step:
        total = loss()
    with chip:
        found = {id(leaf): c for leaf, c in step.gradients(total)}
    assert torch.allclose(found[id(g)], expected)

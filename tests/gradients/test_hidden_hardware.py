"""No weight is read to form an adjoint: where hardware changes what a layer returns, the cotangents follow."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from support.hardware import Hardware, Lying, ramp

TOLERANCE = 1e-6  # float64, central differences of the activations; affine layers are exact


def linear_chip(func, x, weight, bias=None):
    """Outputs wired in another order, a gain for each of them, an offset."""
    out = func(x, weight, bias).roll(1, -1)
    return out * ramp(out) + 0.3


def conv_chip(func, x, weight, bias=None, *options, **more):
    """The kernel turned around, a gain for each channel, an offset."""
    out = func(x, weight.flip(-1, -2), bias, *options, **more)
    return out * ramp(out, 1) - 0.2


class Functional(nn.Module):
    """The same layers as functions, one of them over tokens."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3) / 3)
        self.into = nn.Parameter(torch.randn(5, 4) / 2)
        self.bias = nn.Parameter(torch.randn(5))
        self.out = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        x = torch.tanh(F.conv2d(x, self.kernel, stride=2, padding=1))
        x = torch.tanh(F.linear(x.flatten(2).transpose(1, 2), self.into, self.bias))
        return F.linear(x.mean(1), self.out)


def linears():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.GELU(), nn.Linear(5, 3)), (6,)


def tokens():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Flatten(), nn.Linear(12, 3)), (4, 6)


def convolutions():
    layers = (
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False),
        nn.Conv2d(4, 3, 1),
    )
    body = [m for layer in layers for m in (layer, nn.Tanh())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)), (2, 7, 6)


def padded():
    modes = ("reflect", "replicate", "circular")
    body = [m for mode in modes for m in (nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode), nn.Tanh())]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(40, 3)), (2, 4, 5)


def functional():
    return Functional(), (2, 6, 6)


NETWORKS = [linears, tokens, convolutions, padded, functional]
CHIP = {"linear": linear_chip, "conv2d": conv_chip}


def build(network, batch=3):
    model, shape = network()
    return model.double(), torch.randn(batch, *shape, dtype=torch.float64), torch.arange(batch) % 3


def stage_activations(model, x):
    """The activation at every boundary, with its gradient retained."""
    activations = [x.clone().requires_grad_()]
    for layer in model if isinstance(model, nn.Sequential) else [model]:
        activations.append(layer(activations[-1]))
        activations[-1].retain_grad()
    return activations


def follows(model, x, y):
    """Compare hzo's cotangents with those of autograd, both in the surroundings of the caller."""
    activations = stage_activations(model, x)
    F.cross_entropy(activations[-1], y).backward()
    found = hzo.cotangents(model, F.cross_entropy, x, y, assume="structure")
    found = found if isinstance(model, nn.Sequential) else [found[0], found[-1]]
    errors = [
        float((estimate - activation.grad).norm() / activation.grad.norm())
        for estimate, activation in zip(found, activations, strict=True)
    ]
    return max(errors), [activation.grad for activation in activations]


@pytest.mark.parametrize("network", NETWORKS)
def test_cotangents_follow_the_forward(network):
    model, x, y = build(network)
    _, as_typed = follows(model, x, y)
    with Hardware(**CHIP):
        error, on_chip = follows(model, x, y)
    assert error <= TOLERANCE
    assert float((on_chip[0] - as_typed[0]).norm() / as_typed[0].norm()) > 0.1  # the chip does something else


def test_against_a_model_written_out():
    """The chip's arithmetic spelled out by hand, without any mode."""
    model, x, y = build(linears)
    with Hardware(linear=linear_chip):
        found = hzo.cotangents(model, F.cross_entropy, x, y, assume="structure")
    first, _, second, _, third = model
    a = x.clone().requires_grad_()
    out = a
    for layer, activation in ((first, torch.tanh), (second, F.gelu), (third, lambda t: t)):
        out = (out @ layer.weight.T + (0 if layer.bias is None else layer.bias)).roll(1, -1)
        out = activation(out * ramp(out) + 0.3)
    F.cross_entropy(out, y).backward()
    assert float((found[0] - a.grad).norm() / a.grad.norm()) <= TOLERANCE


@pytest.mark.parametrize("network", [linears, tokens, convolutions])
def test_weights_elsewhere(network):
    """The hardware holds the weights; what stands in the modules is not a number, and nobody notices."""
    model, x, y = build(network)
    held = {}
    for p in model.parameters():
        held[p] = p.detach().clone()

    def with_own(func, x, weight, bias=None, *options, **more):
        return func(x, held.get(weight, weight), held.get(bias, bias), *options, **more)

    with Hardware(linear=with_own, conv2d=with_own):
        exact = follows(model, x, y)[1]
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(torch.nan)
        found = hzo.cotangents(model, F.cross_entropy, x, y, assume="structure")
    for estimate, reference in zip(found, exact, strict=True):
        assert float((estimate - reference).norm() / reference.norm()) <= TOLERANCE


def test_the_checker_says_which_layers_are_not_their_type():
    """Adjoints are measured and hold; closed parameter rules assume the type, and do not."""
    model, x, _ = build(linears)
    hzo.check_structure(model, x)

    def chip(func, bias, rows, weight):
        out = func(bias, rows, weight).roll(1, -1)
        return out * ramp(out) + 0.3

    with Lying(torch.ops.aten.addmm.default, chip), pytest.raises(hzo.errors.StructureError) as caught:
        hzo.check_structure(model, x)
    assert "parameter rule" in str(caught.value)
    assert "adjoint rule" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "promises"),
    [
        (linears, {nn.Linear: ["affine"]}),
        (linears, {nn.Linear: []}),
        (tokens, {nn.Linear: ["affine", "tokens"]}),
        (convolutions, {nn.Linear: ["affine"], nn.Conv2d: ["affine"]}),
    ],
)
def test_parameters_of_declared_layers_follow_too(network, promises):
    """A declared layer has no closed rule: its parameters are perturbed, and so trained as the hardware is."""
    model, x, y = build(network)
    for layer in model:
        if type(layer) in promises:
            hzo.declare(layer, *promises[type(layer)])
    with Hardware(**CHIP):
        hzo.check_structure(model, x)
        found, _ = hzo.grad_and_value(model, F.cross_entropy, x, y)
        F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        error = float((found[name] - parameter.grad).norm() / max(float(parameter.grad.norm()), 1e-9))
        assert error <= TOLERANCE, name


def test_a_chip_that_saturates_is_not_affine():
    model, x, _ = build(linears)
    for layer in (model[0], model[2], model[4]):
        hzo.declare(layer, "affine")
    with (
        Hardware(linear=lambda func, *args: torch.tanh(func(*args))),
        pytest.raises(hzo.errors.StructureError, match="'affine'"),
    ):
        hzo.check_structure(model, x)

"""Fake quantization: the straight-through slope, as autograd takes it."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize

from hzo.reverse import record
from support.chip import Chip
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten
SINGLE = {"dtype": torch.float32, "positive": False}


def scales(*shape):
    return (torch.rand(shape) * 0.05 + 0.02).requires_grad_()


def test_fixed_ranges():
    for function in (
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -8, 7),
        lambda x: torch.fake_quantize_per_tensor_affine(
            x, torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), -8, 7
        ),
        lambda x: torch.fake_quantize_per_channel_affine(
            x, torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int32), 1, -8, 7
        ),
    ):
        check(function, leaves_of((6, 4), **SINGLE), tolerance=1e-6)


@pytest.mark.parametrize("weights", [(), (1, 2), (0, 1, 2)], ids=str)
def test_learned_ranges(weights):
    zero = torch.tensor([1.0], requires_grad=True)
    check(lambda x, s, z: torch._fake_quantize_learnable_per_tensor_affine(x, s, z, -8, 7, 0.5),
          [*leaves_of((6, 4), **SINGLE), scales(1), zero], weights=weights, tolerance=1e-5)  # fmt: skip
    check(lambda x, s, z: torch._fake_quantize_learnable_per_channel_affine(x, s, z, 1, -8, 7, 0.5),
          [*leaves_of((6, 4), **SINGLE), scales(4), torch.tensor([1.0, 0, -2, 3], requires_grad=True)],
          weights=weights, tolerance=1e-5)  # fmt: skip


@pytest.mark.parametrize("channels", [1, 4])
def test_no_scale_is_read(channels):
    x, scale = torch.randn(6, 4, requires_grad=True), nn.Parameter(scales(channels).detach())
    zero = nn.Parameter(torch.arange(channels).float())
    if channels == 1:
        operator = aten._fake_quantize_learnable_per_tensor_affine.default
        function = lambda: torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, -8, 7)  # noqa: E731
    else:
        operator = aten._fake_quantize_learnable_per_channel_affine.default
        function = lambda: torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, 1, -8, 7)  # noqa: E731
    (expected,) = torch.autograd.grad(function().sum(), x)
    with Chip({operator: lambda result: result}, [scale, zero]) as chip, record() as step:
        loss = function().sum()
    with chip:
        found = {id(leaf): g for leaf, g in step.gradients(loss)}
    assert torch.equal(found[id(x)], expected)
    assert 0 < expected.sum() < x.numel()


def test_a_layer_that_observes():
    quantize = FusedMovingAvgObsFakeQuantize()
    quantize(torch.randn(20) / 3)
    check(lambda x: copy.deepcopy(quantize).forward(x), leaves_of((6, 4), **SINGLE), tolerance=1e-6)

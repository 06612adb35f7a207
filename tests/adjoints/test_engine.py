"""Adjoints at work in whole gradients: in low precision, and on hardware that computes something else than it says."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import hzo
from support.networks import Attention, Residual

BATCH = 8


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        Residual(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8), nn.SiLU()),
        nn.Conv2d(8, 8, 3, 2, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def transformer():
    body = [
        Residual(nn.LayerNorm(16), Attention(16, 2, fused=True)),
        Residual(nn.RMSNorm(16), nn.Linear(16, 16), nn.Tanh()),
    ]
    return nn.Sequential(nn.Flatten(2), nn.Linear(64, 16), *body, nn.Flatten(), nn.Linear(48, 10))


def strided():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, 2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 10),
    )


NETWORKS = [convolutional, transformer, strided]


def cosines(found, module):
    """By parameter, those left out whose gradient is zero up to rounding."""
    exact = {name: p.grad.double() for name, p in module.named_parameters()}
    floor = 1e-6 * max(float(g.norm()) for g in exact.values())
    return {
        name: float(F.cosine_similarity(found[name].double().flatten(), g.flatten(), dim=0, eps=1e-30))
        for name, g in exact.items()
        if float(g.norm()) > floor
    }


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.9999), (torch.bfloat16, 0.99), (torch.float16, 0.99)])
@pytest.mark.parametrize("make", NETWORKS)
def test_low_precision(make, dtype, least):
    """Against float64: rounding of the forward pass is all that is lost."""
    reference = make().double()
    x, y = torch.randn(BATCH, 3, 8, 8), torch.randint(10, (BATCH,))
    model = copy.deepcopy(reference).to(dtype)
    reference.load_state_dict(model.state_dict())
    F.cross_entropy(reference(x.to(dtype).double()), y).backward()
    found, _ = hzo.grad_and_value(model, F.cross_entropy, x.to(dtype), y)
    assert min(cosines(found, reference).values()) >= least


class Chip(TorchFunctionMode):
    """Linear layers and convolutions with a hidden gain, rows in another order, and a rotated kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d, F.conv_transpose2d):
            x, weight, *rest = args
            other = weight.flip(0) * 1.3 if weight.dim() == 2 else weight.rot90(1, (2, 3)) * 0.7
            return func(x, other, *rest, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", NETWORKS)
def test_cotangents_follow_the_forward_pass_and_not_the_weights(make):
    """Layers that do not compute what their weights say: no adjoint has read one."""
    model = make().double()
    x, y = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64), torch.randint(10, (BATCH,))
    with Chip():
        leaf = x.clone().requires_grad_()
        F.cross_entropy(copy.deepcopy(model)(leaf), y).backward()
        chain = hzo.trace(model, x)
        plan = hzo.plan(chain, boundaries="all")
        found = hzo.cotangents(chain, F.cross_entropy, x, y, plan=plan)
    assert {node.probe.kind for node in plan.nodes if node.operations} <= {"adjoint", "elementwise"}
    torch.testing.assert_close(found[0], leaf.grad, rtol=1e-6, atol=1e-9)
    plain = x.clone().requires_grad_()
    F.cross_entropy(model(plain), y).backward()
    assert not torch.allclose(found[0], plain.grad, rtol=0.1)


def test_untouched_layers_only():
    """A hook, a forward of its own, a subclass: each takes the layer out of the tables."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, output: output.sin())
    shadowed = nn.Linear(4, 4)
    shadowed.forward = lambda x: F.linear(x, shadowed.weight.square())
    for layer in (Doubled(4, 4), hooked, shadowed):
        model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2)).double()
        x, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 0])
        found, _ = hzo.grad_and_value(model, F.cross_entropy, x, y)
        F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(found[name], p.grad, rtol=1e-6, atol=1e-9)

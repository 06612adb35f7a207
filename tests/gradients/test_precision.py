"""Narrow dtypes, autocast and the scaling of gradients, against autograd in float64."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import HzoWarning, PrecisionError
from support.training import COSINES, autograd, batch, cosine, grads, network


def rough(dtype, assume):
    """What says that a plan's differences in half precision leave few digits; nothing is said of any other."""
    low = dtype in (torch.bfloat16, torch.float16) and assume == "nothing"
    return pytest.warns(HzoWarning, match=f"differences of results in {str(dtype)[6:]}") if low else nullcontext()


@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize("assume", ["nothing", "structure"])
@pytest.mark.parametrize("dtype", COSINES)
def test_narrow_dtypes(dtype, assume, scheme):
    model, (x, y) = network(), batch(32)
    exact = autograd(model, x, y)
    narrow = copy.deepcopy(model).to(dtype)
    with rough(dtype, assume):
        hzo.backward(narrow, F.cross_entropy, x.to(dtype), y, assume=assume, scheme=scheme, tree="planned")
    assert all(p.grad.dtype == dtype for p in narrow.parameters())
    # Forward differences leave u^(1/2) instead of u^(2/3): 0.09 a node in bfloat16.
    assert cosine(grads(narrow), exact) >= COSINES[dtype] - (0.02 if scheme == "forward" else 0)


@pytest.mark.parametrize(("scheme", "least"), [("central", 0.999), ("forward", 0.99)])
@pytest.mark.parametrize("assume", ["nothing", "structure"])
def test_autocast(assume, scheme, least):
    """The norm's output is float32, what reads it computes in bfloat16: the step is one that bfloat16 sees."""
    model, (x, y) = nn.Sequential(nn.LayerNorm(6), *network()).double(), batch(32)
    exact = autograd(model, x, y)
    single = copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16), rough(torch.bfloat16, assume):
        hzo.backward(single, F.cross_entropy, x.float(), y, assume=assume, scheme=scheme)
    assert all(p.grad.dtype == torch.float32 for p in single.parameters())
    assert cosine(grads(single), exact) >= least
    for name, p in single.named_parameters():  # each by itself too: the first norm's are small beside the others
        assert F.cosine_similarity(p.grad.double().flatten(), exact[name].flatten(), dim=0) >= 10 * least - 9, name
    single.zero_grad()  # a trace under autocast is not one without
    hzo.backward(single, F.cross_entropy, x.float(), y, assume=assume)
    assert cosine(grads(single), exact) >= COSINES[torch.float32]


def test_grad_scaler():
    model, (x, y) = network().float(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            scale = scaler.scale(torch.ones(()))
            losses.append(float(hzo.backward(model, F.cross_entropy, x.float(), y, scale=scale)))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < losses[0]


def saturated(shift):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Shifted(shift), nn.Sigmoid(), nn.Linear(8, 3))
    return model, torch.randn(8, 5), torch.randn(8, 3)


class Shifted(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return x + self.shift


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("shift", [11.0, 12.0, 13.0, 14.0])
def test_they_drown_whatever_the_size_of_the_loss(shift, scale):
    model, x, y = saturated(shift)
    with pytest.raises(PrecisionError, match="drown in rounding"):
        hzo.backward(model, lambda out, y: scale * F.mse_loss(out, y), x, y, tree="bisect", assume="nothing")


@pytest.mark.parametrize("tree", ["flat", "bisect"])
def test_estimates_that_drown_in_rounding_are_no_gradients(tree):
    """Twelve deep in a sigmoid's tail, a step of float32 moves it by as much as its rounding."""
    model, x, y = saturated(12.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(PrecisionError, match="drown in rounding"):
        hzo.backward(model, F.mse_loss, x, y, tree=tree, assume="nothing")
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    with hzo.tolerate_rounding():
        hzo.backward(model, F.mse_loss, x, y, tree=tree, assume="nothing")
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    hzo.backward(model, F.mse_loss, x, y)  # structure takes no differences
    found = grads(model)
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    F.mse_loss(exact(x.double()), y.double()).backward()
    estimate, reference = found["0.weight"].double(), exact[0].weight.grad
    assert float((estimate - reference).norm() / reference.norm()) < 0.02
    model, x, y = saturated(2.0)
    hzo.backward(model, F.mse_loss, x, y, tree=tree, assume="nothing")


def test_parameters_that_are_perturbed_in_half_precision_are_warned_of():
    """A black box's weights have no rule: their differences are as rough as those of activations."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

        def forward(self, x):
            return (x * self.weight).tanh()

    chain = hzo.trace(hzo.declare(Scaled(), "elementwise"), torch.randn(4, 3).to(torch.bfloat16))
    with pytest.warns(HzoWarning, match="differences of results in bfloat16"):
        plan = hzo.plan(chain)
    assert plan.perturbed
    assert not any(node.probe for node in plan.nodes)

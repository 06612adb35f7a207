"""Narrow dtypes, autocast and the scaling of gradients, against autograd in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from support.training import COSINES, autograd, batch, cosine, grads, network


@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize("assume", ["nothing", "structure"])
@pytest.mark.parametrize("dtype", COSINES)
def test_narrow_dtypes(dtype, assume, scheme):
    model, (x, y) = network(), batch(32)
    exact = autograd(model, x, y)
    narrow = copy.deepcopy(model).to(dtype)
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
    with torch.autocast("cpu", torch.bfloat16):
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

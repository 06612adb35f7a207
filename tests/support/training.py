"""A small classifier and its gradients by autograd, for tests of what surrounds a training step."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from support.oracles import normal

# Rounding of the differences, u^(2/3) for every node of a path; for bfloat16 that is 0.04, for float16 0.01. A cosine
# loses half the square of the relative error, ten nodes long.
COSINES = {torch.float32: 0.999999, torch.float16: 0.999, torch.bfloat16: 0.99}


def network():
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def batch(size=6):
    return normal(size, 6), torch.arange(size) % 3


def autograd(model, x, y):
    model = copy.deepcopy(model)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def grads(model):
    return {name: p.grad for name, p in model.named_parameters()}


def cosine(found, exact):
    a, b = (torch.cat([g[name].double().flatten() for name in exact]) for g in (found, exact))
    return float(F.cosine_similarity(a, b, dim=0))

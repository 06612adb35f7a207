"""Chains of vectors, for tests of what is measured of a chain and planned for it."""

import torch
from torch import nn

import hzo
from support.networks import Residual

BATCH, WIDTH = 32, 16


def chain_of(*stages, dtype=torch.float64):
    torch.manual_seed(1)
    model = nn.Sequential(*stages).to(dtype)
    x, y = torch.randn(2, BATCH, WIDTH, dtype=dtype)
    return hzo.trace(model, x), x, y


def orthogonal(gain=1.0):
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.orthogonal_(layer.weight, gain)
    return layer


def residual(length, dtype=torch.float32):
    blocks = [Residual(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(length)]
    for block in blocks:
        nn.init.normal_(block.block[0].weight, std=0.3 / WIDTH**0.5)
    return chain_of(*blocks, dtype=dtype)

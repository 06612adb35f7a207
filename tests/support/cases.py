"""Networks to test on, small and in float64: each a function that returns what ``hzo.backward`` is called with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hzo
from support.networks import (
    Affine,
    Attention,
    Branches,
    Concatenating,
    Functional,
    InPlace,
    Inputs,
    Language,
    OwnLinear,
    Recurrent,
    Residual,
    Twice,
)

BATCH = 3


@dataclass(frozen=True)
class Problem:
    """The arguments of ``hzo.backward``."""

    model: Any
    loss_fn: Callable[..., Any]
    x: Any
    y: Any

    @property
    def module(self) -> nn.Module:
        return self.model.model if isinstance(self.model, hzo.Chain) else self.model

    def __iter__(self):
        return iter((self.model, self.loss_fn, self.x, self.y))


@dataclass(frozen=True)
class Case:
    """A network by name. ``kinks``: it has a ReLU or a maximum, whose kinks may fall inside a step."""

    name: str
    make: Callable[[], Any]
    kinks: bool = False
    random: bool = False

    def build(self) -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x, *rest = self.make()
            loss_fn, y = rest or (F.cross_entropy, torch.arange(BATCH) % 3)
            (model.model if isinstance(model, hzo.Chain) else model).double()
        return Problem(model, loss_fn, x, y)


CASES: dict[str, Case] = {}


def case(**flags):
    def add(make):
        CASES[make.__name__] = Case(make.__name__, make, **flags)
        return make

    return add


def normal(*shape):
    return torch.randn(BATCH, *shape, dtype=torch.float64)


@case()
def mlp():
    layers = [m for _ in range(5) for m in (nn.Linear(4, 4), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(4, 3)), normal(4)


@case()
def residual_mlp():
    blocks = [Residual(nn.LayerNorm(4), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)) for _ in range(5)]
    return nn.Sequential(nn.Linear(4, 4), *blocks, nn.Linear(4, 3)), normal(4)


@case()
def deep_blocks():
    """Stages whose parameters lie deep inside: several edges within a stage."""
    inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 4), nn.SiLU()))
    return nn.Sequential(inner, Residual(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4)), nn.Linear(4, 3)), normal(4)


@case()
def convolutions():
    """Stride, 1×1, dilation, groups, depthwise."""
    layers = (
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False),
    )
    body = [m for layer in layers for m in (layer, nn.Tanh())]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(36, 3)), normal(2, 6, 5)


@case()
def padding_modes():
    modes = ("zeros", "reflect", "replicate", "circular")
    body = [m for mode in modes for m in (nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode), nn.Softplus())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)), normal(2, 4, 5)


@case()
def other_dimensions():
    """Convolutions over one and three axes, and transposed ones."""
    return (
        nn.Sequential(
            nn.Conv1d(2, 3, 3, padding=1),
            nn.Tanh(),
            nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1, output_padding=1),
            nn.Unflatten(2, (2, 2, 2)),
            nn.Conv3d(2, 2, 2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(54, 3),
        ),
        normal(2, 4),
    )


@case()
def transposed():
    return (
        nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2),
            nn.Tanh(),
            nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1, dilation=1),
            nn.GroupNorm(1, 2),
            nn.ConvTranspose2d(2, 2, 2, groups=2),
        ),
        normal(1, 5, 5),
        nn.MSELoss(),
        normal(2, 7, 7),
    )


@case()
def dense_net():
    return (
        nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), Concatenating(2, 2, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
        ),
        normal(1, 4, 4),
    )


@case(kinks=True)
def pooling():
    return (
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
            Residual(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        normal(1, 6, 6),
    )


@case(kinks=True)
def relu_mlp():
    return nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(5, 5), nn.ReLU())), nn.Linear(5, 3)), normal(5)


@case()
def norms():
    """All that keep samples apart; BatchNorm in evaluation mode, with statistics of its own."""
    batch_norm = nn.BatchNorm1d(4).eval()
    batch_norm.running_mean.uniform_(-1, 1)
    batch_norm.running_var.uniform_(0.5, 2)
    body = (nn.Conv1d(2, 4, 3), batch_norm, nn.Tanh(), nn.GroupNorm(2, 4), nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4))
    tail = (nn.LayerNorm([4, 4]), nn.Linear(4, 4), nn.RMSNorm(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    return nn.Sequential(*body, nn.PReLU(4), *tail), normal(2, 6)


@case()
def attention():
    return nn.Sequential(nn.Linear(2, 4), Residual(Attention(4, 2)), nn.Flatten(), nn.Linear(12, 3)), normal(3, 2)


@case()
def fused_attention():
    body = (Residual(Attention(4, 2, fused=True, causal=True)), nn.LayerNorm(4))
    return nn.Sequential(nn.Linear(2, 4), *body, nn.Flatten(), nn.Linear(12, 3)), normal(3, 2)


@case()
def transformer():
    """torch's own encoder layer, traced whole."""
    return (
        nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation="gelu", batch_first=True),
        normal(2, 4),
        nn.MSELoss(),
        normal(2, 4),
    )


@case()
def language():
    return (
        Language(5, 4, 6),
        torch.randint(5, (BATCH, 3)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        torch.arange(BATCH),
    )


@case()
def functional():
    return Functional(4), normal(4), nn.MSELoss(reduction="sum"), normal(4)


@case()
def recurrent():
    return Recurrent(2, 3), normal(4, 2)


@case()
def recurrent_fused():
    return Recurrent(2, 2, fused=True), normal(3, 2)


@case()
def tied():
    return Twice(4), normal(4), nn.MSELoss(), normal(4)


@case()
def several_inputs():
    return Inputs(3), {"x": normal(3), "kind": torch.tensor([0, 3, 0]), "scale": 0.7}


@case()
def tuple_stages():
    """Stages by hand that hand two tensors on."""
    a, b = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()  # not registered anywhere
    stages = [lambda x: (a(x), x), lambda h, x: (torch.sin(b(h)), x * 2), lambda h, x: h[:, :3] * x]
    return hzo.Chain([*stages, nn.Linear(3, 3)]), normal(3)


@case()
def branches():
    def loss(out, y):
        return (out["scores"] - y).square().mean(1) + out["hidden"].sin().sum(1)

    return Branches(4), normal(4), loss, normal(4)


@case()
def own_parameters():
    """Bias only, scale only, one number, a parametrized layer, a Linear that is none."""
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    stages = (Affine(3), nn.Tanh(), parametrized, nn.Tanh(), OwnLinear(3, 3), Affine(3))
    return nn.Sequential(*stages), normal(3)


@case(random=True)
def dropout():
    layers = (nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh(), Residual(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5)))
    return nn.Sequential(*layers, nn.Linear(6, 3)), normal(6)


@case()
def in_place():
    return nn.Sequential(InPlace(3), nn.SiLU(inplace=True), InPlace(3)), normal(3)


@case()
def frozen_start():
    """BatchNorm in training mode before the first parameter that is trained; nothing is perturbed there."""
    start = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    return nn.Sequential(start, nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), normal(3)

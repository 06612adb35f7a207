"""Chains whose gain is known: what the error model is held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH, BATCH = 64, 16
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
# Of plain stages: each contracts a little, so that 64 of them do not drown everything.
PLAIN_GAINS = {"tanh": 1.0, "relu": 0.95 * 2**0.5, "gelu": 1.4}


class ResidualStage(nn.Module):
    """x + act(Wx)."""

    def __init__(self, width: int, activation: nn.Module, gain: float) -> None:
        super().__init__()
        self.linear, self.activation = linear(width, gain), activation

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.activation(self.linear(x))
        return x + branch


def linear(width: int, gain: float) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.normal_(layer.weight, std=gain / width**0.5)
    nn.init.zeros_(layer.bias)
    return layer


def network(kind: str, activation: str, depth: int, width: int = WIDTH, gain: float | None = None) -> nn.Sequential:
    """A ``residual`` chain near the unitary limit, or a ``plain`` one that contracts."""
    act = ACTIVATIONS[activation]
    if kind == "residual":
        return nn.Sequential(*(ResidualStage(width, act(), 0.1 if gain is None else gain) for _ in range(depth)))
    gain = PLAIN_GAINS[activation] if gain is None else gain
    return nn.Sequential(*(nn.Sequential(linear(width, gain), act()) for _ in range(depth)))


class Scaled(nn.Module):
    """αx + β·tanh(Wx), W orthogonal; α² + β² E[tanh'²] = gain²."""

    def __init__(self, width: int, gain: float, branch: float = 0.2) -> None:
        super().__init__()
        self.linear, self.branch = nn.Linear(width, width, bias=False), branch
        nn.init.orthogonal_(self.linear.weight)
        # E[tanh'²] at unit activations; where activations have grown, the branch saturates and α alone is left.
        slope = float((1 - torch.tanh(torch.randn(100_000)) ** 2).square().mean())
        self.skip = (gain**2 - branch**2 * slope) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.skip * x + self.branch * torch.tanh(self.linear(x))
        return out


def of_gain(kind: str, gain: float, depth: int, width: int = WIDTH) -> nn.Sequential:
    """Stages whose Jacobian has this root mean square gain: orthogonal matrices times it (``plain``), or ``Scaled``."""
    if kind == "residual":
        return nn.Sequential(*(Scaled(width, gain) for _ in range(depth)))
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=gain)
    return nn.Sequential(*layers)


def data(width: int = WIDTH, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, width), torch.randn(batch, width)

"""What the examples share: scikit-learn's handwritten digits, a loop that trains on them, and a test."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hzo_lab.data import digits

DIGITS = digits()  # a fixed split: 1,437 to learn from, 360 to be tested on


def examples(split: str) -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 1 and labels: "train" or "test", or two parts of "train", "fit" and "held out"."""
    part = DIGITS.test if split == "test" else DIGITS.train
    rows = {"fit": torch.arange(1150), "held out": torch.arange(1150, 1437)}.get(split, torch.arange(len(part)))
    return part.fetch(rows) / 16, part.labels[rows]


def autograd(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """An ordinary backward pass, in which a black box makes its queries; ``hzo.baselines`` has other gradients."""
    loss = loss_fn(model(x), y)
    loss.backward()
    return loss


def train(
    model: nn.Module,
    epochs: int,
    lr: float,
    *,
    seed: int = 0,
    gradient: Callable[..., Any] = autograd,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    split: str = "train",
    classes: int = 10,
) -> nn.Module:
    """Adam with a cosine schedule on batches of 64, over all parameters that are not frozen."""
    x, y = examples(split)
    x, y = x[y < classes], y[y < classes]
    updates = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(updates, epochs)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(64):
            updates.zero_grad()
            gradient(model, cross_entropy, x[rows], y[rows])
            updates.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, split: str = "test", reads: int = 1, classes: int = 10) -> float:
    """Digits told right, in percent; the mean over ``reads`` of a network that is noisy."""
    x, y = examples(split)
    x, y = x[y < classes], y[y < classes]
    return 100 * sum(float((model(x).argmax(1) == y).double().mean()) for _ in range(reads)) / reads


def last_layer_only(model: nn.Module) -> nn.Module:
    """Freeze all that lies before the last layer: what is left without a gradient through the part in the middle."""
    *before, _ = model.children()
    for module in before:
        module.requires_grad_(False)
    return model


def options(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a few seconds, for a test")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def compare(models: dict[str, nn.Module], epochs: int, lr: float, given: argparse.Namespace, classes: int = 10) -> None:
    """Train each and print how well it does on the test digits."""
    for name, model in models.items():
        train(model, max(1, epochs // 10) if given.quick else epochs, lr, seed=given.seed, classes=classes)
        print(f"{name:18}{accuracy(model, classes=classes):5.1f} %")

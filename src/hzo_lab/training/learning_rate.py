"""Optimizers and learning rates; a rate is a function of the share done, so it has no state to save."""

from __future__ import annotations

import math

import torch
from torch import nn

from hzo_lab.training.config import TrainConfig

WARM_UP = 0.25
FLOOR = 1e-3  # of the highest rate: the first and the last step still move


def relative_rate(schedule: str, done: float) -> float:
    """The learning rate as a share of its highest, when ``done`` (0 to 1) of the run lies behind."""
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return max(FLOOR, 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    rate = done / WARM_UP if done < WARM_UP else (1 - done) / (1 - WARM_UP)
    return max(FLOOR, rate)


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate

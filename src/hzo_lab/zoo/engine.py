"""The gradient under test: one training step, recorded and differentiated by hzo."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import hzo


@dataclass(frozen=True)
class Step:
    """What one gradient by hzo cost, in seconds of a processor (one thread)."""

    seconds: float


def gradient(call: Callable[[], Tensor]) -> Step:
    """Run the call, add the gradient of its loss to ``.grad``. Errors are hzo's."""
    start = time.process_time()
    with hzo.record() as tape:
        loss = call()
    tape.backward(loss)
    return Step(time.process_time() - start)


def preload() -> None:
    """Take one gradient, of a number: what hzo and PyTorch import at the first one is not the model's time."""
    weight = torch.ones(1, requires_grad=True)
    gradient(weight.sum)

"""The gradient under test: one training step, recorded and differentiated by hzo."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hzo


@dataclass(frozen=True)
class Step:
    """What one gradient by hzo cost, in seconds of a processor (one thread). None: hzo does not say."""

    seconds: float
    forward_equivalents: float | None = None
    share_by_queries: float | None = None


def gradient(call: Callable[[], Tensor]) -> Step:
    """Run the call, add the gradient of its loss to ``.grad``. Errors are hzo's."""
    start = time.process_time()
    tape: Any
    with hzo.record() as tape:
        loss = call()
    report = tape.backward(loss)
    seconds = time.process_time() - start
    return Step(seconds, _number(report, tape, "forward_equivalents"), _number(report, tape, "share_by_queries"))


def preload() -> None:
    """Take one gradient, of a number: what hzo and PyTorch import at the first one is not the model's time."""
    weight = torch.ones(1, requires_grad=True)
    gradient(weight.sum)


def _number(report: Any, tape: Any, name: str) -> float | None:
    for source in (report, tape, getattr(tape, "plan", None)):
        value = getattr(source, name, None)
        if isinstance(value, (int, float)):
            return float(value)
    return None

"""One gradient of a model's loss, by backprop and by hzo, and the time that it takes: what several benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import hzo

Loss = Callable[[nn.Module], Tensor]
"""Of a model on a fixed batch."""


def by_backprop(model: nn.Module, loss: Loss) -> None:
    loss(model).backward()


def by_hzo(model: nn.Module, loss: Loss) -> None:
    with hzo.record() as step:
        value = loss(model)
    step.backward(value)


def seconds(run: Callable[[], object]) -> float:
    """Of processor time: one thread computes, and others may use the machine."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def medians(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[str], None],
    clock: Callable[[Callable[[], object]], float] = seconds,
) -> dict[str, float]:
    """Median seconds of each. They take turns, so that what else the machine does falls on all of them.

    Args:
        before: called with the name of what runs next; not timed.
        clock: the seconds that a run takes.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            before(name)
            times[name].append(clock(run))
    return {name: statistics.median(taken) for name, taken in times.items()}


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])

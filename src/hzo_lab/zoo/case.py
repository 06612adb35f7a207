"""One case of the zoo: a model and the natural call that gives its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class NotBuiltError(Exception):
    """The family could not be made tiny, or its library is not installed; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """A model with random weights, and a call that runs it and returns a scalar loss.

    ``call`` takes nothing: its inputs are fixed. What it draws (dropout) comes from the global generators.
    """

    model: nn.Module
    call: Callable[[], Tensor]
    note: str = ""


def mean_square(out: Any) -> Tensor:
    """The loss of a model that has none: the sum of the mean squares of what it returns and what carries a gradient."""
    found = list(_differentiable(out))
    if not found:
        raise NotBuiltError("the model returns nothing that carries a gradient")
    return torch.stack([t.abs().square().mean() for t in found]).sum()


def _differentiable(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.requires_grad and value.numel():
            yield value if bool(value.isfinite().all()) else value[value.isfinite()]  # logits are masked by -inf
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _differentiable(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _differentiable(part)

"""The table of baselines: what training, tables and tests know of each besides its estimate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Estimate = TypeVar("Estimate", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Baseline:
    """A gradient method that HZO is compared with: its function, what it costs, and how it is trained with.

    Attributes:
        estimate: the function, with the signature of ``hzo.backward``.
        passes: what one random direction costs, in forward passes; None for methods that draw none. Those that do
            take ``samples`` and ``generator``.
        rate: the learning rate of a training, as a share of what suits an exact gradient. One random direction points
            nearly at right angles to the gradient and is long: its variance asks for a small rate.
        reverse: whether it runs autograd's reverse sweep.
        second_moment: E|ĝ|² / |g|² of one direction for a gradient g of d elements, as a function of d; tests hold it,
            and the mean, against many draws. None where it is not a function of d.
    """

    estimate: Callable[..., Any]
    passes: int | None = None
    rate: float = 1.0
    reverse: bool = False
    second_moment: Callable[[int], float] | None = None


BASELINES: dict[str, Baseline] = {}
"""By the name that ``hzo train --method`` takes."""


def baseline(
    name: str,
    *,
    passes: int | None = None,
    rate: float = 1.0,
    reverse: bool = False,
    second_moment: Callable[[int], float] | None = None,
) -> Callable[[Estimate], Estimate]:
    """Enter a function into the table; used as a decorator. The arguments are those of ``Baseline``."""

    def register(estimate: Estimate) -> Estimate:
        BASELINES[name] = Baseline(estimate, passes, rate, reverse, second_moment)
        return estimate

    return register

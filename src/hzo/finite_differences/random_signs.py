"""Cross-talk: what an approximate coloring adds to a node, and how large it was.

Elements of one color that share outputs are perturbed with random signs, independent for every sample and element. An
element then sees the others multiplied by a random sign: zero on average, so that the estimate is unbiased over signs.
Two independent draws give two estimates; their mean is used, their difference tells its variance. Source: ours (random
signs as in Rademacher probes, Hutchinson 1990).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

DRAWS = 2
"""Draws of signs per gradient: the fewest that show their own spread."""


@dataclass(frozen=True)
class NodeCrossTalk:
    """What one approximate node showed.

    Attributes:
        where: the boundary that was estimated. coloring: its colors and spacing.
        squared_error: of the estimate, summed over batch and elements, as its draws tell.
        squared_norm: of the exact cotangent, estimated without bias, so that it may come out negative.
    """

    where: str
    coloring: str
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """Root of the error over the norm; infinity where the cross-talk hides the cotangent."""
        return float((self.squared_error / self.squared_norm) ** 0.5) if self.squared_norm > 0 else float("inf")


@dataclass
class CrossTalk:
    """How far off the gradients were that perturb, at once, elements which share outputs (``hzo.plan(spacing=k)``).

    One entry for each tensor perturbed so, of all gradients that were taken while ``hzo.report_crosstalk`` was open.
    """

    nodes: list[NodeCrossTalk] = field(default_factory=list)

    @property
    def relative_error(self) -> float:
        """The largest of a node; 0 where all were exact."""
        return max((node.relative_error for node in self.nodes), default=0.0)

    def __str__(self) -> str:
        if not self.nodes:
            return "no approximate node"
        lines = (f"{node.where}: colors {node.coloring}, error {node.relative_error:.2%}" for node in self.nodes)
        return "\n".join(lines)

    __repr__ = __str__


_open: ContextVar[tuple[CrossTalk, ...]] = ContextVar("hzo_open_cross_talk", default=())


@contextmanager
def report_crosstalk() -> Iterator[CrossTalk]:
    """Measure, inside the ``with`` block, what gradients lose where plans save queries by ``spacing=k``.

    There, elements are perturbed together although they share outputs, and random signs keep the estimate unbiased;
    how far estimates of different signs lie apart tells their error. Cost: no query more. Source: ours.
    """
    report = CrossTalk()
    token = _open.set((*_open.get(), report))
    try:
        yield report
    finally:
        _open.reset(token)


def over_signs(
    estimate: Callable[[Tensor], Tensor],
    rows: Tensor,
    *,
    draws: int,
    seed: int,
    where: str,
    coloring: str,
) -> Tensor:
    """The mean of estimates over draws of random signs, one sign for each sample and element.

    Args:
        estimate: from signs (B, n) to an estimate (B, n) in coordinates that the signs have flipped.
        rows: (B, n), for shape, dtype and device. seed: of the signs. where, coloring: for the report.

    Unbiased where the map is linear within a step. Variance: that of one draw over ``draws``.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        signs = torch.randint(0, 2, rows.shape, generator=generator, device="cpu").to(rows) * 2 - 1
        found.append(estimate(signs) * signs)
    stacked = torch.stack(found)
    mean = stacked.mean(0)
    spread = float((stacked - mean).square().sum()) / (draws - 1) / draws
    node = NodeCrossTalk(where, coloring, spread, float(mean.square().sum()) - spread)
    for report in _open.get():
        report.nodes.append(node)
    return mean

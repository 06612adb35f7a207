"""What an experiment is told, and what it says: ``Setting`` in, ``Finding`` out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure

from hzo_lab.training import Result, Run
from hzo_lab.training import train as train_to_the_end

Scale = Literal["smoke", "cpu", "long", "gpu"]
SCALES: tuple[Scale, ...] = ("smoke", "cpu", "long", "gpu")
Verdict = Literal["holds", "holds in part", "does not hold"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How large, on what, and where.

    Attributes:
        scale: "smoke" (seconds), "cpu" (two cores, up to hours), "long" (two cores, trainings of a night, the rest
            as "cpu") or "gpu".
        data_dir: the folder that holds CIFAR-10 and the ImageNet classes; None: what needs none.
        out: where records go; run directories lie in ``out/runs``.
        chosen: seeds asked for; None leaves them to the claim.
        runs: folders of finished runs to be used where they fit.
        train: whether runs that are not there are trained; otherwise they are left out and said to be missing.
        train_run: trains a run to its end; a command shows it, and takes Ctrl-C.
        tell: called with a line about what goes on.
    """

    scale: Scale
    out: Path
    data_dir: Path | None = None
    chosen: tuple[int, ...] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    runs: tuple[Path, ...] = ()
    train: bool = True
    train_run: Callable[[Run], Result] = train_to_the_end
    tell: Callable[[str], object] = lambda _: None

    @property
    def smoke(self) -> bool:
        return self.scale == "smoke"

    def seeds(self, count: int, smoke: int = 2) -> tuple[int, ...]:
        """Those asked for, else the first ``count``, at smoke scale ``smoke``."""
        return self.chosen or tuple(range(smoke if self.smoke else count))


@dataclass(frozen=True, eq=False)
class Finding:
    """What came of a claim.

    Attributes:
        claim: what the paper says, of which we know abstract, summary and captions.
        found: one sentence with our figures.
        rows: what was measured, one record each.
        configuration: what the figures depend on.
        summary: the figures that the verdict rests on.
        notes: what a reader must know to judge them.
    """

    claim: str
    found: str
    verdict: Verdict
    rows: Sequence[Row]
    plot: Figure
    seeds: tuple[int, ...]
    configuration: Mapping[str, Any]
    summary: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def verdict(parts: Mapping[str, bool]) -> Verdict:
    """All parts of a claim were seen, some, or none."""
    seen = sum(parts.values())
    return "does not hold" if seen == 0 else "holds" if seen == len(parts) else "holds in part"


def select(rows: Iterable[Row], **where: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def in_words(parts: Mapping[str, bool]) -> str:
    """What was not seen, for the end of a sentence; empty where all was."""
    missing = [name for name, seen in parts.items() if not seen]
    return f" Not seen: {'; '.join(missing)}." if missing else ""

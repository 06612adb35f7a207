"""Several methods on the same data, seeds and order, beside each other."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hzo._files import replace_file
from hzo.errors import InputError
from hzo_lab.errors import CheckpointError
from hzo_lab.records import CONFIG, METRICS, disk_errors, environment, new_run_directory, read_metrics
from hzo_lab.reports.progress_display import clock, large
from hzo_lab.training import (
    Record,
    Result,
    Run,
    TrainConfig,
    comparison,
    from_dict,
    load_data,
    read_config,
    resume,
    start,
)

PLAN = "comparison.json"
RESULTS = "results.json"
TABLE = "results.csv"
PLOT = "comparison.png"


@dataclass(frozen=True)
class ComparedRun:
    """One finished run and what it came to."""

    config: TrainConfig
    result: Result
    records: Sequence[Record]

    @property
    def cosine(self) -> float | None:
        """Mean over the run of the cosine with backprop; None where it was not measured."""
        measured = [r["cosine"] for r in self.records if r.get("cosine") is not None]
        return statistics.fmean(measured) if measured else None


def runs_of(configs: Sequence[TrainConfig], out: Path) -> list[tuple[TrainConfig, Path]]:
    return [(config, out / f"{config.method}-seed{config.seed}") for config in configs]


def begin(configs: Sequence[TrainConfig], out: Path) -> None:
    """Make the directory of a comparison and write down what is compared."""
    directories = [where for _, where in runs_of(configs, out)]
    if len(set(directories)) < len(directories):
        raise InputError("expected every method and every seed once: two of the runs would be the same.")
    new_run_directory(out)
    values = {"runs": [dataclasses.asdict(config) for config in configs]}
    with disk_errors(f"writing {out / PLAN}", "start again"):
        replace_file(out / PLAN, (json.dumps(values, indent=2) + "\n").encode())


def read(out: Path) -> list[TrainConfig]:
    """What is compared in a directory that ``begin`` made."""
    path = out / PLAN
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return [from_dict(values, str(path)) for values in runs]
    except FileNotFoundError:
        raise CheckpointError(
            f"expected a comparison in {out}, {PLAN} is missing: start one with `hzo compare`."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore it, or start a new comparison.") from error


def compare(configs: Sequence[TrainConfig], out: Path, train_run: Callable[[Run], Result]) -> list[ComparedRun]:
    """Train all that is not finished yet, then write results and plot. The data are read once and shared."""
    dataset = load_data(configs[0])
    outcomes = []
    for config, where in runs_of(configs, out):
        begun = (where / CONFIG).is_file()
        if begun and read_config(where / CONFIG) != config:
            raise CheckpointError(f"{where} holds a run with another configuration: start a new comparison.")
        running = resume(config, where, dataset) if begun else start(config, where, dataset)
        result = train_run(running)
        outcomes.append(ComparedRun(config, result, read_metrics(where / METRICS)))
        _write(outcomes, out)
    return outcomes


def grouped_by_method(outcomes: Sequence[ComparedRun]) -> dict[str, list[ComparedRun]]:
    groups: dict[str, list[ComparedRun]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.config.method, []).append(outcome)
    return groups


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; a single run has none."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _percent(values: Sequence[float]) -> str:
    mean, deviation = _spread([100 * value for value in values])
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def table(outcomes: Sequence[ComparedRun]) -> Table:
    """One row a method, means over its seeds."""
    first = outcomes[0].config
    seeds = sorted({outcome.config.seed for outcome in outcomes})
    end = f"{first.epochs} epochs" if first.budget is None else f"{large(first.budget)} forward equivalents each"
    title = f"{first.model} on {first.data}, {end}, seeds {', '.join(map(str, seeds))}"
    caption = "accuracy and loss on the test split; passes: what the queries come to\n"
    caption += "in forward passes, a sweep by adjoints taken as two"
    shown = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    shown.add_column("method", no_wrap=True)
    for name in ("accuracy, %", "loss", "cosine", "passes", "queries", "time"):
        shown.add_column(name, justify="right", no_wrap=True)
    for method, group in grouped_by_method(outcomes).items():
        cosines = [o.cosine for o in group if o.cosine is not None]
        shown.add_row(
            method,
            _percent([o.result.test_accuracy for o in group]),
            f"{statistics.fmean(o.result.test_loss for o in group):.4f}",
            f"{statistics.fmean(cosines):.4f}" if cosines else "-",
            large(statistics.fmean(o.result.cost for o in group)),
            large(statistics.fmean(o.result.queries for o in group)),
            clock(statistics.fmean(o.result.seconds for o in group)),
        )
    return shown


def _row(outcome: ComparedRun) -> dict[str, Any]:
    result = outcome.result
    return {
        "method": outcome.config.method,
        "seed": outcome.config.seed,
        "lr": outcome.config.lr,
        "finished": result.finished,
        "steps": result.step,
        "test_accuracy": result.test_accuracy,
        "test_loss": result.test_loss,
        "mean_cosine": outcome.cosine,
        "forward_equivalents": result.forward_equivalents,
        "cost": result.cost,
        "queries": result.queries,
        "seconds": round(result.seconds, 3),
    }


def _write(outcomes: Sequence[ComparedRun], out: Path) -> None:
    rows = [_row(outcome) for outcome in outcomes]
    groups = grouped_by_method(outcomes)
    summary = {}
    for method, group in groups.items():
        mean, deviation = _spread([outcome.result.test_accuracy for outcome in group])
        summary[method] = {"test_accuracy_mean": mean, "test_accuracy_sd": deviation, "seeds": len(group)}
    values = {"summary": summary, "runs": rows, "environment": environment()}
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with disk_errors(f"writing the results in {out}", f"`hzo compare --resume {out}`"):
        replace_file(out / RESULTS, (json.dumps(values, indent=2) + "\n").encode())
        replace_file(out / TABLE, text.getvalue().encode())
    first = outcomes[0].config
    comparison(
        {method: [outcome.records for outcome in group] for method, group in groups.items()},
        out / PLOT,
        title=f"{first.model} on {first.data}",
    )

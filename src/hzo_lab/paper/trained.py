"""Runs of ``hzo train``: those that are there already and have the right configuration, else trained now."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hzo.baselines import BASELINES
from hzo_lab.data import DATA_SETS, Dataset
from hzo_lab.errors import CheckpointError
from hzo_lab.paper.finding import Row, Setting
from hzo_lab.records import CONFIG, METRICS, SUMMARY, read_metrics
from hzo_lab.training import Record, TrainConfig, load_data, models, read_config, resume, start

# Where and how closely a run was watched: nothing that its weights depend on, but for how sums are rounded.
_ASIDE = ("data_dir", "device", "threads", "log_every", "cosine_every", "probe_size", "checkpoint_every")
_OF_PLANS = ("tree", "assume", "scheme")


@dataclass(frozen=True)
class Trained:
    """A finished run: its configuration, its log, and how it ended (``summary.json``)."""

    config: TrainConfig
    records: Sequence[Record]
    summary: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """On the test split, in percent, after the last step."""
        return 100 * float(self.summary["test_accuracy"])

    @property
    def lowest_cosine(self) -> float | None:
        """With backprop, along the run; None where it was not measured."""
        return min((r["cosine"] for r in self.records if r.get("cosine") is not None), default=None)

    def rows(self, **about: Any) -> list[Row]:
        """The log where test accuracy or cosine was measured; enough for a curve, and small enough to be kept."""
        kept = ("step", "epoch", "loss", "train_accuracy", "test_loss", "test_accuracy", "cosine", "cost", "seconds")
        return [
            {**about, "method": self.config.method, "seed": self.config.seed, **{name: r.get(name) for name in kept}}
            for r in self.records
            if r.get("test_accuracy") is not None or r.get("cosine") is not None
        ]

    def where(self) -> dict[str, Any]:
        """What it ran on and how long it took: several runs of one table may come from several machines."""
        environment = self.summary["environment"]
        about = {name: environment.get(name) for name in ("commit", "hzo", "torch", "hardware", "device", "threads")}
        return {**about, "threads": self.config.threads, "seconds": self.summary["seconds"]}


def run_key(config: TrainConfig) -> dict[str, Any]:
    """What the numbers of a run depend on: defaults written out, options that its method or data do not look at left
    out."""
    values = dataclasses.asdict(config)
    values |= {key: value for key, value in models.own_size(config.model).items() if values[key] is None}
    unseen = [*_ASIDE]
    unseen += [] if config.method == "hzo" else _OF_PLANS
    known = BASELINES.get(config.method)
    unseen += [] if known is not None and known.passes is not None else ["directions"]
    unseen += [] if DATA_SETS[config.data].shape is None else ["image_size"]
    unseen += ["augment"] if DATA_SETS[config.data].bundled else []
    unseen += [] if config.budget is None else ["epochs"]
    return {key: value for key, value in values.items() if key not in unseen}


def directory_name(config: TrainConfig) -> str:
    """A name that tells runs apart for readers, and a digest that does for programs."""
    text = json.dumps(run_key(config), sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{config.data}-{config.model}-{config.method}-{config.seed}-{digest}"


def trained(config: TrainConfig, setting: Setting, datasets: dict[str, Dataset]) -> Trained | None:
    """The finished run of a configuration: one in ``setting.runs``, or in ``out/runs``, which is begun or gone on with
    where it is not finished. None where training is not allowed and there is none. ``datasets`` keeps what was read.

    Raises:
        CheckpointError: a run directory that cannot be read. DataError: the data are not there.
    """
    for folder in setting.runs:
        for path in (folder, *sorted(folder.iterdir())):
            if (path / CONFIG).is_file() and run_key(read_config(path / CONFIG)) == run_key(config):
                if (found := finished(path)) is not None:
                    return found
                setting.tell(f"{path.name} has the right configuration and is not finished: left aside")
    own = setting.out / "runs" / directory_name(config)
    if (found := finished(own)) is not None:
        return found
    if not setting.train:
        return None
    dataset = dataset_of(config, datasets)
    begun = (own / CONFIG).is_file()
    setting.tell(f"{'going on with' if begun else 'training'} {own.name}")
    run = (resume if begun else start)(config, own, dataset)
    result = setting.train_run(run)
    setting.tell(f"{own.name}: {100 * result.test_accuracy:.2f} % in {result.seconds:,.0f} s")
    return finished(own)


def dataset_of(config: TrainConfig, datasets: dict[str, Dataset]) -> Dataset:
    """What a run sees; read once, then kept in ``datasets``."""
    key = f"{config.data}, {config.image_size}"
    if key not in datasets:
        datasets[key] = load_data(config)
    return datasets[key]


def finished(directory: Path) -> Trained | None:
    """The run in a directory, if there is one and it went to its end.

    Raises:
        CheckpointError: its files cannot be read.
    """
    if not (directory / SUMMARY).is_file():
        return None
    try:
        summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        done = bool(summary["finished"]) and {"test_accuracy", "seconds", "environment"} <= summary.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / SUMMARY} cannot be read ({error}): go on with the run by `hzo train --resume`, which "
            "writes it again, or take the directory away."
        ) from error
    return Trained(read_config(directory / CONFIG), read_metrics(directory / METRICS), summary) if done else None

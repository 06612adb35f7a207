"""Copies of the log: complete, and after a resume without steps that were taken twice."""

import csv
import sys

import pytest

from hzo.errors import InputError
from hzo_lab.records.files import METRICS, read_metrics
from hzo_lab.training import checkpoint
from hzo_lab.training.config import TrainConfig
from hzo_lab.training.loop import FIELDS, train
from hzo_lab.training.run import load_data, resume, start

SMALL = TrainConfig(depth=2, width=8, epochs=1, batch_size=64, log_every=2, cosine_every=0, method="backprop")
DIGITS = load_data(SMALL)


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_the_log(tmp_path):
    run = tmp_path / "run"
    train(start(SMALL, run, DIGITS), logs=["csv"])
    records = read_metrics(run / METRICS)
    assert tuple(records[0]) == FIELDS
    assert [{k: v for k, v in row.items() if v} for row in rows(run)] == [
        {k: str(v) for k, v in record.items() if v is not None} for record in records
    ]


def test_a_resumed_run_does_not_repeat_lines(tmp_path):
    run = tmp_path / "run"
    train(start(SMALL, run, DIGITS), max_steps=5, logs=["csv"])
    with (run / "metrics.csv").open("a") as file:  # logged, then killed before the next checkpoint
        file.write("6,1\n")
    train(resume(SMALL, run, DIGITS), max_steps=9, logs=["csv"])
    assert [int(row["step"]) for row in rows(run)] == [1, 2, 4, 6, 8]


def test_tensorboard_holds_every_number(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    train(start(SMALL, run, DIGITS), max_steps=5, logs=["tensorboard"])
    train(resume(SMALL, run, DIGITS), max_steps=9, logs=["tensorboard", "csv", "tensorboard"])
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 4, 6, 8]
    losses = [record["loss"] for record in read_metrics(run / METRICS)]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses)


def test_what_is_missing_or_unknown_is_said_before_anything_runs(tmp_path, monkeypatch):
    run = start(SMALL, tmp_path / "run", DIGITS)
    with pytest.raises(InputError, match="csv, tensorboard"):
        train(run, logs=["xml"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"hzo\[log\]"):
        train(run, logs=["tensorboard"])
    assert checkpoint.latest(tmp_path / "run") is None

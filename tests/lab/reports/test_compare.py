"""Comparisons: equal conditions, a table that adds up, files that can be read back; and the plots."""

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from hzo.errors import InputError
from hzo_lab.errors import CheckpointError
from hzo_lab.reports import compare
from hzo_lab.training.config import TrainConfig, replace
from hzo_lab.training.loop import train
from hzo_lab.training.plots import comparison, moving_average, run_curves

SMALL = TrainConfig(depth=2, width=8, epochs=1, batch_size=64, log_every=4, cosine_every=9, probe_size=4)
PNG = b"\x89PNG"


def configs():
    return [replace(SMALL, method=m, seed=s) for m in ("hzo", "backprop") for s in (0, 1)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    compare.begin(configs(), out)
    return out, compare.compare(configs(), out, train)


def test_methods_see_the_same_examples_in_the_same_order(compared):
    _, outcomes = compared
    groups = compare.grouped_by_method(outcomes)
    for ours, exact in zip(groups["hzo"], groups["backprop"], strict=True):
        ours_by_step = {r["step"]: r["loss"] for r in ours.records}
        exact_by_step = {r["step"]: r["loss"] for r in exact.records}
        assert ours_by_step[1] == pytest.approx(exact_by_step[1], rel=1e-5)
        assert ours_by_step[8] == pytest.approx(exact_by_step[8], rel=1e-3)


def test_the_table_has_one_row_a_method(compared):
    _, outcomes = compared
    console = Console(width=160, file=io.StringIO())
    console.print(compare.table(outcomes))
    text = console.file.getvalue()
    assert "hzo" in text
    assert "±" in text
    assert "seeds 0, 1" in text


def test_results_are_written_for_people_and_programs(compared):
    out, outcomes = compared
    with (out / compare.TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["hzo", "hzo", "backprop", "backprop"]
    results = json.loads((out / compare.RESULTS).read_text())
    mean = np.mean([o.result.test_accuracy for o in outcomes[:2]])
    assert results["summary"]["hzo"]["test_accuracy_mean"] == pytest.approx(mean)
    assert results["environment"]["torch"]
    assert (out / compare.PLOT).read_bytes().startswith(PNG)


def test_a_comparison_goes_on_where_it_was(compared):
    out, outcomes = compared
    assert compare.read(out) == configs()
    again = compare.compare(compare.read(out), out, train)
    assert [o.result.test_accuracy for o in again] == [o.result.test_accuracy for o in outcomes]


def test_equal_budgets_are_kept_by_all(tmp_path):
    runs = [replace(SMALL, method=m, budget=60.0, lr=1e-3) for m in ("hzo", "backprop", "spsa")]
    compare.begin(runs, tmp_path / "out")
    outcomes = compare.compare(runs, tmp_path / "out", train)
    for outcome in outcomes:
        assert outcome.result.cost <= 60
    steps = {o.config.method: o.result.step for o in outcomes}
    assert steps["backprop"] == steps["spsa"] == 30
    assert steps["hzo"] < 10


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(InputError, match="once"):
        compare.begin([SMALL, SMALL], tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    with pytest.raises(CheckpointError, match="--out"):
        compare.begin([SMALL], tmp_path / "full")
    with pytest.raises(CheckpointError, match="start one"):
        compare.read(tmp_path)
    (tmp_path / compare.PLAN).write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        compare.read(tmp_path)


def test_smoothing_keeps_length_and_mean_level():
    values = np.arange(50.0)
    assert np.allclose(moving_average(values, 7), values)
    assert len(moving_average(np.ones(2), 9)) == 2
    assert len(moving_average(np.ones(0), 9)) == 0


@pytest.mark.parametrize("cosine", [None, 0.999999, 0.95, 0.3, -0.2, float("nan")])
def test_curves_are_drawn_whatever_was_measured(tmp_path, cosine):
    records = [
        {"step": k, "loss": 1 / k, "train_accuracy": 0.5, "test_accuracy": 0.4 if k == 3 else None, "cosine": cosine}
        for k in range(1, 6)
    ]
    run_curves(records, tmp_path / "a.png", title="t", method="hzo")
    comparison({"hzo": [records, records[:2]], "other": [[]]}, tmp_path / "b.png", title="t")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert (tmp_path / "b.png").read_bytes().startswith(PNG)

"""Runs that are there already: found by what their numbers depend on, and by nothing else."""

import json

import pytest

from hzo_lab.errors import CheckpointError
from hzo_lab.paper.finding import Setting
from hzo_lab.paper.trained import directory_name, run_key, trained
from hzo_lab.training.config import TrainConfig, replace
from hzo_lab.training.loop import train
from hzo_lab.training.run import start

SMALL = TrainConfig(depth=2, width=8, epochs=1, batch_size=256, cosine_every=0, method="backprop")


def setting(tmp_path, **given):
    return Setting(scale="smoke", out=tmp_path / "out", **given)


@pytest.fixture
def runs(tmp_path):
    """A folder with one finished run and one that was stopped."""
    for name, config, steps in (("done", SMALL, None), ("stopped", replace(SMALL, seed=1), 2)):
        train(start(config, tmp_path / "runs" / name), max_steps=steps)
    (tmp_path / "runs" / "notes.txt").write_text("not a run")
    return tmp_path / "runs"


def test_a_finished_run_is_used_and_an_unfinished_one_is_not(tmp_path, runs):
    said = []
    only_these = setting(tmp_path, runs=(runs,), train=False, tell=said.append)
    found = trained(SMALL, only_these, {})
    assert found.accuracy == 100 * json.loads((runs / "done/summary.json").read_text())["test_accuracy"]
    assert [row["step"] for row in found.rows()] == [5]
    assert found.where()["threads"] == 1
    assert trained(replace(SMALL, seed=1), only_these, {}) is None
    assert "stopped" in said[0]
    assert trained(replace(SMALL, lr=0.123), only_these, {}) is None
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_trained_once(tmp_path):
    first = trained(SMALL, setting(tmp_path), {})
    files = sorted((tmp_path / "out/runs").iterdir())
    assert [path.name for path in files] == [directory_name(SMALL)]
    again = trained(SMALL, setting(tmp_path, train=False), {})
    assert again.summary == first.summary


def test_an_interrupted_run_is_gone_on_with(tmp_path):
    own = tmp_path / "out/runs" / directory_name(SMALL)
    train(start(SMALL, own), max_steps=2)
    whole, said = trained(SMALL, setting(tmp_path / "other"), {}), []
    found = trained(SMALL, setting(tmp_path, tell=said.append), {})
    assert "going on" in said[0]
    assert found.accuracy == whole.accuracy


@pytest.mark.parametrize(
    "changes", [{"data_dir": "elsewhere"}, {"threads": 2}, {"tree": "flat"}, {"log_every": 1}, {"directions": 3}]
)
def test_what_numbers_do_not_depend_on_does_not_tell_runs_apart(changes):
    assert run_key(replace(SMALL, **changes)) == run_key(SMALL)


@pytest.mark.parametrize("changes", [{"seed": 7}, {"width": 9}, {"epochs": 2}, {"method": "hzo"}, {"dtype": "float64"}])
def test_what_numbers_depend_on_does(changes):
    assert run_key(replace(SMALL, **changes)) != run_key(SMALL)


def test_defaults_of_a_network_may_be_written_out():
    assert run_key(replace(SMALL, depth=None)) == run_key(replace(SMALL, depth=16))
    hzo = replace(SMALL, method="hzo")
    assert run_key(replace(hzo, tree="flat")) != run_key(hzo)


def test_a_damaged_summary_is_said(tmp_path, runs):
    (runs / "done/summary.json").write_text("{")
    with pytest.raises(CheckpointError, match="summary"):
        trained(SMALL, setting(tmp_path, runs=(runs,), train=False), {})

"""The loop: it learns, it can be stopped anywhere, and what it measures leaves no trace."""

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch
from torch import nn

from hzo.errors import InputError, NonFiniteError
from hzo_lab.errors import CheckpointError
from hzo_lab.records.files import METRICS, read_metrics
from hzo_lab.training import checkpoint
from hzo_lab.training.config import TrainConfig, replace
from hzo_lab.training.learning_rate import relative_rate
from hzo_lab.training.loop import train
from hzo_lab.training.methods import Method, bind_method
from hzo_lab.training.probe import cosine_to_backprop
from hzo_lab.training.run import load_data, loss_fn, resume, start

SMALL = TrainConfig(depth=2, width=8, epochs=1, batch_size=64, log_every=4, cosine_every=9, probe_size=4)
DIGITS = load_data(SMALL)


def weights(result):
    return (result.checkpoint / checkpoint.WEIGHTS).read_bytes()


def log(out):
    """The records of a run, without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(out / METRICS)]


@pytest.mark.parametrize("method", ["hzo", "backprop", "spsa", "mezo", "forward-gradient", "node-perturbation"])
def test_every_method_trains_and_logs(tmp_path, method):
    config = replace(SMALL, method=method, lr=0.05 if method in ("hzo", "backprop") else 0.005)
    result = train(start(config, tmp_path / "run", DIGITS))
    assert result.finished
    assert result.step == 22
    records = read_metrics(tmp_path / "run" / METRICS)
    assert records[-1]["step"] == 22
    assert records[-1]["test_accuracy"] == result.test_accuracy
    assert all(math.isfinite(record["loss"]) for record in records)
    measured = [record["cosine"] for record in records if record["cosine"] is not None]
    if method == "backprop":
        assert not measured
        assert result.queries == 0
    else:
        assert [record["step"] for record in records if record["cosine"] is not None] == [1, 10, 19]
        assert result.queries > 0
    if method == "hzo":
        assert min(measured) > 0.9999
    for name in ("config.json", "summary.json", "curves.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_coordinate_differences_train_a_tiny_network(tmp_path):
    config = replace(SMALL, method="coordinate", depth=1, width=1, batch_size=16)
    result = train(start(config, tmp_path / "run", DIGITS), max_steps=2)
    assert result.step == 2
    assert result.queries > 0


def test_hzo_follows_backprop(tmp_path):
    config = replace(SMALL, dtype="float64", epochs=3)
    ours = train(start(config, tmp_path / "hzo", DIGITS))
    exact = train(start(replace(config, method="backprop"), tmp_path / "backprop", DIGITS))
    assert ours.test_accuracy == pytest.approx(exact.test_accuracy, abs=0.006)
    assert ours.test_loss == pytest.approx(exact.test_loss, rel=1e-3)
    assert ours.test_accuracy > 0.5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stops", [(1,), (5, 6, 13), (21,), (22, 23, 40)])
def test_a_run_in_pieces_ends_in_the_same_bits(tmp_path, stops, optimizer):
    config = replace(SMALL, optimizer=optimizer, lr=0.01, epochs=2, width=4, cosine_every=13)
    whole = train(start(config, tmp_path / "whole", DIGITS))
    out = tmp_path / "pieces"
    train(start(config, out, DIGITS), max_steps=stops[0])
    for stop in stops[1:]:
        torch.manual_seed(0)  # another process would have other random numbers
        train(resume(config, out, DIGITS), max_steps=stop)
    pieces = train(resume(config, out, DIGITS))
    assert weights(pieces) == weights(whole)
    assert log(out) == log(tmp_path / "whole")
    assert pieces.forward_equivalents == whole.forward_equivalents


@pytest.mark.parametrize("method", ["spsa", "backprop"])
def test_random_directions_and_augmentation_resume_too(tmp_path, method):
    config = replace(SMALL, method=method, lr=0.001, directions=2)
    whole = train(start(config, tmp_path / "whole", DIGITS))
    train(start(config, tmp_path / "pieces", DIGITS), max_steps=7)
    assert weights(train(resume(config, tmp_path / "pieces", DIGITS))) == weights(whole)


def test_a_run_stopped_by_its_user_is_saved(tmp_path):
    seen = []
    running = start(SMALL, tmp_path / "run", DIGITS)
    result = train(running, watch=seen.append, stop=lambda: len(seen) == 3)
    assert (result.finished, result.step) == (False, 3)
    assert resume(SMALL, tmp_path / "run", DIGITS).counters.step == 3


def test_what_is_watched_adds_up(tmp_path):
    seen = []
    train(start(SMALL, tmp_path / "run", DIGITS), watch=seen.append)
    assert [progress.step for progress in seen] == list(range(1, 23))
    assert seen[-1].done == 1
    assert seen[-1].seconds_left == 0
    assert seen[0].queries * 22 == seen[-1].queries


def test_a_finished_run_resumes_to_itself(tmp_path):
    whole = train(start(SMALL, tmp_path / "run", DIGITS))
    before = log(tmp_path / "run")
    again = train(resume(SMALL, tmp_path / "run", DIGITS))
    assert again.finished
    assert weights(again) == weights(whole)
    assert log(tmp_path / "run") == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    running = start(SMALL, tmp_path / "run", DIGITS)
    (running.out / METRICS).write_text('{"step": 4}\n{"st')
    result = train(resume(SMALL, tmp_path / "run", DIGITS))
    assert log(tmp_path / "run")[0]["step"] == 1
    assert result.finished


def _train_in_child(config, out):
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    train(resume(config, out) if (out / "config.json").exists() else start(config, out))


@pytest.mark.skipif(not hasattr(os, "fork") or not hasattr(signal, "SIGKILL"), reason="needs POSIX processes")
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    # A process that imports everything once and forks: five real SIGKILLs without five imports of torch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hzo_lab.training.loop"])
    config = replace(SMALL, width=4, epochs=2, checkpoint_every=2)
    whole, out = tmp_path / "whole", tmp_path / "killed"

    def run(directory, seconds=None):
        child = context.Process(target=_train_in_child, args=(config, directory))
        child.start()
        child.join(seconds)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        return child.exitcode

    run(tmp_path / "warm-up", 60)
    began = time.monotonic()
    assert run(whole, 120) == 0
    duration = time.monotonic() - began
    moments = random.Random(os.getpid())
    killed = 0
    for _ in range(5):
        killed += run(out, moments.uniform(0.2, 0.6) * duration) == -signal.SIGKILL
        if not (out / "config.json").exists() and out.is_dir():
            out.rmdir()  # killed before the run existed
    assert killed >= 1
    assert run(out, 120) == 0
    last = f"{checkpoint.FOLDER}/step-{2 * 22:08d}/{checkpoint.WEIGHTS}"
    assert (out / last).read_bytes() == (whole / last).read_bytes()
    assert log(out) == log(whole)


def test_a_budget_is_spent_and_never_overdrawn(tmp_path):
    running = start(replace(SMALL, budget=100.0, method="spsa", lr=1e-4), tmp_path / "spsa", DIGITS)
    result = train(running)
    assert result.finished
    assert result.cost == result.forward_equivalents <= 100 < result.cost + 2
    assert result.step == 50


def test_a_budget_smaller_than_a_gradient_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"one gradient by hzo costs .* the budget is 3"):
        train(start(replace(SMALL, budget=3.0), tmp_path / "run", DIGITS))


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(tmp_path):
    running = start(replace(SMALL, method="backprop", lr=1e9, schedule="constant"), tmp_path / "run", DIGITS)
    with pytest.raises(NonFiniteError):
        train(running)


def test_a_directory_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"other files.*--out"):
        start(SMALL, tmp_path, DIGITS)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    start(SMALL, tmp_path / "run", DIGITS)
    with pytest.raises(CheckpointError, match="--resume"):
        start(SMALL, tmp_path / "run", DIGITS)
    with pytest.raises(CheckpointError, match="is a file"):
        start(SMALL, tmp_path / "notes.txt", DIGITS)


def test_a_run_that_cannot_start_leaves_no_directory(tmp_path):
    with pytest.raises(InputError, match="device"):
        start(replace(SMALL, device="cuda:99"), tmp_path / "run", DIGITS)
    assert not (tmp_path / "run").exists()


def test_the_cosine_leaves_no_trace(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model(torch.randn(9, 6)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: grad.clone() for name, grad in gradients.items()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    method = bind_method(TrainConfig(method="backprop"), model, loss_fn, x)
    state, python = torch.get_rng_state(), random.getstate()
    assert cosine_to_backprop(method, model, loss_fn, x, y, seed=3) == pytest.approx(1)
    assert torch.equal(state, torch.get_rng_state())
    assert python == random.getstate()
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    for name, p in model.named_parameters():
        assert p.grad is gradients[name]
        assert torch.equal(p.grad, copies[name])


def test_a_failing_gradient_leaves_no_trace_either():
    model = nn.Linear(2, 2)

    def fails(x, y, generator):
        model.weight.grad = torch.ones(2, 2)
        torch.rand(3)
        raise ZeroDivisionError

    x, y = torch.randn(1, 2), torch.tensor([0])
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        cosine_to_backprop(Method("x", fails), model, loss_fn, x, y, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert model.weight.grad is None
    assert model.bias.grad is None


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_rates_stay_between_nothing_and_the_highest(schedule):
    rates = [relative_rate(schedule, k / 100) for k in range(100)]
    assert max(rates) == 1
    assert min(rates) > 0


def test_the_summary_says_where_it_ran(tmp_path):
    train(start(SMALL, tmp_path / "run", DIGITS), max_steps=1)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["environment"]["torch"] == torch.__version__
    assert summary["finished"] is False
    assert (tmp_path / "run" / summary["checkpoint"]).is_dir()

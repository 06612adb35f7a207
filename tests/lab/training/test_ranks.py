"""``hzo train`` under torchrun: the run of one process, its checkpoints, and a process that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hzo.errors import InputError
from hzo_lab.errors import CheckpointError
from hzo_lab.training import checkpoint, models
from hzo_lab.training.checkpoint import Counters
from hzo_lab.training.ranks import Ranks

OPTIONS = ["--depth", "3", "--width", "16", "--batch-size", "64", "--checkpoint-every", "5", "--cosine-every", "0"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def command(ranks, out, *options, restarts=0):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = [*launch, "--max-restarts", str(restarts)] if ranks > 1 else []
    return [sys.executable, *start, "-m", "hzo_lab", "train", *OPTIONS, "--out", str(out), *options]


def run(*arguments, **options):
    done = subprocess.run(
        command(*arguments, **options), check=False, capture_output=True, text=True, timeout=200, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(out):
    return load_file(checkpoint.latest(out) / checkpoint.WEIGHTS)


def process_of(rank, out):
    """The number of the process of this rank in the run that writes there."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment and str(out).encode() in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run by two processes that nobody disturbed, and what it said."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(2, out, "--epochs", "3")


def test_as_by_one_process(whole, tmp_path):
    """The same samples, order and counts; weights to rounding. One process alone writes and speaks."""
    out, said = whole
    run(1, tmp_path / "one", "--epochs", "3")
    alone, together = weights(tmp_path / "one"), weights(out)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-3)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "one", out)]
    assert summaries[0]["queries"] == summaries[1]["queries"]
    assert said.count("Finished") == 1
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((tmp_path / "one" / "metrics.jsonl").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds a process of torchrun's by /proc")
def test_killed_and_started_anew_by_torchrun(whole, tmp_path):
    """SIGKILL of one process in the middle: torchrun starts all anew, and the weights are equal to the bit."""
    out = tmp_path / "run"
    with subprocess.Popen(
        command(2, out, "--epochs", "3", restarts=2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT
    ) as running:
        until = time.monotonic() + 120
        # Not checkpoint.latest, which clears what is being written.
        while not (saved := [*out.glob("checkpoints/step-*")]) and time.monotonic() < until:
            time.sleep(0.02)
        assert saved
        os.kill(process_of(1, out), signal.SIGKILL)
        said = running.communicate(timeout=200)[0].decode()
        assert running.returncode == 0, said
    assert "from step" in said, "it was not killed in the middle"
    for name, tensor in weights(whole[0]).items():
        assert torch.equal(weights(out)[name], tensor), name
    records = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
        for path in (out / "metrics.jsonl", whole[0] / "metrics.jsonl")
    ]
    assert records[0] == records[1]


def test_another_number_of_processes_is_refused(whole):
    model = models.build("mlp", (64,), 10, depth=3, width=16, activation=None, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(CheckpointError, match=r"a run of 2 processes, and this one has 1: .*--nproc-per-node 2"):
        checkpoint.load(checkpoint.latest(whole[0]), model, optimizer)


def test_each_process_has_random_states_of_its_own(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(checkpoint.generator_states())
    saved = checkpoint.save(tmp_path, model, optimizer, Counters(step=1), states)
    drawn = []
    for rank in (0, 1):
        checkpoint.load(saved, model, optimizer, rank, 2)
        drawn.append(float(torch.rand(())))
    expected = [float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    assert drawn == expected


@pytest.mark.parametrize("given", ["soon", "0", "-1", "inf", "nan"])
def test_limits_in_time_are_checked(given, monkeypatch):
    monkeypatch.setenv("HZO_WAIT_SECONDS", given)
    with pytest.raises(InputError, match=f"a number of seconds in HZO_WAIT_SECONDS, got '{given}'"):
        Ranks(0, 2).gathered(None)


def test_processes_that_cannot_reach_each_other(tmp_path):
    """One of two was started: an error within the limit, that names the address."""
    alone = ENVIRONMENT | {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611",
        "TORCHELASTIC_RUN_ID": "none", "HZO_CONNECT_SECONDS": "3",
    }  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(
        command(1, tmp_path / "run"), check=False, capture_output=True, text=True, timeout=100, env=alone
    )
    assert done.returncode == 2
    assert "the 2 processes of this run cannot reach each other at 127.0.0.1:29611 within 3 seconds" in done.stderr
    assert time.monotonic() - began < 60
    assert not (tmp_path / "run").exists()

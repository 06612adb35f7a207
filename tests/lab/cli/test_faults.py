"""What goes wrong around a run: signals, a full disk, a folder that is read-only, two processes in one directory.

Each is tried on a process of its own, as a person would meet it; then the run is taken up again, and ends with the
weights of a run that nothing happened to.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import hzo
from hzo_lab.training import checkpoint

SMALL = ["--depth", "2", "--width", "8", "--batch-size", "64", "--epochs", "2", "--method", "backprop"]


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(hzo.__file__).parents[1]), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def start(*arguments, **options):
    command = [sys.executable, "-m", "hzo", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes, **options)


def ended(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def waiting(path, process):
    """Until a file is there."""
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def fill(path):
    """Take all that is left of the file system."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def weights(run):
    return (checkpoint.latest(run) / checkpoint.WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights that a run ends with where nothing happens to it."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert ended(start("train", *SMALL, "--out", run))[0] == 0
    return weights(run)


def finish(run, undisturbed):
    code, out, err = ended(start("train", "--resume", run))
    assert code == 0, out + err
    assert weights(run) == undisturbed


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, signum, code):
    run = tmp_path / "run"
    process = start("train", *SMALL, "--epochs", 200, "--out", run)
    waiting(run / "metrics.jsonl", process)
    process.send_signal(signum)
    got, out, err = ended(process)
    assert got == code, out + err
    assert f"hzo train --resume {run}" in out
    assert "all is saved" in out
    assert "Traceback" not in err
    assert checkpoint.latest(run) is not None


def test_two_processes_in_one_directory(tmp_path):
    run = tmp_path / "run"
    first = start("train", *SMALL, "--epochs", 200, "--out", run)
    waiting(run / "metrics.jsonl", first)
    code, _, err = ended(start("train", "--resume", run))
    assert code == 2
    assert "another process is training in" in err.replace("\n", " ")
    assert err.count("\n") == 1
    first.terminate()
    code, out, err = ended(first)
    assert code == 143, out + err  # the second did it no harm
    step = checkpoint.step_of(checkpoint.latest(run))
    code, out, _ = ended(start("train", "--resume", run, "--max-steps", step + 1))
    assert code == 0
    assert f"from step {step}" in out


@pytest.mark.parametrize("name", ["metrics.jsonl", "weights.safetensors"])
def test_a_file_that_may_not_grow(tmp_path, undisturbed, name):
    """A quota: the limit of a process on the size of a file, met by the log or by a checkpoint."""
    run = tmp_path / "run"
    code, out, err = ended(start("train", *SMALL, "--max-steps", 10, "--out", run))
    assert code == 0, out + err
    before = weights(run)
    limit = (run / "metrics.jsonl").stat().st_size + 100 if name == "metrics.jsonl" else len(before) - 100

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    options = ["--max-steps", 11] if name != "metrics.jsonl" else []
    code, out, err = ended(start("train", "--resume", run, *options, preexec_fn=limited))
    assert code == 2, out + err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert name in err or "checkpoint" in err
    assert weights(run) == before
    finish(run, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 300 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no right to mount a file system here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(small_disk, undisturbed):
    run = small_disk / "run"
    code, out, err = ended(start("train", *SMALL, "--max-steps", 10, "--out", run))
    assert code == 0, out + err
    before = weights(run)
    filler = small_disk / "filler"
    fill(filler)
    code, out, err = ended(start("train", "--resume", run))
    assert code == 2, out + err
    assert "no space left on the disk while" in err
    assert "Traceback" not in err
    assert weights(run) == before
    filler.unlink()
    finish(run, undisturbed)


def test_a_read_only_folder(small_disk, undisturbed):
    run = small_disk / "run"
    assert ended(start("train", *SMALL, "--max-steps", 10, "--out", run))[0] == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for arguments in (["--resume", run], [*SMALL, "--out", small_disk / "new"]):
        code, out, err = ended(start("train", *arguments))
        assert code == 2, out + err
        assert "Read-only file system while" in err
        assert err.count("\n") == 1
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    finish(run, undisturbed)

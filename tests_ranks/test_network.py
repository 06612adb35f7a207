"""Processes in network namespaces, as on machines of their own: no route, and a cable that is pulled in a gradient."""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPTIONS = ["--depth", "3", "--width", "16", "--batch-size", "64", "--epochs", "200", "--cosine-every", "0"]


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def machines():
    """Two network namespaces with a cable between them, and a third one without; their names."""
    names = [f"hzo{os.getpid()}{letter}" for letter in "abc"]
    if shutil.which("ip") is None:
        pytest.skip("needs ip (iproute2)")
    with ExitStack() as undo:
        try:
            for name in names:
                ip("netns", "add", name)
                undo.callback(subprocess.run, ["ip", "netns", "delete", name], check=False, timeout=20)
                ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for k, name in enumerate(names[:2]):
                ip("-n", name, "address", "add", f"10.77.0.{k + 1}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"may not make network namespaces ({error.stderr.strip()}); root may")
        yield names


@pytest.fixture
def start():
    """Start one of two processes of a run; all are ended after the test."""
    with ExitStack() as undo:

        def started(rank, *command, machine=None, address="127.0.0.1", port=29533, **environment):
            inside = [] if machine is None else ["ip", "netns", "exec", machine]
            paths = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
            of_rank = {
                "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none",
                "MASTER_ADDR": address, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
            }  # fmt: skip
            if machine is not None:
                of_rank["GLOO_SOCKET_IFNAME"] = "cable"
            process = subprocess.Popen(
                [*inside, sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=os.environ | of_rank | environment,
            )  # fmt: skip
            undo.callback(process.wait)
            undo.callback(process.kill)
            return process

        yield started


def ends(process, limit):
    """What a process has printed, once it is over."""
    said = process.communicate(timeout=limit)[0]
    return said, process.returncode


def train(out):
    return ["-m", "hzo_lab", "train", *OPTIONS, "--out", str(out)]


def test_another_port(start, tmp_path):
    """On one machine, over loopback."""
    ranks = [start(r, *train(tmp_path / "run"), port=29533 + r, HZO_CONNECT_SECONDS="3") for r in range(2)]
    for r, process in enumerate(ranks):
        said, status = ends(process, 90)
        assert status == 2
        assert f"the 2 processes of this run cannot reach each other at 127.0.0.1:{29533 + r} within 3 seconds" in said
    assert not (tmp_path / "run").exists()


def test_no_route(machines, start, tmp_path):
    where = {"address": "10.77.0.1", "HZO_CONNECT_SECONDS": "3"}
    ranks = [start(r, *train(tmp_path / "run"), machine=machines[2 * r], **where) for r in range(2)]
    for process in ranks:
        said, status = ends(process, 90)
        assert status == 2
        assert "the 2 processes of this run cannot reach each other at 10.77.0.1:29533 within 3 seconds" in said
    assert not (tmp_path / "run").exists()


def test_a_cable_that_is_pulled_in_a_gradient(machines, start):
    ranks = [start(r, str(HERE / "over_network.py"), machine=machines[r], address="10.77.0.1") for r in range(2)]
    said = ""
    while "step 2\n" not in said:
        line = ranks[0].stdout.readline()
        assert line, said
        said += line
    time.sleep(0.1)
    ip("-n", machines[0], "link", "set", "cable", "down")
    for process in ranks:
        rest, status = ends(process, 60)
        assert status == 3
        found = re.search(r"after ([\d.]+) s, everything as before: (\w+): (.*)", rest)
        assert found, rest
        assert float(found[1]) < 20
        assert found[2] == "True"
        assert found[3].startswith("another process was lost, hangs or cannot be reached")


def test_a_cable_that_is_pulled_in_a_training(machines, start, tmp_path):
    out = tmp_path / "run"
    where = {"address": "10.77.0.1", "HZO_WAIT_SECONDS": "4"}
    ranks = [start(r, *train(out), "--checkpoint-every", "5", machine=machines[r], **where) for r in range(2)]
    until = time.monotonic() + 90
    while not [*out.glob("checkpoints/step-*")]:
        assert time.monotonic() < until
        assert all(process.poll() is None for process in ranks), ranks[0].communicate()
        time.sleep(0.05)
    ip("-n", machines[0], "link", "set", "cable", "down")
    for process in ranks:
        rest, status = ends(process, 60)
        assert status == 2
        assert "another process was lost, hangs or cannot be reached" in rest

"""Black boxes on the workers of dask, Ray, loky and MPI: the same bits, killed workers, errors, calls that hang."""

import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
import torch.nn.functional as F
from loky import ProcessPoolExecutor
from torch import nn

import hzo
import parts
from distributed import Client
from hzo.errors import NonFiniteError, QueryError, QueryTimeoutError

X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5)


@pytest.fixture(scope="module")
def dask():
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        yield client.get_executor


@pytest.fixture(scope="module")
def on_ray():
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield lambda: hzo.ray_executor(2)
    ray.shutdown()


@pytest.fixture(scope="module")
def loky():
    return lambda: ProcessPoolExecutor(2)


@pytest.fixture(params=["dask", "on_ray", "loky"])
def make(request):
    return request.getfixturevalue(request.param)


def gradient(f, **options):
    x = X.clone().requires_grad_()
    box = hzo.blackbox(f, numpy=True, **options)
    box(x).sum().backward()
    if "executor" in options:
        box.close()
    return x.grad


def test_the_same_bits(make):
    assert torch.equal(gradient(parts.work, executor=make), gradient(parts.work))
    assert torch.equal(gradient(parts.work, executor=make, batched=1), gradient(parts.work, batched=1))


def test_a_worker_that_is_killed_loses_nothing(make, tmp_path):
    """In the middle of a backward pass: the bits of a serial run, and no query twice but those that it had."""
    found = gradient(partial(parts.dies_once, str(tmp_path)), executor=make, batched=1)
    assert torch.equal(found, gradient(parts.work, batched=1))
    assert (tmp_path / "dead").exists()


@pytest.mark.parametrize("name", ["dask", "loky"])  # Ray starts actors anew for longer than a test may take
def test_a_part_that_kills_every_worker(name, request):
    """An error in the end; weights and gradients are as before."""
    model = torch.nn.Linear(5, 5, dtype=torch.float64)
    box = hzo.blackbox(parts.kills, numpy=True, executor=request.getfixturevalue(name))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(QueryError, match=r"its worker was lost 4 times|it killed every worker that dask gave it to"):
        hzo.backward(torch.nn.Sequential(model, box), torch.sum, X)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))
    box.close()


def test_a_gradient_that_is_tried_again_asks_what_is_missing(make, tmp_path):
    """A box in a model: its forward pass and the queries before the error are answered already."""
    model = nn.Sequential(nn.Linear(5, 5).double(), hzo.blackbox(
        partial(parts.fails_once, str(tmp_path)), numpy=True, batched=1, executor=make
    ))  # fmt: skip

    def gradient():
        model.zero_grad()
        before = len([*tmp_path.iterdir()])
        hzo.backward(model, F.mse_loss, X, X)
        return model[0].weight.grad.clone(), len([*tmp_path.iterdir()]) - before

    gradient()
    expected, whole = gradient()
    assert whole == 4 + 40
    (tmp_path / "fail").touch()
    with pytest.raises(QueryError, match="once"):
        gradient()
    kept = len(model[1]._guard.pool.kept)
    time.sleep(2)  # what was under way, several calls in a message, is of the first try
    found, asked = gradient()
    assert torch.equal(found, expected)
    assert asked == whole - kept + min(8, kept) < 40  # eight of them are asked again, to see whether they still hold
    model[1].close()


def test_errors_of_the_part_are_its_own(make):
    with pytest.raises(
        QueryError, match=r"the black box wrong failed in a forward pass \(4 samples\): ValueError: mine"
    ):
        gradient(parts.wrong, executor=make)
    with pytest.raises(NonFiniteError, match="NaN"):
        gradient(parts.nan, executor=make)


@pytest.mark.parametrize("name", ["dask", "on_ray", "loky"])
def test_workers_need_no_torch(name, request):
    make = request.getfixturevalue(name)
    x = X.clone().requires_grad_()
    box = hzo.blackbox(parts.has_torch, numpy=True, executor=make)
    assert not box(x).any()
    box.close()


class TestThatDoesNotStart:
    """An error that says so within the limit, and no hang."""

    @pytest.fixture
    def limit(self, monkeypatch):
        monkeypatch.setenv("HZO_CONNECT_SECONDS", "3")

    @pytest.mark.usefixtures("on_ray", "limit")
    def test_actors_that_ask_for_what_is_not_there(self):
        with pytest.raises(QueryError, match="none of Ray's actors has answered for 3 seconds"):
            gradient(parts.work, executor=lambda: hzo.ray_executor(2, num_cpus=1000))
        with pytest.raises(QueryError, match="none of Ray's actors has answered for 3 seconds"):
            hzo.ray_executor(2, num_cpus=1000)

    @pytest.mark.usefixtures("on_ray")
    def test_actors_that_do_not_come_back(self):
        """They die in a call, and nothing starts them anew."""
        executor = hzo.ray_executor(1, max_restarts=0)
        with pytest.raises(QueryError, match="its worker was lost 4 times"):
            gradient(parts.kills, executor=executor)
        executor.shutdown()

    @pytest.mark.usefixtures("limit")
    def test_dask_without_workers(self):
        with (
            Client(n_workers=0, dashboard_address=None) as client,
            pytest.raises(QueryError, match="dask has had no worker for 3 seconds"),
        ):
            gradient(parts.work, executor=client)

    def test_dask_whose_workers_go(self, monkeypatch):
        monkeypatch.setattr("hzo.pools.dask_pool._LOOK", 0.5)
        with Client(n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
            threading.Timer(1.0, client.cluster.scale, (0,)).start()
            monkeypatch.setattr("hzo.pools.dask_pool.start_limit", lambda: 3.0)
            with pytest.raises(QueryError, match="dask has had no worker for 3 seconds"):
                gradient(parts.hangs, executor=client)

    def test_dask_that_nobody_can_reach(self):
        with pytest.raises(QueryError, match=r"its executor could not be started .*Timed out"):
            gradient(parts.work, executor=lambda: Client("tcp://127.0.0.1:9", timeout="1s"))


def test_calls_that_hang(make):  # after the others, whose calls would wait for what hangs in dask's workers
    with pytest.raises(QueryTimeoutError, match="no answer within 2 seconds"):
        gradient(parts.hangs, executor=make, timeout=2.0)


def test_mpi():
    here = Path(__file__).parent
    command = [shutil.which("mpiexec", path=Path(sys.executable).parent) or "mpiexec", "-n", "3", sys.executable]
    paths = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-m", "mpi4py.futures", str(here / "over_mpi.py")],
        check=False, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.stdout.strip() == "equal to the bit: True", done.stdout + done.stderr

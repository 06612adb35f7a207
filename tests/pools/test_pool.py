"""Pools: what is asked again and what is not, stragglers, answers that are kept, and programs in copies."""

import asyncio
import importlib.util
import os
import signal
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import InputError, QueryError, QueryTimeoutError
from hzo.pools import Pool
from hzo.pools.pool import _Pace, answers
from support.boxes import TOLERANCE
from support.oracles import normal

CALLS = [((k,), {}) for k in range(20)]


def square(k):
    return k * k


def raising(k):
    raise ConnectionError("the part's own")


def writes(x):
    return x.add_(1)


def exiting(k):
    sys.exit(3)


class AwkwardError(Exception):
    def __init__(self, one, two):
        super().__init__("awkward")


def awkward(k):
    raise AwkwardError(1, 2)


class Losing(Executor):
    """Runs calls at once, and loses every third one."""

    def __init__(self):
        self.asked = 0

    def submit(self, fn, /, *args, **kwargs):
        self.asked += 1
        future = Future()
        if self.asked % 3 == 0:
            future.set_exception(ConnectionError("gone"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


class TestRetries:
    def test_of_the_executor_and_not_of_the_part(self):
        pool = Pool(Losing())
        assert pool.ask(square, CALLS) == [k * k for k in range(20)]
        assert pool.lost == pool._executor.asked - 20 > 0
        executor = Losing()
        with pytest.raises(ConnectionError, match="the part's own"):
            Pool(executor).ask(raising, CALLS[:1])
        assert executor.asked == 1

    @pytest.mark.parametrize("make", [ThreadPoolExecutor, ProcessPoolExecutor])
    def test_the_part_in_a_worker(self, make):
        """Its error comes with the traceback that it had there; an exception that cannot be sent, and sys.exit, too."""
        with make(1) as executor:
            with pytest.raises(ConnectionError) as caught:
                Pool(executor).ask(raising, CALLS[:1])
            assert "in raising" in str(caught.value.__cause__)
            with pytest.raises(SystemExit):
                Pool(executor).ask(exiting, CALLS[:1])
            with pytest.raises(RuntimeError, match="AwkwardError: awkward"):
                Pool(executor).ask(awkward, CALLS[:1])
            assert Pool(executor).ask(square, CALLS) == [k * k for k in range(20)]

    def test_tensors_are_sent_and_not_shared(self):
        """PyTorch hands other processes the place of a tensor in memory: what a part writes there is its own affair."""
        x = torch.zeros(3)
        with ProcessPoolExecutor(1) as executor:
            assert Pool(executor).ask(writes, [((x,), {})])[0].tolist() == [1.0, 1.0, 1.0]
        assert not x.any()
        assert not x.is_shared()

    def test_what_cannot_be_sent(self):
        lock = Lock()
        with ProcessPoolExecutor(1) as executor, pytest.raises(QueryError, match="cannot be sent to a worker"):
            Pool(executor).ask(lambda k: (k, lock), CALLS[:1])

    def test_code_is_sent_where_cloudpickle_is_installed(self):
        pytest.importorskip("cloudpickle")
        offset = 3
        with ProcessPoolExecutor(1) as executor:
            found = Pool(executor).ask(lambda k: k + offset, CALLS)
        assert found == [args[0] + 3 for args, _ in CALLS]

    def test_code_is_not_sent_without_it(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with ProcessPoolExecutor(1) as executor, pytest.raises(QueryError, match="install cloudpickle"):
            Pool(executor).ask(lambda k: k, CALLS[:1])

    def test_an_executor_that_does_not_start(self):
        def refuses():
            raise OSError("no such cluster")

        x = normal(2, 2).requires_grad_()
        with pytest.raises(QueryError, match=r"its executor could not be started \(OSError: no such cluster\)"):
            hzo.blackbox(np.sin, numpy=True, executor=refuses)(x)

    def test_answers_are_kept_over_an_error(self):
        """The second try asks what the first one was not told, and no more."""
        executor, asked = ThreadPoolExecutor(1), []

        class Part:
            fails = True

            def __call__(self, k):
                asked.append(k)
                if k == 10 and Part.fails:
                    raise ValueError("once")
                return k * k

        # A class of this function cannot be written down: it is asked again.
        with executor:
            pool = Pool(executor)
            with pytest.raises(ValueError, match="once"):
                pool.ask(Part(), CALLS)
            Part.fails = False
            assert pool.ask(Part(), CALLS) == [k * k for k in range(20)]
            assert asked.count(3) == 2
            asked.clear()
            Part.fails = True
            pool = Pool(executor)
            with pytest.raises(ValueError, match="seven"):
                pool.ask(fails_at_seven, CALLS)
            failing.clear()
            counted.clear()
            assert pool.ask(fails_at_seven, CALLS) == [k * k for k in range(20)]
            assert 0 < len(counted) < 20
            assert 7 in counted
            failing.append(7)
            counted.clear()
            assert pool.ask(square, CALLS) == [k * k for k in range(20)]  # another part has answers of its own


failing = [7]
counted = []


def fails_at_seven(k):
    counted.append(k)
    if k in failing:
        time.sleep(0.05)
        raise ValueError("seven")
    return k * k


class Buffer:
    """A part that writes into what it is given, and returns the same array each time."""

    def __init__(self):
        self.buffer = np.zeros(1)

    def __call__(self, z):
        z += 1
        self.buffer[:] = z
        return self.buffer


class Uncopied:
    """A result that can be sent, and not copied."""

    def __deepcopy__(self, memo):
        raise TypeError("there is one of me")


def uncopied(k):
    return Uncopied()


def counted_in(folder, k):
    (folder / f"{k} {time.monotonic_ns()}").touch()
    if k == 15 and not (folder / "dead").exists():
        (folder / "dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return k * k


@pytest.fixture
def together(monkeypatch):
    """Calls travel together whatever a message costs; yields how many of them went out in each."""
    sizes, submit = [], Pool._submit

    def noting(self, asked, messages, done):
        sizes.extend(map(len, messages))
        submit(self, asked, messages, done)

    monkeypatch.setattr(_Pace, "busy", 1e-12)
    monkeypatch.setattr(_Pace, "enough", 2)
    monkeypatch.setattr(Pool, "_submit", noting)
    monkeypatch.setattr("hzo.pools.pool._AT_FIRST", 2)
    return sizes


class TestShortCallsTravelTogether:
    def test_how_many(self):
        """So many that messages take a quarter of this process's time; none where that is so anyway, nor before it is
        known; less towards the end; not more than a second's."""
        pace = _Pace()
        assert pace.together(1000, 16) == 1
        pace.call, pace.message = 0.05, 0.003  # 16 workers end 320 calls a second, at 3 ms each: 96 % of the time
        assert pace.together(1000, 16) == 4
        assert [pace.together(waiting, 16) for waiting in (128, 127, 64, 17, 16, 1)] == [4, 3, 2, 2, 1, 1]
        assert pace.together(1000, 4) == 1
        pace.call = 0.4
        assert pace.together(10**6, 1000) == 2
        pace.apart = True
        assert pace.together(10**6, 1000) == 1

    def test_the_same_results(self, together):
        calls = [((k,), {}) for k in range(200)]
        with ProcessPoolExecutor(2) as executor:
            pool = Pool(executor)
            for _ in range(2):
                assert pool.ask(square, calls) == [k * k for k in range(200)]
        assert max(together) > 8
        assert together[-1] == 1, "workers end together"
        with ThreadPoolExecutor(2) as executor:
            together.clear()
            assert Pool(executor).ask(square, calls) == [k * k for k in range(200)]
            assert set(together) == {1}, "nothing is sent to a thread"

    def test_each_by_itself(self):
        """What a part writes into its arguments and results is that call's own affair."""
        one, two = np.zeros(1), np.ones(1)
        found = answers(Buffer(), [((z,), {}) for z in (one, two, one)])
        assert [float(result[0]) for result, *_ in found] == [1, 2, 1]
        assert (one, two) == (0, 1)

    def test_what_cannot_be_copied_goes_alone(self, together):
        """Given or returned: the first call alone is answered, and the others are asked again."""
        assert len(answers(uncopied, [((1,), {})] * 3)) == 1
        assert len(answers(square, [((2,), {}), ((Uncopied(),), {})])) == 1

        class Sending(ProcessPoolExecutor):
            """Sends several calls as a list, as executors do that send code."""

            def submit(self, fn, /, calls):
                return super().submit(answers, uncopied, [((1,), {})] * len(calls))

        with Sending(2) as executor:
            pool = Pool(executor)
            assert [type(found) for found in pool.ask(uncopied, CALLS * 5)] == [Uncopied] * 100
        assert pool._pace.apart
        assert max(together) > 1
        assert together[-1] == 1

    def test_an_error_in_the_middle(self, together):
        """Later calls of the message do not run, and earlier answers are kept."""
        failing[:] = [3]
        counted.clear()
        found = answers(fails_at_seven, CALLS[:6])
        failing[:] = [7]
        assert [one[0] for one in found] == [0, 1, 4, None]
        assert counted == [0, 1, 2, 3]
        with ProcessPoolExecutor(2) as executor:
            pool = Pool(executor)
            pool.ask(square, CALLS)
            with pytest.raises(ValueError, match="seven"):
                pool.ask(fails_at_seven, CALLS)
            assert max(together) > 1

    def test_a_worker_that_is_killed(self, together, tmp_path):
        """Its calls are asked again, one by one: one of them may kill workers."""
        (tmp_path / "dead").touch()
        calls = [((k,), {}) for k in range(60)]
        pool = Pool(lambda: ProcessPoolExecutor(2))
        assert pool.ask(partial(counted_in, tmp_path), calls) == [k * k for k in range(60)]
        (tmp_path / "dead").unlink()
        together.clear()
        assert pool.ask(partial(counted_in, tmp_path), calls) == [k * k for k in range(60)]
        pool.close()
        assert (tmp_path / "dead").exists()
        assert max(together) > 1
        assert together[-pool.lost :] == [1] * pool.lost

    @pytest.mark.parametrize("options", [{"hedge": 1e6}, {"timeout": 60.0}], ids=str)
    def test_not_where_each_is_timed(self, together, options):
        with ProcessPoolExecutor(2) as executor:
            pool = Pool(executor, hedge=options.get("hedge"))
            for _ in range(2):
                assert pool.ask(square, CALLS, options.get("timeout")) == [k * k for k in range(20)]
        assert set(together) == {1}


def one_is_slow(path, k):
    if k == 3 and not os.path.exists(path):
        with open(path, "w") as file:
            file.write("slow")
        time.sleep(3)
    time.sleep(0.01)
    return k * k


def test_stragglers_are_asked_twice(tmp_path):
    with ProcessPoolExecutor(2) as executor:
        pool, began = Pool(executor, hedge=20), time.monotonic()
        assert pool.ask(partial(one_is_slow, str(tmp_path / "slow")), CALLS) == [k * k for k in range(20)]
        assert pool.hedged >= 1
        assert time.monotonic() - began < 2.5


def test_a_limit_where_the_executor_does_not_tell():
    """An executor that says of no call that it runs: the limit counts from the last answer."""

    class Silent(ThreadPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            silent, inner = Future(), super().submit(fn, *args, **kwargs)
            inner.add_done_callback(lambda done: silent.set_result(done.result()))
            return silent

    with Silent(1) as executor, pytest.raises(QueryTimeoutError, match="no answer within"):
        Pool(executor).ask(lambda k: time.sleep(1.0), CALLS[:1], timeout=0.2)


def test_both_ways_go_out_together():
    """Up and down queries are one list of calls: workers are idle once, not twice."""
    sizes = []

    class Noting(ThreadPoolExecutor):
        pass

    with Noting(2) as executor:
        box = hzo.blackbox(np.sin, numpy=True, executor=executor)
        pool = box._guard.pool
        ask = pool.ask
        pool.ask = lambda f, calls, *rest, **named: sizes.append(len(calls)) or ask(f, calls, *rest, **named)
        x = normal(3, 5).requires_grad_()
        box(x).sum().backward()
    assert sizes[-1] == 10
    assert torch.allclose(x.grad, x.detach().cos(), rtol=TOLERANCE)


@pytest.fixture
def sent(monkeypatch):
    """How many calls each list has that a pool is asked for."""
    found, ask = [], Pool.ask

    def noted(pool, f, calls, *rest, **named):
        found.append(len(calls))
        return ask(pool, f, calls, *rest, **named)

    monkeypatch.setattr(Pool, "ask", noted)
    return found


class TestInAModel:
    """A box with workers that is one operation of a model under ``hzo.backward``."""

    x, y = normal(4, 6), normal(4, 6)

    @staticmethod
    def gradient(executor=None, sent=None, plan=None, **options):
        torch.manual_seed(0)
        layer = nn.Linear(6, 6).double()
        model = nn.Sequential(layer, hzo.blackbox(np.tanh, numpy=True, executor=executor, **options))
        for _ in range(2):  # the first time it is traced
            made = None if plan is None else hzo.plan(hzo.trace(model, TestInAModel.x), **plan)
            if sent is not None:
                sent.clear()
            layer.zero_grad()
            hzo.backward(model, F.mse_loss, TestInAModel.x, TestInAModel.y, plan=made)
        return layer.weight.grad

    @pytest.mark.parametrize(("batched", "calls"), [(True, [1, 12]), (False, [1, 12]), (1, [4, 48]), (3, [2, 16])])
    def test_both_ways_go_out_together(self, sent, batched, calls):
        """One list of calls for all directions, both ways, each of as many samples as a part takes."""
        with ThreadPoolExecutor(2) as executor:
            found = self.gradient(executor, sent, batched=batched)
        assert sent == calls
        assert torch.equal(found, self.gradient(batched=batched))

    def test_forward_differences_have_one_way(self, sent):
        with ThreadPoolExecutor(2) as executor:
            found = self.gradient(executor, sent, plan={"scheme": "forward"})
        assert sent == [1, 6]
        assert torch.equal(found, self.gradient(plan={"scheme": "forward"}))

    def test_repeats_go_out_with_them(self, sent):
        plan = {"noise": 0.3, "target_cosine": 0.99}
        with ThreadPoolExecutor(2) as executor:
            self.gradient(executor, sent, plan=plan)
        assert sent[0] == 1
        assert len(sent) == 2
        assert sent[1] % 12 == 0
        assert sent[1] > 12

    def test_several_lists_where_memory_is_short(self, sent):
        """Both ways at once are of half as many directions: no more rows than one way has without workers."""
        rows = []

        def noting(z):
            rows.append(len(z))
            return np.tanh(z)

        with ThreadPoolExecutor(2) as executor:
            for part, options in ((noting, {"state": None}), (np.tanh, {"executor": executor})):
                model = nn.Sequential(nn.Linear(6, 6).double(), hzo.blackbox(part, numpy=True, **options))
                hzo.backward(model, F.mse_loss, self.x, self.y, memory=8000)
        queries = sent[-sum(count > 1 for count in sent) :]
        assert sum(queries) == 12
        assert 8 < 4 * max(queries) <= max(rows) < 24

    def test_samples_are_divided_among_workers_of_its_own(self, sent):
        """Three workers: four samples of a forward pass are two calls of two, and twelve calls need no division."""
        box = hzo.blackbox(np.tanh, numpy=True, workers=3)
        model = nn.Sequential(nn.Linear(6, 6).double(), box)
        for expected in (1, 2):
            sent.clear()
            hzo.backward(model, F.mse_loss, self.x, self.y)
            if expected == 2:
                assert sent == [2, 12]
        box.close()


def test_random_numbers_of_this_process_are_not_those_of_a_worker():
    """What else draws here (an executor's own threads) must not make calls wait for each other."""

    class Drawing(ProcessPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            np.random.rand()
            return super().submit(fn, *args, **kwargs)

    with Drawing(2) as executor:
        box = hzo.blackbox(np.sin, numpy=True, executor=executor)
        x = normal(3, 5).requires_grad_()
        box(x).sum().backward()
    assert box._guard.pool.elsewhere
    assert torch.allclose(x.grad, x.detach().cos(), rtol=TOLERANCE)


PROGRAM = """
import sys, time
from types import SimpleNamespace as Pipe
from numpy.lib.format import read_array, write_array
import numpy
source, sink = Pipe(read=sys.stdin.buffer.read), Pipe(write=sys.stdout.buffer.write)
while True:
    z = read_array(source)
    time.sleep(float(sys.argv[1]))
    write_array(sink, numpy.sin(z) * z.sum(1, keepdims=True))
    sys.stdout.buffer.flush()
"""


class TestCopiesOfAProgram:
    def test_the_same_bits(self):
        x = normal(7, 3)
        found = []
        for copies in (1, 3):
            with hzo.simulator([sys.executable, "-c", PROGRAM, "0"], copies=copies) as program:
                z = x.clone().requires_grad_()
                hzo.blackbox(program, numpy=True)(z).sum().backward()
                found.append(z.grad)
        assert torch.equal(*found)

    def test_one_that_is_killed_loses_nothing(self):
        with hzo.simulator([sys.executable, "-c", PROGRAM, "0.5"], copies=2) as program:
            z = normal(4, 3).numpy()
            expected = program(z)
            threading.Timer(0.25, os.kill, (program.others[0]._process.pid, signal.SIGKILL)).start()
            assert (program(z) == expected).all()

    def test_options(self):
        with pytest.raises(InputError, match="copies"):
            hzo.simulator(["true"], copies=0)
        with pytest.raises(InputError, match="hedge"):
            hzo.blackbox(np.sin, executor=ThreadPoolExecutor, hedge=-1.0)


def test_dask_gives_up():
    """After workers that it has lost itself: asking again would end as many more."""

    class KilledWorker(Exception):  # noqa: N818  # dask's
        pass

    class Dask(Losing):
        def submit(self, fn, /, *args, **kwargs):
            self.asked += 1
            future = Future()
            future.set_exception(KilledWorker("4 workers died"))
            return future

    executor = Dask()
    with pytest.raises(
        QueryError, match=r"it killed every worker that dask gave it to \(KilledWorker: 4 workers died\)"
    ):
        Pool(executor).ask(square, CALLS[:1])
    assert executor.asked == 1


class DaskFuture(Future):
    """As dask's: it has a status, and its callback is told as threads' are."""

    @property
    def status(self):
        if self.cancelled():
            return "cancelled"
        if not self.done():
            return "pending"
        return "error" if self.exception() else "finished"


class Client:
    """As dask's: it runs what it is told in threads, and notes what that is."""

    __module__ = "distributed.client"
    status = "running"

    def __init__(self, workers=2):
        self.threads, self.workers = ThreadPoolExecutor(2), workers
        self.graphs, self.options, self.gathered = [], [], []

    def submit(self, fn, *args, **options):
        return self.map(fn, *[[arg] for arg in args], **options)[0]

    def map(self, fn, *iterables, **options):
        rows = list(zip(*iterables, strict=True))
        self.graphs.append(len(rows))
        self.options.append(options)
        futures = [DaskFuture() for _ in rows]
        for future, row in zip(futures, rows, strict=True):
            self.threads.submit(self._run, future, fn, row)
        return futures

    @staticmethod
    def _run(future, fn, row):
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(fn(*[arg.result() if isinstance(arg, Future) else arg for arg in row]))
        except Exception as error:
            future.set_exception(error)

    def sync(self, function, callback_timeout):
        return asyncio.run(asyncio.wait_for(function(), callback_timeout))

    async def gather(self, futures, asynchronous):
        self.gathered.append(len(futures))
        return [future.result() for future in futures]

    def nthreads(self):
        return dict.fromkeys(range(self.workers), 1)

    def wait_for_workers(self, count, timeout):
        if self.workers < count:
            time.sleep(timeout)
            raise TimeoutError

    def close(self):
        self.status = "closed"

    def _shutdown(self):
        """A method of dask's client; of its executor it is a flag."""


class ClientExecutor:
    __module__ = "distributed.cfexecutor"  # as dask's

    def __init__(self):
        self._client, self._kwargs, self._shutdown = Client(), {"workers": ["a"]}, False

    def submit(self):
        raise AssertionError("calls go to the client")

    def shutdown(self, wait=True):
        self._shutdown = True


@pytest.fixture
def dask():
    """What stands for dask's executor where dask is not installed."""
    pytest.importorskip("cloudpickle")
    return ClientExecutor()


class TestDask:
    def test_is_told_of_all_calls_at_once(self, dask):
        """One graph for the function, and one for as many calls as may wait; none is pure, or equal questions had one
        answer."""
        pool = Pool(dask)
        assert pool.ask(square, CALLS) == [k * k for k in range(20)]
        assert pool.ask(square, CALLS) == [k * k for k in range(20)]
        assert dask._client.graphs == [1, 20, 20], "the function is kept"
        assert pool.ask(abs, [((-1,), {}), ((-1,), {})]) == [1, 1]
        assert dask._client.graphs == [1, 20, 20, 1, 2], "another function is not that one"
        assert all(options == {"pure": False, "workers": ["a"]} for options in dask._client.options)

    def test_is_given_more_when_half_of_it_is_done(self, dask, monkeypatch):
        monkeypatch.setattr("hzo.pools.pool._AT_FIRST", 8)
        monkeypatch.setattr("hzo.pools.pool._AHEAD", 8)
        calls = [((k,), {}) for k in range(100)]
        assert Pool(dask).ask(square, calls) == [k * k for k in range(100)]
        assert all(count >= 4 for count in dask._client.graphs[1:-1])
        assert sum(dask._client.graphs[1:]) == 100

    def test_an_executor_that_was_shut_down(self, dask):
        dask._shutdown = True
        with pytest.raises(QueryError, match=r"its executor is broken .*cannot schedule new futures after shutdown"):
            Pool(dask).ask(square, CALLS)
        made = []

        def make():
            made.append(ClientExecutor())
            made[-1]._shutdown = len(made) == 1
            return made[-1]

        assert Pool(make).ask(square, CALLS) == [k * k for k in range(20)]
        assert len(made) == 2
        assert made[1]._client.graphs[0] == 1, "the new one gets the function, too"

    def test_a_client_is_an_executor(self):
        pytest.importorskip("cloudpickle")
        client = Client()
        assert Pool(client).ask(square, CALLS) == [k * k for k in range(20)]
        assert sum(client.gathered) == 20
        pool = Pool(lambda: client)
        assert pool.ask(itself, [((3,), {})]) == [3]
        pool.close()
        assert client.status == "closed"
        with pytest.raises(QueryError, match="cannot schedule new futures after shutdown"):
            Pool(client).ask(square, CALLS)

    def test_no_worker_starts(self, dask, monkeypatch):
        """An error within the limit, whoever made the executor; not four times the limit."""
        monkeypatch.setenv("HZO_CONNECT_SECONDS", "0.2")
        for executor in (dask, lambda: dask):
            dask._client.workers, began = 0, time.monotonic()
            with pytest.raises(QueryError, match=r"dask has had no worker for 0\.2 seconds"):
                Pool(executor).ask(square, CALLS)
            assert time.monotonic() - began < 2
            assert not dask._client.graphs, "and it is asked nothing"
        monkeypatch.setenv("HZO_CONNECT_SECONDS", "soon")
        with pytest.raises(InputError, match="a number of seconds in HZO_CONNECT_SECONDS"):
            Pool(dask).ask(square, CALLS)

    def test_all_workers_are_gone(self, dask, monkeypatch):
        """In the middle, and none comes back."""
        monkeypatch.setenv("HZO_CONNECT_SECONDS", "0.2")
        monkeypatch.setattr("hzo.pools.dask_pool._LOOK", 0.05)
        pool, gone = Pool(dask), threading.Event()

        def part(k):
            dask._client.workers = 0
            gone.wait(5)
            return k

        with pytest.raises(QueryError, match=r"dask has had no worker for 0\.2 seconds"):
            pool.ask(Unsent(part), CALLS)
        gone.set()
        dask._client.workers = 2
        assert pool.ask(square, CALLS) == [k * k for k in range(20)], "they are back"

    def test_a_result_that_is_lost_is_waited_for(self, dask):
        """Its worker ended before it was fetched: dask computes it again."""
        client, gather = dask._client, dask._client.gather

        async def losing(futures, asynchronous):
            client.gather = gather
            raise KeyError("lost")

        client.gather = losing
        assert Pool(dask).ask(square, CALLS) == [k * k for k in range(20)]
        assert client.gather is gather

    def test_what_cannot_be_sent(self, dask):
        lock = Lock()
        with pytest.raises(QueryError, match="cannot be sent to a worker"):
            Pool(dask).ask(lambda k: (k, lock), CALLS)
        with pytest.raises(QueryError, match="cannot be sent to a worker"):
            Pool(dask).ask(square, [((lock,), {})])
        with pytest.raises(QueryError, match="cannot be sent to a worker"):
            Pool(dask).ask(returns_a_lock, CALLS)

    def test_the_part_is_a_new_one_for_each_call(self, dask):
        """As with processes: what it keeps is not seen by other calls, which other threads of a worker may run."""
        assert Pool(dask).ask(Counting(), CALLS) == [1] * 20


def itself(k):
    return k


class Unsent:
    """A function that is the same object wherever it is called."""

    functions: ClassVar[list] = []

    def __init__(self, function):
        self.functions.append(function)

    def __call__(self, k):
        return self.functions[-1](k)


class Counting:
    count = 0

    def __call__(self, k):
        self.count += 1
        return self.count


def returns_a_lock(k):
    return Lock()

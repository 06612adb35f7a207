"""Actors of Ray as an executor, Ray installed or not: such that do not start, and such that do not come back."""

import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

import hzo
from hzo.errors import QueryError
from hzo.pools import Pool


class RayActorError(Exception):
    """As Ray's: an actor has died."""


class Reference:
    """What Ray gives at once for a call."""

    def __init__(self, inner):
        self.inner = inner

    def future(self):
        return self.inner


class Method:
    def __init__(self, run):
        self.run = run

    def remote(self, *args):
        inner = Future()
        self.run(inner, *args)
        return Reference(inner)


class Ray:
    """Actors that run what they are asked at once, in this process; ``up`` says whether they answer."""

    cloudpickle = SimpleNamespace(dumps=lambda function: repr(function).encode())

    def __init__(self):
        self.up, self.dies, self.broken, self.asleep, self.killed = True, False, None, [], 0
        self.connected, self.told, self.unreachable = False, [], None

    def is_initialized(self):
        return self.connected

    def init(self, address=None, **options):
        self.told.append((address, options))
        if self.unreachable is not None:
            self.unreachable.wait(5)
            raise ConnectionError("nobody is there\nat some length")
        self.connected = True

    def method(self, **_):
        return lambda function: function

    def remote(self, **_):
        return lambda cls: SimpleNamespace(remote=lambda: self._actor(cls()))

    def _actor(self, worker):
        def ask(inner, *args):
            if self.dies:
                self.up = False
                inner.set_exception(RayActorError("it was killed"))
            else:
                inner.set_result(worker.ask(*args))

        def awake(inner):
            if self.broken is not None:
                inner.set_exception(self.broken)
            elif self.up:
                inner.set_result(None)
            else:
                self.asleep.append(inner)

        return SimpleNamespace(ask=Method(ask), awake=Method(awake))

    def come_back(self):
        self.up, self.dies = True, False
        asleep, self.asleep = self.asleep, []
        for inner in asleep:
            inner.set_result(None)

    def wait(self, asked, num_returns, timeout):
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if found := [one for one in asked if one.inner.done()]:
                return found[:num_returns], []
            time.sleep(0.01)
        return [], asked

    def put(self, what):
        return what

    def get(self, what):
        return what.inner.result() if isinstance(what, Reference) else what

    def kill(self, _):
        self.killed += 1


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setenv("HZO_CONNECT_SECONDS", "0.2")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = Ray()
    monkeypatch.setitem(sys.modules, "ray", found)
    return found


CALLS = [((k,), {}) for k in range(20)]


def square(k):
    return k * k


def test_answers(ray):
    assert Pool(hzo.ray_executor(2)).ask(square, CALLS) == [k * k for k in range(20)]


def test_a_cluster(ray, monkeypatch):
    """Given, or named by the environment; one that is connected already stays."""
    hzo.ray_executor(1)
    hzo.ray_executor(1, address="there:6379")
    assert ray.told == [(None, {"include_dashboard": False, "log_to_driver": False})]
    for address in ("there:6379", None):
        ray.connected = False
        hzo.ray_executor(1, address=address)
        assert ray.told[-1] == ("there:6379", {"log_to_driver": False})
        monkeypatch.setenv("RAY_ADDRESS", "there:6379")


def test_a_cluster_that_nobody_can_reach(ray):
    """An error within the limit, however long Ray tries; and Ray's own where that comes before."""
    ray.unreachable = threading.Event()
    with pytest.raises(QueryError, match=r"^Ray at there:6379 has not answered for 0\.2 seconds"):
        hzo.ray_executor(2, address="there:6379")
    ray.unreachable.set()
    with pytest.raises(QueryError, match=r"^Ray at there:6379 cannot be reached \(ConnectionError: nobody is there\)$"):
        hzo.ray_executor(2, address="there:6379")


def test_actors_that_do_not_start(ray):
    """They are ended, and whoever asks is told what Ray says, or that it says nothing."""
    ray.up = False
    with pytest.raises(QueryError, match=r"none of Ray's actors has answered for 0\.2 seconds"):
        hzo.ray_executor(2)
    with pytest.raises(QueryError, match=r"^none of Ray's actors has answered"):
        Pool(lambda: hzo.ray_executor(2)).ask(square, CALLS)
    ray.broken = RuntimeError("the environment cannot be made\nat some length")
    with pytest.raises(QueryError, match=r"Ray's actors do not start \(RuntimeError: the environment cannot be made\)"):
        hzo.ray_executor(2)
    assert ray.killed == 6


def test_actors_that_do_not_come_back(ray):
    """All have died: an error after the limit, for all calls that wait."""
    executor = hzo.ray_executor(2)
    ray.dies, began = True, time.monotonic()
    with pytest.raises(QueryError, match=r"none of Ray's actors has answered for 0\.2 seconds"):
        Pool(executor).ask(square, CALLS)
    assert time.monotonic() - began < 2
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(square, 1)


def test_actors_that_come_back(ray):
    """Within the limit: nothing is lost, and the limit counts anew."""
    executor = hzo.ray_executor(2)
    ray.dies = True
    threading.Timer(0.1, ray.come_back).start()
    assert Pool(executor).ask(square, CALLS) == [k * k for k in range(20)]
    time.sleep(0.3)
    assert Pool(executor).ask(square, CALLS) == [k * k for k in range(20)]

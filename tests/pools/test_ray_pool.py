"""Actors of Ray as an executor, Ray installed or not: such that do not start, and such that do not come back."""

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from hzo.errors import QueryError
from hzo.pools import Pool
from hzo.pools.ray_pool import _RayExecutor


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

    def is_initialized(self):
        return True

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
    return Ray()


CALLS = [((k,), {}) for k in range(20)]


def square(k):
    return k * k


def test_answers(ray):
    assert Pool(_RayExecutor(ray, 2, {})).ask(square, CALLS) == [k * k for k in range(20)]


def test_actors_that_do_not_start(ray):
    """They are ended, and whoever asks is told what Ray says, or that it says nothing."""
    ray.up = False
    with pytest.raises(QueryError, match=r"none of Ray's actors has answered for 0\.2 seconds"):
        _RayExecutor(ray, 2, {})
    with pytest.raises(QueryError, match=r"^none of Ray's actors has answered"):
        Pool(lambda: _RayExecutor(ray, 2, {})).ask(square, CALLS)
    ray.broken = RuntimeError("the environment cannot be made\nat some length")
    with pytest.raises(QueryError, match=r"Ray's actors do not start \(the environment cannot be made\)"):
        _RayExecutor(ray, 2, {})
    assert ray.killed == 6


def test_actors_that_do_not_come_back(ray):
    """All have died: an error after the limit, for all calls that wait."""
    executor = _RayExecutor(ray, 2, {})
    ray.dies, began = True, time.monotonic()
    with pytest.raises(QueryError, match=r"none of Ray's actors has answered for 0\.2 seconds"):
        Pool(executor).ask(square, CALLS)
    assert time.monotonic() - began < 2
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(square, 1)


def test_actors_that_come_back(ray):
    """Within the limit: nothing is lost, and the limit counts anew."""
    executor = _RayExecutor(ray, 2, {})
    ray.dies = True
    threading.Timer(0.1, ray.come_back).start()
    assert Pool(executor).ask(square, CALLS) == [k * k for k in range(20)]
    time.sleep(0.3)
    assert Pool(executor).ask(square, CALLS) == [k * k for k in range(20)]

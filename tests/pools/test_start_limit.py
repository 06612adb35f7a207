"""Workers that a function starts: within a time limit, whatever it waits for."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest

from hzo.errors import QueryError
from hzo.pools import Pool, start_limit

CALLS = [((k,), {}) for k in range(5)]
ANSWERS = [0, 1, 4, 9, 16]
setting = ContextVar("setting", default="outside")


def square(k):
    return k * k


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setenv("HZO_CONNECT_SECONDS", "0.4")
    monkeypatch.setattr(start_limit, "_GRACE", 0.1)


def test_a_start_that_hangs():
    """An error within the limit; what comes later is shut down, and the next try may start."""
    goes_on, made = threading.Event(), []

    class Late(ThreadPoolExecutor):
        ended = threading.Event()

        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait, cancel_futures=cancel_futures)
            Late.ended.set()

    def make():
        made.append(1)
        if len(made) == 1:
            goes_on.wait(20)
        return Late(1)

    pool, began = Pool(make), time.monotonic()
    with pytest.raises(QueryError, match=r"has not started within 0\.4 seconds; .*HZO_CONNECT_SECONDS allows more"):
        pool.ask(square, CALLS)
    assert 0.4 < time.monotonic() - began < 3
    goes_on.set()
    assert Late.ended.wait(5)
    assert pool.ask(square, CALLS) == ANSWERS
    pool.close()


def test_steps_with_a_limit_of_their_own():
    """Ray's connection and its actors, say: each may take the whole limit, and says more where it does not come."""

    def make():
        for _ in range(3):
            start_limit.start_limit()
            time.sleep(0.3)
        return ThreadPoolExecutor(1)

    pool = Pool(make)
    assert pool.ask(square, CALLS) == ANSWERS
    pool.close()


def test_a_library_that_wants_the_main_thread():
    def make():
        signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGUSR1))
        return ThreadPoolExecutor(1)

    pool = Pool(make)
    assert pool.ask(square, CALLS) == ANSWERS
    pool.close()


def test_the_function_sees_what_it_would_here():
    seen = []

    def make():
        seen.append(setting.get())
        return ThreadPoolExecutor(1)

    token = setting.set("inside")
    pool = Pool(make)
    assert pool.ask(square, CALLS) == ANSWERS
    setting.reset(token)
    pool.close()
    assert seen == ["inside"]


@pytest.mark.parametrize("error", [OSError("no such cluster"), ValueError("no licence")])
def test_its_own_error(error):
    def make():
        raise error

    with pytest.raises(QueryError, match=r"could not be started \(\w+: no ") as caught:
        Pool(make).ask(square, CALLS)
    assert caught.value.__cause__ is error

"""Calls of a part in other threads, processes or machines: any ``concurrent.futures.Executor``.

The part runs several times at once and in whatever order; results come back in the order of the calls. A worker that is
lost (its process was killed, its connection broke) loses nothing: the call is asked again, a broken executor is
replaced where a function that makes one was given. What the part itself raises is the part's, and is not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import suppress
from time import monotonic
from typing import Any

from hzo.errors import InputError, QueryError, QueryTimeoutError

LOST = (BrokenExecutor, CancelledError, ConnectionError, EOFError)
"""What an executor raises when a worker is gone."""

_AHEAD = 256  # calls that wait in the executor at a time


class Pool:
    """An executor, and what becomes of calls that it loses.

    Args:
        executor: an ``Executor`` (whatever has ``submit``), or a function that makes one.
        retries: how often a call is asked again after its worker was lost.
    """

    def __init__(self, executor: Any, retries: int = 3) -> None:
        self.make: Callable[[], Any] | None = None
        if hasattr(executor, "submit") and not isinstance(executor, type):
            self._executor: Any = executor
        elif callable(executor):
            self.make, self._executor = executor, None
        else:
            raise InputError(
                "expected executor to be a concurrent.futures.Executor, or a function that makes one "
                f"(lambda: ProcessPoolExecutor(8)), got a {type(executor).__name__}"
            )
        self.retries = retries
        self.lost = 0  # calls that were asked again

    def ask(
        self, f: Callable[..., Any], calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]], timeout: float | None
    ) -> list[Any]:
        """The results of ``f`` for these calls, in order.

        Args:
            timeout: seconds for one call from when it runs, as far as the executor tells (``Future.running``).

        Raises:
            QueryTimeoutError: a call took longer. QueryError: its worker was lost too often, or the executor is broken
            and cannot be made anew. What ``f`` raises passes through.
        """
        results: list[Any] = [None] * len(calls)
        tries = [0] * len(calls)
        waiting = list(range(len(calls)))[::-1]
        running: dict[Future[Any], int] = {}
        began: dict[Future[Any], float] = {}
        try:
            while waiting or running:
                while waiting and len(running) < _AHEAD:
                    k = waiting.pop()
                    future = self._submit(f, calls[k], tries, k)
                    running[future] = k
                done, _ = wait(list(running), timeout=None if timeout is None else 0.05, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=lambda one: running[one]):
                    k = running.pop(future)
                    began.pop(future, None)
                    try:
                        results[k] = future.result()
                    except LOST as error:
                        self._again(tries, k, error)
                        waiting.append(k)
                if timeout is not None:
                    self._check_time(running, began, timeout)
        finally:
            for future in running:
                future.cancel()
        return results

    def _submit(
        self, f: Callable[..., Any], call: tuple[tuple[Any, ...], Mapping[str, Any]], tries: list[int], k: int
    ) -> Future[Any]:
        while True:
            if self._executor is None:
                assert self.make is not None
                self._executor = self.make()
            try:
                future: Future[Any] = self._executor.submit(f, *call[0], **call[1])
                return future
            except (*LOST, RuntimeError) as error:  # RuntimeError: it was shut down
                self._again(tries, k, error)

    def _again(self, tries: list[int], k: int, error: BaseException) -> None:
        """A call was lost: replace what is broken, or give up."""
        self.lost += 1
        tries[k] += 1
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        broken = isinstance(error, (BrokenExecutor, RuntimeError))
        if tries[k] > self.retries:
            raise QueryError(
                f"its worker was lost {tries[k]} times ({what}); does this input kill it? retries= asks more often"
            ) from error
        if not broken:
            return
        if self.make is None:
            raise QueryError(
                f"its executor is broken ({what}) and cannot be made anew; give a function that makes one: "
                "hzo.blackbox(f, executor=lambda: ProcessPoolExecutor(8))"
            ) from error
        if self._executor is not None and not _works(self._executor):
            with suppress(Exception):
                self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def _check_time(self, running: dict[Future[Any], int], began: dict[Future[Any], float], timeout: float) -> None:
        now = monotonic()
        for future in running:
            if future.running() and now - began.setdefault(future, now) > timeout:
                stuck = self._executor
                if self.make is not None:  # what hangs there is left behind
                    self._executor = None
                    _stop(stuck)
                raise QueryTimeoutError(
                    f"no answer within {timeout:g} seconds; allow more for a call (timeout=), or put fewer samples "
                    "into one (batched=)"
                )

    def close(self) -> None:
        """Shut down what was made here; an executor that was given is its owner's."""
        if self.make is not None and self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def __getstate__(self) -> dict[str, Any]:
        if self.make is None:
            raise InputError(
                "an executor cannot be copied; give hzo.blackbox a function that makes one (executor=lambda: …)"
            )
        return {**self.__dict__, "_executor": None}


def _works(executor: Executor) -> bool:
    """Whether it takes another call; another one of many that were lost together may have replaced it already."""
    try:
        executor.submit(int)
    except (*LOST, RuntimeError):
        return False
    return True


def _stop(executor: Any) -> None:
    processes = list((getattr(executor, "_processes", None) or {}).values())
    with suppress(Exception):
        executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:  # of our own making: a call that hangs would keep the interpreter from ending
        with suppress(Exception):
            process.kill()

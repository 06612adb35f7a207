"""How long workers may take to start, and starting them within that."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any

from hzo._options import seconds_set
from hzo.errors import QueryError

_GRACE = 2.0  # seconds, for what has a limit of its own and says more
_NOT_HERE = ("main thread", "current event loop")
"""What libraries say that want to be started by the main thread."""


class _Clock:
    """Until when a start may take; a step of it that has a limit of its own moves that on."""

    def __init__(self, limit: float) -> None:
        self.until = monotonic() + limit + _GRACE

    def left(self) -> float:
        return self.until - monotonic()


_clock: ContextVar[_Clock | None] = ContextVar("hzo_start_clock", default=None)


def start_limit() -> float:
    """Seconds within which one worker of dask or Ray must be there: ``HZO_CONNECT_SECONDS``, else 60.

    Raises:
        InputError: what is there is no number above 0.
    """
    limit = seconds_set("HZO_CONNECT_SECONDS", 60.0)
    if (clock := _clock.get()) is not None:  # whoever asks waits so long from now on, and says what for
        clock.until = monotonic() + limit + _GRACE
    return limit


def started(make: Callable[[], Any], abandon: Callable[[Any], object]) -> Any:
    """What a function that starts workers returns, called in a thread that is waited for ``start_limit()`` seconds.

    A library that wants the main thread says so; it is called again in this one then, without a limit.

    Args:
        abandon: what becomes of workers that come later.

    Raises:
        QueryError: nothing came. What the function raises passes through.
    """
    limit = start_limit()
    clock, done = _Clock(limit), Event()
    found: list[Any] = []
    failed: list[BaseException] = []
    late, settling = Event(), Lock()

    def work() -> None:
        _clock.set(clock)
        try:
            found.append(make())
        except BaseException as error:  # it is handed on
            failed.append(error)
        with settling:
            done.set()
        if late.is_set() and found:
            abandon(found[0])

    thread = Thread(target=copy_context().run, args=(work,), name="hzo-start", daemon=True)
    thread.start()
    while not done.is_set() and (left := clock.left()) > 0:
        done.wait(left)
    with settling:
        if not done.is_set():
            late.set()
    if late.is_set():
        raise QueryError(
            f"its executor has not started within {limit:g} seconds; call the function given as executor= by itself to "
            "see what it waits for (an address that nobody answers, machines that are not free), or start the workers "
            "before and give the executor itself. HZO_CONNECT_SECONDS allows more"
        )
    if not failed:
        return found[0]
    if isinstance(failed[0], (RuntimeError, ValueError)) and any(words in str(failed[0]) for words in _NOT_HERE):
        return make()
    raise failed[0]

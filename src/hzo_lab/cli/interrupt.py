"""Ctrl-C: the first asks for an orderly stop, the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_interrupt(announce: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; ``announce`` is called at the first one.

    A step in progress is finished first, so that what is saved is a whole step; a second Ctrl-C raises
    KeyboardInterrupt and leaves the newest checkpoint to go on from.
    """
    asked = False

    def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        announce()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)

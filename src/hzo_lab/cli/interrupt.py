"""Ctrl-C and SIGTERM: the first asks for an orderly stop, the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a person at the terminal; a scheduler, a container, a shutdown


@contextmanager
def stop_on_interrupt(announce: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """Yields a function that says which signal asked to stop, 0 for none; ``announce`` is called at the first one.

    A step in progress is finished first, so that what is saved is a whole step; a second signal raises
    KeyboardInterrupt and leaves the newest checkpoint to go on from.
    """
    asked = 0

    def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = signum
        announce()

    before = {signum: signal.signal(signum, handle) for signum in SIGNALS}
    try:
        yield lambda: asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

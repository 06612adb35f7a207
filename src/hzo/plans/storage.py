"""How activations are stored: which stages run when, and how long every value lives. Nothing here knows a network.

A sweep visits stages from right to left, whatever the tree, and each asks for activations of its own. ``"all"`` keeps
those of the whole base pass. ``"path"`` keeps what lies on the path of a recursion: the base pass leaves the boundaries
of its right spine (L/2, 3L/4, …), the right half is finished from them, then the left half is run forward again, with
its own spine. That is

    R(n) = ⌊n/2⌋ + R(⌊n/2⌋) + R(⌈n/2⌉), R(1) = 0;  R(n) = (n/2) log₂ n for powers of two

stages run again, and about log₂ L boundaries at a time instead of L. Source: the recursion is the paper's; recursive
checkpointing (Griewank, 1992) has the same order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Storage = Literal["all", "path"]


@dataclass(frozen=True)
class Pass:
    """Stages [start, stop) are run forward; then those of [swept, stop) are swept, the last first."""

    start: int
    stop: int
    swept: int


def passes(stages: int, storage: Storage) -> list[Pass]:
    """The passes of one gradient in their order, the base pass first."""
    return list(_path(0, stages)) if storage == "path" else [Pass(0, stages, 0)]


def _path(start: int, stop: int) -> Iterator[Pass]:
    spine = [start]
    while stop - spine[-1] > 1:
        spine.append(spine[-1] + (stop - spine[-1]) // 2)
    yield Pass(start, stop, spine[-1])
    for left, right in reversed(list(pairwise(spine))):
        yield from _path(left, right)


def stages_run_again(stages: int, storage: Storage) -> int:
    """Stages that the passes after the base pass run, for one sample."""
    return sum(later.stop - later.start for later in passes(stages, storage)[1:])


@dataclass(frozen=True)
class Event:
    """Something that reads values and makes values, by their indices."""

    reads: Collection[int] = ()
    makes: Collection[int] = ()


def last_uses(events: Sequence[Event]) -> list[tuple[int, ...]]:
    """For every event the values that it is the last to read or make before they are made again, or for good.

    A value that several events make lives from each of them to its last reader before the next.
    """
    needed: set[int] = set()
    found = []
    for event in reversed(events):
        touched = dict.fromkeys((*event.makes, *event.reads))
        found.append(tuple(value for value in touched if value not in needed))
        needed.difference_update(event.makes)
        needed.update(event.reads)
    return found[::-1]

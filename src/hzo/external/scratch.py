"""Memory that a part writes before it reads it: buffers for results, logs, the last input. It is no state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hzo.errors import HzoError
from hzo.external.state import FoundState, Saved, Slot, StateKey, floating

RunAgain = Callable[[], Sequence[Tensor]]
_LATER = 10**6  # calls


def scratch(
    state: FoundState, keys: Sequence[StateKey], left: Saved, outputs: Sequence[Tensor], again: RunAgain
) -> dict[StateKey, bool]:
    """For each place that a call changed whether nothing depends on what it held.

    The part runs once more from what it left (``left``), and once from numbers far away in these places. They are
    scratch where all three calls return the same to the last bit, and where each number comes out the same both times,
    or stays what it was. Costs two calls. Whoever writes in one call what only a later one reads is told from that by
    what the later one would find: the numbers that this call leaves.

    Returns:
        What was found, for every key; all False where the part does not run from other numbers.
    """
    nothing = dict.fromkeys(keys, False)
    known = [key for key in keys if key in left.slots and _movable(left.slots[key])]
    if not known:
        return nothing
    numbers = {key: value for key, value in state.numbers(left, known).items() if floating(value)}
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        state.load(left)
        if not _same(again(), outputs):
            return nothing
        first = state.save()
        state.load(left)
        for key, value in numbers.items():
            state.move(left, key, _far(value, generator))
        moved = state.save()
        if not _same(again(), outputs):
            return nothing
        second = state.save()
    except HzoError:
        return nothing
    return nothing | {
        key: key in first.slots
        and key in second.slots
        and _independent(first.slots[key], second.slots[key], left.slots[key], moved.slots.get(key))
        for key in known
    }


def counters_matter(
    state: FoundState,
    keys: Sequence[StateKey],
    start: Saved,
    left: Saved | None,
    outputs: Sequence[Tensor],
    again: RunAgain,
) -> bool:
    """Whether what comes out changes with whole numbers and truth values that a call changed: a clock, a flag.

    Else they only count calls, and go on counting queries. Costs one call; two more where the call changed other state
    as well and left ``left``, since a number may matter only once that is there.
    """
    clocks = [key for key in keys if key in start.slots and any(_whole_numbers(start.slots[key]))]
    if not clocks:
        return False

    def moved(saved: Saved) -> Sequence[Tensor]:
        state.load(saved)
        for slot in (slot for key in clocks for slot in _whole_numbers(saved.slots[key])):
            slot.space[slot.name] = not slot.value if isinstance(slot.value, bool) else slot.value + _LATER
        return again()

    try:
        if not _same(moved(start), outputs):
            return True
        if left is None or any(key not in left.slots for key in clocks):
            return False
        state.load(left)
        second = [t.clone() for t in again()]
        return not _same(moved(left), second)
    except HzoError:
        return True


def _whole_numbers(slot: Slot) -> Iterator[Slot]:
    """The whole numbers and truth values in a place, and in the lists and dicts that it holds."""
    if isinstance(slot.value, (bool, int)) and not isinstance(slot.space, tuple):
        yield slot
    for item in slot.items:
        yield from _whole_numbers(item)


def _same(found: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    return len(found) == len(outputs) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, outputs, strict=True)
    )


def _far(value: Any, generator: torch.Generator) -> Tensor:
    """Other numbers, of both signs."""
    given = torch.as_tensor(value).detach()
    real = torch.view_as_real(given.resolve_conj()) if given.is_complex() else given
    finite = real[real.isfinite()]
    scale = 10 * max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)
    noise = torch.randn(real.shape, generator=generator, dtype=torch.float64, device="cpu").to(real)
    moved = real.nan_to_num(0.0, 0.0, 0.0) + scale * noise
    return torch.view_as_complex(moved) if given.is_complex() else moved


def _movable(slot: Slot) -> bool:
    """Whether other numbers can be put into all of it: not into tuples, not into generators."""
    if slot.random or (isinstance(slot.space, tuple) and floating(slot.value)):
        return False
    return all(map(_movable, slot.items))


def _independent(a: Slot, b: Slot, left: Slot | None, moved: Slot | None) -> bool:
    """Whether two calls left the same in a place, or each what it had found."""
    if a.items or b.items:
        if [i.name for i in a.items] != [i.name for i in b.items]:
            return False
        before = {i.name: i for i in left.items} if left else {}
        other = {i.name: i for i in moved.items} if moved else {}
        return all(
            _independent(p, q, before.get(p.name), other.get(p.name)) for p, q in zip(a.items, b.items, strict=True)
        )
    if type(a.value) is not type(b.value):
        return False
    if not floating(a.value):
        return bool(a.value is b.value) or (isinstance(a.value, (bool, int, str)) and a.value == b.value)
    one, two = _content(a), _content(b)
    if one.shape != two.shape:
        return False
    same = _equal(one, two)
    if left is not None and moved is not None and floating(left.value) and floating(moved.value):
        found, given = _content(left), _content(moved)
        if found.shape == given.shape == one.shape:
            same |= _equal(one, found) & _equal(two, given)
    return bool(same.all())


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _content(slot: Slot) -> Tensor:
    return torch.as_tensor(slot.value if slot.content is None else slot.content)

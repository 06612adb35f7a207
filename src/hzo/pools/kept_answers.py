"""Answers of a gradient that has not succeeded yet, found again when it is tried once more.

A gradient asks several times: the forward pass, tests, the queries of each node. Where it fails, what was answered
until then is kept until a gradient succeeds, under the content of the question: the part as it was, with its weights,
and all that it was given. A try uses an answer once, so that a question that is put twice, to see whether the part
repeats, has two. And some of them are asked again before any other is used: where a device was reset in between, or a
reading is never the same twice, none of them is. Several, since one may not tell: a blank image with another gain.
"""

from __future__ import annotations

import importlib
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hzo.errors import HzoError, QueryError, QueryTimeoutError

_MOST = 2**28  # bytes of answers that are kept
_TESTS = 8  # answers that are asked again
_AROUND = 200  # bytes for the place of one
_LARGEST = 2**24  # bytes of a part, or of what it is given, that are read to find an answer again


class _Entry(NamedTuple):
    question: bytes
    answer: bytes  # written down: what becomes of the answer itself does not reach it, and its size is known


class KeptAnswers:
    """Answers by their questions, each to be used once in a try.

    Attributes:
        untested: so many are still to be asked again in this try, before one is used that was not. swept: autograd's
            backward pass has begun; whatever a forward pass asks now belongs to another try.
    """

    def __init__(self, most: int = _MOST) -> None:
        self.untested, self.swept = _TESTS, False
        self._most, self._bytes, self._next = most, 0, 0
        self._entries: dict[int, _Entry] = {}  # in the order in which they came
        self._unused: dict[bytes, deque[int]] = {}  # by question, those that this try has not used

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, questions: Sequence[bytes]) -> dict[int, int]:
        """For each question that has an answer, by its place, the number of the entry; it is used now."""
        found = {}
        for k, question in enumerate(questions):
            numbers = self._unused.get(question)
            if numbers:
                found[k] = numbers.popleft()
        return found

    def to_test(self, places: Iterable[int]) -> list[int]:
        """Which of these are asked again: as many as are still to be, spread over all of them."""
        among, count = sorted(places), self.untested
        if len(among) <= count:
            return among
        return [among[k * (len(among) - 1) // max(1, count - 1)] for k in range(count)]

    def answers(self, found: Mapping[int, int]) -> dict[int, Any]:
        """The answers of entries by the same keys; not of those that cannot be read, or that another thread let go."""
        answers = {}
        for k, number in found.items():
            with suppress(Exception):  # of whatever kind, as what an object is made of raises it
                answers[k] = pickle.loads(self._entries[number].answer)
        return answers

    def add(self, question: bytes, answer: Any, *, used: bool) -> int | None:
        """Keep an answer, in place of the oldest ones where there is no room; None where it cannot be written down.

        Args:
            used: it is handed out; another question that is the same has to be asked.
        """
        try:
            entry = _Entry(question, pickle.dumps(answer))
        except Exception:  # of whatever kind, as an object's own __reduce__ raises it
            return None
        number, self._next = self._next, self._next + 1
        self._entries[number] = entry
        self._bytes += len(entry.answer) + _AROUND
        if not used:
            self.put_back([number])
        while self._bytes > self._most:
            self.remove([next(iter(self._entries))])
        return number

    def put_back(self, numbers: Sequence[int]) -> None:
        """They were not used after all."""
        for number in numbers:
            if number in self._entries:
                self._unused.setdefault(self._entries[number].question, deque()).append(number)

    def remove(self, numbers: Sequence[int]) -> None:
        """Keep these no longer."""
        for number in numbers:
            entry = self._entries.pop(number, None)
            if entry is not None:
                self._bytes -= len(entry.answer) + _AROUND
                with suppress(KeyError, ValueError):
                    self._unused[entry.question].remove(number)

    def again(self) -> None:
        """A try has ended without a gradient: the next one may use all that there is."""
        self.untested, self.swept = _TESTS, False
        self._unused = {}
        for number, entry in self._entries.items():
            self._unused.setdefault(entry.question, deque()).append(number)

    def clear(self) -> None:
        """A gradient has succeeded, or what was answered is in doubt."""
        self.untested, self.swept = _TESTS, False
        self._entries, self._unused, self._bytes = {}, {}, 0


# ---- what belongs to one gradient ------------------------------------------------------------------------------------


class Gradient:
    """What is asked between two ends. It knows the answers that were used in it, of as many pools as there are."""

    def __init__(self, *, begins: bool) -> None:
        self.begins = begins
        self.pools: list[KeptAnswers] = []
        self.numbers: list[tuple[KeptAnswers, int]] = []

    def uses(self, kept: KeptAnswers) -> None:
        """A pool is asked."""
        if not any(kept is other for other in self.pools):
            self.pools.append(kept)
            if self.begins and kept.swept:
                kept.again()

    def failed(self, error: BaseException, *, judged: bool = True) -> None:
        """Keep what was answered, unless the error may say that it was wrong: NaN, two results, another shape."""
        doubted = judged and isinstance(error, HzoError) and not isinstance(error, (QueryError, QueryTimeoutError))
        for kept in self.pools:
            if doubted:
                kept.clear()
            else:
                kept.again()

    def succeeded(self) -> None:
        """Nothing of it has to be asked again."""
        for kept in self.pools:
            kept.clear()


_under_way: ContextVar[Gradient | None] = ContextVar("hzo_gradient_under_way", default=None)


@contextmanager
def _within(made: Gradient, *, judged: bool = True) -> Iterator[tuple[Gradient, bool]]:
    """The gradient that is under way, or this one; and whether it is this one, whose end is here."""
    now = _under_way.get()
    if now is not None:
        yield now, False
        return
    token = _under_way.set(made)
    try:
        yield made, True
    except BaseException as error:
        made.failed(error, judged=judged)
        raise
    finally:
        _under_way.reset(token)


@contextmanager
def one_gradient() -> Iterator[None]:
    """What is asked inside is one gradient: an error keeps what was answered for the next try."""
    with _within(Gradient(begins=True)) as (gradient, whole):
        yield
        if whole:
            gradient.succeeded()


@contextmanager
def forward_half() -> Iterator[None]:
    """A forward pass, behind which autograd may ask for a gradient: what is answered is kept until then."""
    with _within(Gradient(begins=True)):
        yield


@contextmanager
def backward_half(later: Callable[[Callable[[], None]], None] | None = None) -> Iterator[None]:
    """A backward pass, or a part of one: what was answered in a forward pass belongs to the same gradient.

    Args:
        later: calls what it is given when the whole has succeeded; None where this is the whole.
    """
    with _within(Gradient(begins=False)) as (gradient, whole):
        yield
        if not whole:
            return
        if later is None:
            gradient.succeeded()
            return
        for kept in gradient.pools:
            kept.swept = True
        later(gradient.succeeded)


@contextmanager
def one_list(kept: KeptAnswers) -> Iterator[Gradient]:
    """A list of calls, which is all that is asked where no gradient is under way."""
    with _within(Gradient(begins=False), judged=False) as (gradient, whole):
        gradient.uses(kept)
        yield gradient
        if whole:
            for pool, number in gradient.numbers:
                pool.remove([number])


# ---- questions -------------------------------------------------------------------------------------------------------


class _TooLargeError(Exception):
    pass


class _Sink:
    """A file that keeps the hash of what is written to it."""

    def __init__(self, hashed: Any) -> None:
        self.hashed, self.left = hashed, _LARGEST

    def write(self, data: Any) -> int:
        size = len(memoryview(data).cast("B"))
        self.left -= size
        if self.left < 0:
            raise _TooLargeError
        self.hashed.update(data)
        return size


def _content_of_tensor(value: Any) -> Any:
    """A tensor by its numbers: PyTorch would write down where they are in memory."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return NotImplemented
    plain = value.detach().resolve_conj().resolve_neg().contiguous().cpu()
    numbers = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    return tuple, ((type(value).__name__, str(value.dtype), tuple(value.shape), value.requires_grad, numbers),)


def _pickler(base: type[Any]) -> type[Any]:
    class Content(base):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            found = _content_of_tensor(value)
            inherited = getattr(super(), "reducer_override", None)
            return inherited(value) if found is NotImplemented and inherited is not None else found

    return Content


_Content = _pickler(pickle.Pickler)


def _hashed(value: Any, hashed: Any) -> Any:
    _Content(_Sink(hashed)).dump(value)
    return hashed


def alike(one: Any, other: Any) -> bool:
    """Whether two answers are the same to the bit; not where they cannot be read."""
    with suppress(Exception):
        return bool(_hashed(one, sha256()).digest() == _hashed(other, sha256()).digest())
    return False


def _part(f: Callable[..., Any]) -> Any:
    with suppress(pickle.PickleError, TypeError, AttributeError):
        return _hashed(f, sha256())
    # A function within a function, which is code and what it refers to.
    hashed = sha256()
    _pickler(importlib.import_module("cloudpickle").Pickler)(_Sink(hashed)).dump(f)
    return hashed


def questions(f: Callable[..., Any], calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> list[bytes] | None:
    """By what answers are found again: the part as it is now and all that it is given.

    None where that cannot be read (a file, a lock), or is too large to be read for every call.
    """
    read: dict[int, bytes] = {}  # by identity: the model of a population is given to all, and read once

    def digest(value: Any) -> bytes:
        found = read.get(id(value))
        if found is None:
            found = read[id(value)] = _hashed(value, sha256()).digest()
        return found

    try:
        part = _part(f).digest()
        found = []
        for args, kwargs in calls:
            names = sorted(kwargs)
            parts = [part, *map(digest, args), *(digest(kwargs[name]) for name in names)]
            found.append(sha256(b"".join(parts) + repr((len(args), names)).encode()).digest())
        return found
    except Exception:  # of whatever kind, as an object's own __reduce__ raises it
        return None

"""Calls of a part in other threads, processes or machines: any ``concurrent.futures.Executor``.

The part runs several times at once and in whatever order; results come back in the order of the calls. What the part
raises comes back as a value, so that what the executor raises is the executor's: a worker that is lost (its process was
killed, its connection broke) loses nothing. Its call is asked again, and a broken executor is replaced where a function
that makes one was given. What the part itself raises is the part's, and is not asked again. Short calls travel
together where sending one by one would keep this process from its workers; each is run by itself all the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import platform
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from queue import Empty, SimpleQueue
from statistics import median
from threading import get_ident
from time import monotonic, perf_counter, process_time
from typing import Any

from hzo.errors import InputError, QueryError, QueryTimeoutError
from hzo.pools.dask_pool import DaskExecutor, on_dask
from hzo.pools.kept_answers import Gradient, KeptAnswers, alike, one_list, questions
from hzo.pools.start_limit import started

CallArguments = tuple[tuple[Any, ...], Mapping[str, Any]]

_AHEAD = 256  # messages that wait in the executor at a time, or twice as many as it has workers
_AT_FIRST = 64  # the same, before it is known what a message costs
_TICK = 0.05  # seconds between looks at the time
_NOT_SENT = (pickle.PickleError, TypeError, AttributeError, ImportError)
"""What an executor raises where a task or its result does not go through a pipe."""


Answer = tuple[Any, BaseException | None, str, float, tuple[str, int, int]]
"""What came of one call in a worker: its result, its error, where that was met, the seconds that it took there, and in
which thread of which process of which machine."""


def _made() -> Callable[..., list[Answer]]:
    def answer(f: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Answer:
        began, here = perf_counter(), (platform.node(), os.getpid(), get_ident())
        try:
            return f(*args, **kwargs), None, "", perf_counter() - began, here
        except (Exception, SystemExit) as error:
            met, where = error, traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(met))
        except Exception:  # of whatever kind: an exception that takes other arguments than it keeps
            met = RuntimeError(f"{type(met).__name__}: {met}")
        return None, met, where, perf_counter() - began, here

    def answers(f: Callable[..., Any], calls: list[CallArguments]) -> list[Answer]:
        # What a part writes into its arguments, or into a result that it keeps, must not reach another call.
        found: list[Answer] = []
        try:
            calls = [deepcopy(call) for call in calls] if len(calls) > 1 else calls
        except Exception:  # of whatever kind, as an object's own __reduce__ raises it
            calls = calls[:1]
        for args, kwargs in calls:
            one = answer(f, args, kwargs)
            found.append(one)
            if one[1] is not None:
                break
            if len(calls) > 1:
                try:
                    found[-1] = (deepcopy(one[0]), *one[1:])
                except Exception:  # of whatever kind, too
                    break
        return found

    return answers


_by_value = _made()
"""Run calls in a worker, for executors that send the code itself: their workers need neither hzo nor torch. What comes
back may be fewer answers than there were calls: after an error, or where calls cannot be kept apart by copies."""


def answers(f: Callable[..., Any], calls: list[CallArguments]) -> list[Answer]:
    """Run calls in a worker that has hzo."""
    return _by_value(f, calls)


def _made_written() -> Callable[[bytes, list[bytes]], list[bytes]]:
    def answers_written(part: bytes, calls: list[bytes]) -> list[bytes]:
        found = []
        for call in calls:
            one = _by_value(pickle.loads(part), [pickle.loads(call)])[0]
            found.append(pickle.dumps(one))
            if one[1] is not None:
                break
        return found

    return answers_written


_written_by_value = _made_written()


def answers_written(part: bytes, calls: list[bytes]) -> list[bytes]:
    """Run calls in a process of ``concurrent.futures``, to which PyTorch would not send tensors, but their place in
    memory, where both processes can write. The part is a new one for each."""
    return _written_by_value(part, calls)


def _made_twice() -> Callable[..., tuple[Any, Any]]:
    def twice(f: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        own = deepcopy((args, kwargs))  # it may write into what it is given
        first = deepcopy(f(*own[0], **own[1]))  # and use its memory again
        return first, f(*args, **kwargs)

    return twice


_twice_by_value = _made_twice()


def twice(f: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Two results of one part in one worker, one after the other: a part that remembers its last call shows it."""
    return _twice_by_value(f, *args, **kwargs)


_SEND_CODE = {"loky", "joblib", "hzo"}  # where such executors are from; hzo's are those on dask and on Ray


class InWorker(Exception):  # noqa: N818  # the cause of an error, not one that is raised
    """The traceback of an error in the worker that met it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class _Asked:
    """The calls of one ``ask``, and how they stand."""

    f: Callable[..., Any]
    calls: Sequence[CallArguments]
    answered: Callable[[int], object]
    run: Any = None  # what an executor is given to call, or where dask keeps it
    results: dict[int, Any] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    running: dict[Future[Any], tuple[int, ...]] = field(default_factory=dict)
    began: dict[Future[Any], float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    heard: float = field(default_factory=monotonic)  # when the last answer came


class _Pace:
    """How long calls take, and what a message costs this process: by these is chosen how many travel together."""

    busy = 0.25  # of this process's time that may go into messages before calls travel together
    longest = 1.0  # seconds that calls of one message may take: what is lost with a worker, and progress is seen
    enough = 8  # messages to judge by: what a forward pass and its tests send is enough
    many = 256  # messages after which older ones count half

    def __init__(self) -> None:
        self.workers: set[tuple[str, int, int]] = set()  # that have been seen
        self.call = self.message = 0.0  # seconds of a call in a worker, and of this process's processors for a message
        self.apart = False  # whether calls go one by one, come what may
        self._at = 0.0
        self._sent = self._received = self._calls = self._seconds = self._spent = 0.0

    def begin(self) -> None:
        """Calls are about to be sent: what this process did until now was something else."""
        self._at = process_time()

    def sent(self) -> None:
        """A message has gone out."""
        self._sent += 1

    def received(self, answered: Sequence[Answer]) -> None:
        """One has come back."""
        now = process_time()
        self._spent, self._at = self._spent + now - self._at, now
        self._received += 1
        self._calls += len(answered)
        self._seconds += sum(seconds for *_, seconds, _ in answered)
        if len(self.workers) < 2**16:
            self.workers.update(there for *_, there in answered)
        if self._received >= self.enough:
            self.call = max(self._seconds / self._calls, 1e-9)
            # What goes out and what comes back cost about the same, and they are not as many in so short a time.
            self.message = 2 * self._spent / (self._sent + self._received)
        if self._received >= self.many:
            self._sent, self._received, self._calls = self._sent / 2, self._received / 2, self._calls / 2
            self._seconds, self._spent = self._seconds / 2, self._spent / 2

    def together(self, waiting: int, workers: int) -> int:
        """How many of the calls that wait go into the next message.

        One, unless this process would be busy with messages for a quarter of the time in which the workers do them. No
        more than half of a worker's even share of what waits: messages become shorter towards the end, and workers end
        together (factoring; Hummel, Schonberg and Flynn, 1992). Down to half of what is wanted while every worker gets
        one: below that messages would keep them longer than the last of them waits for the others.
        """
        if not self.call or self.apart:
            return 1
        workers = max(workers, len(self.workers))
        wanted = ceil(self.message * workers / self.call / self.busy)
        share = max(waiting // (2 * workers), min(ceil(wanted / 2), ceil(waiting / workers)))
        return max(1, min(wanted, share, int(self.longest / self.call)))


class Pool:
    """An executor, and what becomes of calls that it loses.

    Args:
        executor: an ``Executor`` (whatever has ``submit``), or a function that makes one.
        retries: how often a call is asked again after its worker was lost.
        hedge: a call that runs longer than so many times the median of the others, when none waits any more, is asked
            a second time, and the first answer counts; None never.
        divides: workers among which the samples of a call may be divided; None where they stay together.

    Attributes:
        lost: calls that were asked again. hedged: calls that were asked twice at once. elsewhere: whether calls run in
            another process.
    """

    def __init__(
        self, executor: Any, retries: int = 3, hedge: float | None = None, *, divides: int | None = None
    ) -> None:
        self.make: Callable[[], Any] | None = None
        if hasattr(executor, "submit") and not isinstance(executor, type):
            self._executor: Any = on_dask(executor)
        elif callable(executor):
            self.make, self._executor = executor, None
        else:
            raise InputError(
                "expected executor to be a concurrent.futures.Executor, or a function that makes one "
                f"(lambda: ProcessPoolExecutor(8)), got a {type(executor).__name__}"
            )
        self.retries = retries
        self.hedge = hedge
        self.divides = divides
        self.lost = self.hedged = 0
        self.elsewhere = False
        self.kept = KeptAnswers()  # of a gradient that is under way, or has failed
        self._tells = False  # whether the executor says when a call runs
        self._pace = _Pace()

    def ask(
        self,
        f: Callable[..., Any],
        calls: Sequence[CallArguments],
        timeout: float | None = None,
        answered: Callable[[int], object] = lambda _: None,
    ) -> list[Any]:
        """The results of ``f`` for these calls, in order.

        What was answered before an error is not asked again when the same is asked the next time (``kept_answers``), of
        a part that can be written down (pickled) and is then the same. Calls of other processes that are short for what
        sending one costs travel several in a message, each with arguments and result of its own; not where ``timeout``
        or ``hedge`` want to know how long each takes.

        Args:
            timeout: seconds for one call from when it runs; where the executor does not tell, from the last answer.
            answered: told the number of each call when its answer is there.

        Raises:
            QueryTimeoutError: a call took longer. QueryError: its worker was lost too often, the executor is broken
            and cannot be made anew, or the call cannot be sent to it. What ``f`` raises passes through.
        """
        with one_list(self.kept) as gradient:
            return self._ask(gradient, f, calls, timeout, answered)

    def _ask(
        self,
        gradient: Gradient,
        f: Callable[..., Any],
        calls: Sequence[CallArguments],
        timeout: float | None,
        answered: Callable[[int], object],
    ) -> list[Any]:
        kept, asked = self.kept, _Asked(f, calls, answered)
        put = questions(f, calls)
        found = {} if put is None else kept.take(put)
        before = kept.answers(found)  # now: another thread's gradient may succeed meanwhile, and nothing is kept then
        found = {k: number for k, number in found.items() if k in before}
        # Some of them are asked again: has the part changed where its content does not show it?
        tests = kept.to_test(found)
        try:
            self._answer(asked, [k for k in range(len(calls)) if k not in found or k in tests], timeout)
            if not all(alike(asked.results[k], before[k]) for k in tests):
                kept.clear()
                self._answer(asked, [k for k in found if k not in tests], timeout)
                found = {}
            else:
                kept.untested -= len(tests)
        except BaseException:  # nobody was told: a smaller list of the same calls finds them, too
            kept.put_back([*found.values()])
            self._keep(asked, put, found, used=False)
            raise
        numbers = [*found.values(), *self._keep(asked, put, found, used=True)]
        gradient.numbers += [(kept, number) for number in numbers]
        for k in found:
            if k not in asked.results:
                asked.results[k] = before[k]
                answered(k)
        return [asked.results[k] for k in range(len(calls))]

    def _keep(self, asked: _Asked, put: list[bytes] | None, found: Mapping[int, int], *, used: bool) -> list[int]:
        made = () if put is None else [(put[k], result) for k, result in asked.results.items() if k not in found]
        numbers = (self.kept.add(question, result, used=used) for question, result in made)
        return [number for number in numbers if number is not None]

    def _answer(self, asked: _Asked, which: Sequence[int], timeout: float | None) -> None:
        """Have these calls answered."""
        asked.waiting = list(reversed(which))
        wanted = len(asked.results) + len(which)
        done: SimpleQueue[Future[Any]] = SimpleQueue()
        tick = None if timeout is None and self.hedge is None else _TICK
        self._pace.begin()
        try:
            while len(asked.results) < wanted:
                self._submit_waiting(asked, done, alone=tick is not None)
                for future in _arrived(done, tick):
                    self._receive(asked, future)
                if tick is not None:
                    self._look(asked, done, timeout)
        except BaseException:
            for future in _arrived(done, 0):  # what came meanwhile is kept, too
                with suppress(Exception, CancelledError):
                    if future.exception() is None:
                        self._receive(asked, future)
            raise
        finally:
            for future in asked.running:
                future.cancel()
            asked.running, asked.began = {}, {}

    def ask_twice(self, f: Callable[..., Any], call: CallArguments, timeout: float | None = None) -> tuple[Any, Any]:
        """Two results of ``f`` for one call, one after the other in one worker. Raises as ``ask``."""
        asked = partial(_twice_by_value if self._sends_code() else twice, f)
        found: tuple[Any, Any] = self.ask(asked, [call], None if timeout is None else 2 * timeout)[0]
        return found

    def _sends_code(self) -> bool:
        return type(self._executor).__module__.split(".")[0] in _SEND_CODE

    def _submit_waiting(self, asked: _Asked, done: SimpleQueue[Future[Any]], *, alone: bool) -> None:
        workers = getattr(self._executor, "_max_workers", 0)
        ahead = max(_AHEAD if self._pace.call or alone else _AT_FIRST, 2 * workers)
        messages: list[tuple[int, ...]] = []
        # dask takes many messages for little more than one: it is given some when half of them are done.
        room = ahead - len(asked.running)
        if isinstance(self._executor, DaskExecutor) and asked.running and room < ahead // 2:
            return
        while asked.waiting and len(messages) < room:
            count = 1 if alone or not self.elsewhere else self._pace.together(len(asked.waiting), workers)
            ks = [asked.waiting.pop()]
            # What was lost goes by itself: one of several may be what kills its worker.
            while len(ks) < count and not any(k in asked.tries for k in (ks[0], asked.waiting[-1])):
                ks.append(asked.waiting.pop())
            messages.append(tuple(ks))
        self._submit(asked, messages, done)

    def _submit(self, asked: _Asked, messages: Sequence[tuple[int, ...]], done: SimpleQueue[Future[Any]]) -> None:
        left = list(messages)
        while left:
            now = left[:1]  # one by one: where one of them fails, those before it are under way
            try:
                executor = self._working(asked)
                if isinstance(executor, DaskExecutor):  # for little more than one
                    now = left
                    given = [[_written(asked.calls[k], code=True) for k in ks] for ks in now]
                    futures: list[Future[Any]] = executor.submit_all(asked.run, given)
                else:
                    futures = [executor.submit(asked.run, self._given(asked, now[0]))]
            except (BrokenExecutor, CancelledError, OSError, RuntimeError) as error:  # RuntimeError: it was shut down
                if isinstance(error, QueryError):
                    raise
                self._lost(asked, [k for ks in now for k in ks], error, broken=True)
                continue
            for ks, future in zip(now, futures, strict=True):
                self._pace.sent()
                asked.running[future] = ks
                future.add_done_callback(done.put)
            left = left[len(now) :]

    def _given(self, asked: _Asked, ks: Sequence[int]) -> list[Any]:
        """The calls of a message, written down where PyTorch would send the place of its tensors."""
        calls = [asked.calls[k] for k in ks]
        return [_written(call) for call in calls] if isinstance(self._executor, ProcessPoolExecutor) else calls

    def _working(self, asked: _Asked) -> Any:
        if self._executor is None:
            assert self.make is not None
            try:
                self._executor = on_dask(started(self.make, _shut_down))
            except QueryError:
                raise
            except Exception as error:
                raise QueryError(
                    f"its executor could not be started ({_said(error)}); call the function given as executor= by "
                    "itself to see why"
                ) from error
        if asked.run is None:  # one object for all calls: executors keep what they have written down of it
            if isinstance(self._executor, ProcessPoolExecutor):
                asked.run = partial(answers_written, _written(asked.f))
            elif isinstance(self._executor, DaskExecutor):
                asked.run = self._executor.kept(partial(_written_by_value, _written(asked.f, code=True)))
            else:
                asked.run = partial(_by_value if self._sends_code() else answers, asked.f)
        return self._executor

    def _receive(self, asked: _Asked, future: Future[Any]) -> None:
        ks = asked.running.pop(future, ())
        asked.began.pop(future, None)
        if all(k in asked.results for k in ks):  # asked twice, and answered by the other one
            return
        try:
            found = future.result()
            answered: list[Answer] = [pickle.loads(one) if isinstance(one, bytes) else one for one in found]
        except _NOT_SENT as trouble:
            raise _not_sent(trouble) from trouble
        except QueryError:  # of the executor, which has given up
            raise
        except (Exception, CancelledError) as trouble:
            if type(trouble).__name__ == "KilledWorker":  # dask has asked several workers itself, and gave up
                raise QueryError(
                    f"it killed every worker that dask gave it to ({_said(trouble)}); does this input kill it, or does "
                    "a worker run out of memory?"
                ) from trouble
            if ks not in asked.running.values():
                self._lost(asked, ks, trouble, broken=isinstance(trouble, BrokenExecutor))
                asked.waiting.extend(reversed(ks))
            return
        asked.heard = monotonic()
        self._pace.received(answered)
        for k, (result, error, where, seconds, there) in zip(ks, answered, strict=False):
            self.elsewhere = there[:2] != (platform.node(), os.getpid())
            if error is not None:
                raise error from InWorker(where)
            asked.results[k] = result
            asked.answered(k)
            asked.seconds.append(seconds)
        if len(answered) < len(ks):  # they could not be copied
            self._pace.apart = True
            asked.waiting.extend(reversed(ks[len(answered) :]))

    def _lost(self, asked: _Asked, ks: Sequence[int], error: BaseException, *, broken: bool) -> None:
        """Calls were lost: replace what is broken, or give up."""
        self.lost += len(ks)
        for k in ks:
            asked.tries[k] = asked.tries.get(k, 0) + 1
        tries = max(asked.tries[k] for k in ks)
        if tries > self.retries:
            raise QueryError(
                f"its worker was lost {tries} times ({_said(error)}); does this input kill it, or can the worker not "
                "start? retries= asks more often"
            ) from error
        if not broken:
            return
        if self.make is None:
            raise QueryError(
                f"its executor is broken ({_said(error)}) and cannot be made anew; give a function that makes one: "
                "hzo.blackbox(f, executor=lambda: ProcessPoolExecutor(8))"
            ) from error
        if self._executor is not None and not _works(self._executor):
            _shut_down(self._executor)
            self._executor = asked.run = None

    # -- time ---

    def _look(self, asked: _Asked, done: SimpleQueue[Future[Any]], timeout: float | None) -> None:
        now = monotonic()
        for future in list(asked.running):
            if future.running():
                self._tells = True
                asked.began.setdefault(future, now)
        if timeout is not None:
            begun = list(asked.began.values()) if self._tells else [asked.heard] if asked.running else []
            if any(now - began > timeout for began in begun):
                stuck = self._executor
                if self.make is not None:  # what hangs there is left behind
                    self._executor = None
                    _stop(stuck)
                raise QueryTimeoutError(
                    f"no answer within {timeout:g} seconds; allow more for a call (timeout=), or put fewer samples "
                    "into one (batched=)"
                )
        if self.hedge is not None and not asked.waiting and asked.seconds:
            limit = self.hedge * median(asked.seconds)
            copies = list(asked.running.values())
            for future, ks in list(asked.running.items()):
                if now - asked.began.get(future, now if self._tells else asked.heard) > limit and copies.count(ks) == 1:
                    self.hedged += 1
                    self._submit(asked, [ks], done)

    def close(self) -> None:
        """Shut down what was made here; an executor that was given is its owner's."""
        if self.make is not None and self._executor is not None:
            _shut_down(self._executor)
            self._executor = None

    def __getstate__(self) -> dict[str, Any]:
        if self.make is None:
            raise InputError(
                "an executor cannot be copied; give hzo.blackbox a function that makes one (executor=lambda: …)"
            )
        return {**self.__dict__, "_executor": None, "kept": KeptAnswers(), "_pace": _Pace()}


def _arrived(done: SimpleQueue[Future[Any]], tick: float | None) -> Iterator[Future[Any]]:
    """The futures that are done, at least one unless the time is over."""
    with suppress(Empty):
        yield done.get(timeout=tick)
        while True:
            yield done.get_nowait()


def _written(what: Any, *, code: bool = False) -> bytes:
    """Args: code: the worker is not a copy of this process: what a script or a notebook defines is sent as code."""
    try:
        plain = pickle.dumps(what)
        if not code or b"__main__" not in plain:
            return plain
    except Exception as error:  # of whatever kind, as an object's own __reduce__ raises it
        if importlib.util.find_spec("cloudpickle") is None:
            raise _not_sent(error) from error
    try:  # functions within functions, lambdas, classes of a notebook: their code is sent
        found: bytes = importlib.import_module("cloudpickle").dumps(what)
        return found
    except Exception as error:  # a file, a lock, a handle of a library
        raise _not_sent(error) from error


def _not_sent(error: BaseException) -> QueryError:
    return QueryError(
        f"it, or what it was given or returned, cannot be sent to a worker ({_said(error)}); define the part at the "
        "top of a module that the workers can import, install cloudpickle, which sends code as well, take an executor "
        "that does (loky, dask, Ray), or threads: executor=lambda: ThreadPoolExecutor(8)"
    )


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _works(executor: Any) -> bool:
    """Whether it takes another call; another one of many that were lost together may have replaced it already."""
    try:
        executor.submit(int)
    except (BrokenExecutor, CancelledError, OSError, RuntimeError):
        return False
    return True


def _shut_down(executor: Any) -> None:
    """As far as it can; dask's and loky's know no ``cancel_futures``, and mpi4py's waits where it must."""
    for options in ({"wait": False, "cancel_futures": True}, {"wait": False}):
        with suppress(Exception):
            executor.shutdown(**options)
            return


def _stop(executor: Any) -> None:
    processes = list((getattr(executor, "_processes", None) or {}).values())
    _shut_down(executor)
    for process in processes:  # of our own making: a call that hangs would keep the interpreter from ending
        with suppress(Exception):
            process.kill()

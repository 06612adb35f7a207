"""Ray as a ``concurrent.futures.Executor``: so many actors, each of which answers one call at a time."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from hashlib import sha256
from typing import Any

from hzo._options import whole
from hzo.errors import InputError, QueryError
from hzo.pools.start_limit import start_limit


def ray_executor(workers: int, *, address: str | None = None, **options: Any) -> Executor:
    """An executor whose workers are Ray's actors, on whatever machines Ray has.

    ::

        box = hzo.blackbox(simulate, numpy=True, executor=lambda: hzo.ray_executor(64))

    Args:
        workers: actors that answer at once.
        address: of a cluster, as ``ray.init`` takes it; None: what ``RAY_ADDRESS`` says, else this machine. It says
            nothing where Ray is connected already.
        options: of the actors, as ``ray.remote`` takes them (``num_cpus``, ``resources``, ``runtime_env``, …). They are
            started anew where they die, and reserve no processor unless ``num_cpus`` says so.

    A function is sent once for as long as it stays as it is. Actors need what it imports, and neither hzo nor torch.
    Needs the extra ``ranks``, or Ray alone. Source: ours.

    Raises:
        InputError: Ray is not installed; a number of workers that is none.
        QueryError: the cluster does not answer, or none of its actors does, within ``HZO_CONNECT_SECONDS`` (60). The
            same comes of a call where all have died and none is back after as long.
    """
    try:
        import ray  # noqa: PLC0415  # not needed by anything else
    except ImportError as error:
        raise InputError(f"an executor on Ray needs Ray ({error}): pip install ray") from error
    workers = whole("workers", workers)
    _connect(ray, address or os.environ.get("RAY_ADDRESS"))
    return _RayExecutor(ray, workers, options)


def _connect(ray: Any, address: str | None) -> None:
    if ray.is_initialized():
        return
    if address is None:
        ray.init(include_dashboard=False, log_to_driver=False)
        return
    failed: list[BaseException] = []

    def connect() -> None:
        try:
            ray.init(address=address, log_to_driver=False)
        except BaseException as error:  # it is handed on
            failed.append(error)

    # Ray tries an address that nobody answers for ten minutes and longer, and cannot be told how long.
    thread, limit = threading.Thread(target=connect, daemon=True), start_limit()
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        raise QueryError(
            f"Ray at {address} has not answered for {limit:g} seconds; check the address, the port and that "
            "`ray status --address` answers from here. HZO_CONNECT_SECONDS allows more"
        )
    if failed:
        raise QueryError(f"Ray at {address} cannot be reached ({_first_line(failed[0])})") from failed[0]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class _RayExecutor(Executor):
    def __init__(self, ray: Any, workers: int, options: dict[str, Any]) -> None:
        class Worker:  # sent as it stands here: an actor needs neither hzo nor torch
            def __init__(self) -> None:
                self.kept: dict[str, Any] = {}

            def ask(self, key: str, reference: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if key not in self.kept:
                    (function,) = reference  # in a list, where Ray does not fetch it by itself
                    self.kept = {key: ray.get(function)}
                return self.kept[key](*args, **kwargs)

            @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
            def awake(self) -> None:
                """Ray asks this again until the actor answers."""

        made = ray.remote(**{"num_cpus": 0, "max_restarts": -1, **options})(Worker)
        self._ray = ray
        self._max_workers = workers
        self._actors = [made.remote() for _ in range(workers)]
        self._free = deque(self._actors)
        self._queue: deque[tuple[Future[Any], Any, tuple[Any, ...], dict[str, Any]]] = deque()
        self._lock = threading.Lock()
        self._sent: dict[str, Any] = {}  # by the content of a function, where Ray keeps it
        self._closed = False
        self._lost = 0  # actors that have died, and not answered since
        self._alone: threading.Timer | None = None  # gives up where none comes back
        self._await_one()

    def _await_one(self) -> None:
        """One actor answers: others may start later, or wait for machines."""
        limit = start_limit()
        asked = [actor.awake.remote() for actor in self._actors]
        found, _ = self._ray.wait(asked, num_returns=1, timeout=limit)
        try:
            if not found:
                raise self._no_actors(limit)
            self._ray.get(found[0])
        except QueryError:
            self.shutdown()
            raise
        except Exception as error:  # of whatever kind Ray has
            self.shutdown()
            raise QueryError(f"Ray's actors do not start ({_first_line(error)})") from error

    @staticmethod
    def _no_actors(limit: float) -> QueryError:
        return QueryError(
            f"none of Ray's actors has answered for {limit:g} seconds: they do not start, or what they ask for "
            "(num_cpus=, resources=) is not there; `ray status` and the logs of their workers tell which. "
            "HZO_CONNECT_SECONDS allows more"
        )

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call in the next actor that is free."""
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        kept = self._kept(fn)
        with self._lock:
            self._queue.append((future, kept, args, kwargs))
        self._next()
        return future

    def _kept(self, function: Any) -> tuple[str, Any]:
        """The function as it is now, in Ray's store: large ones are sent to an actor once, and not with every call."""
        content = self._ray.cloudpickle.dumps(function)
        key = sha256(content).hexdigest()
        if key not in self._sent:
            self._sent = {key: self._ray.put(function)}
        return key, [self._sent[key]]

    def _next(self) -> None:
        while True:
            with self._lock:
                if not self._queue or not self._free:
                    return
                future, kept, args, kwargs = self._queue.popleft()
                actor = self._free.popleft()
            if not future.set_running_or_notify_cancel():
                with self._lock:
                    self._free.append(actor)
                continue
            try:
                inner = actor.ask.remote(*kept, args, kwargs).future()
            except Exception as error:  # of whatever kind Ray has
                with self._lock:
                    self._free.append(actor)
                future.set_exception(error)
                continue
            inner.add_done_callback(lambda done, actor=actor, future=future: self._done(done, actor, future))

    def _done(self, done: Future[Any], actor: Any, future: Future[Any]) -> None:
        error = done.exception()
        found = None if error is None else _plain(error)
        if not isinstance(found, (ConnectionError, BrokenExecutor)):
            self._release(actor)
        else:  # it is started anew, and would lose all calls that it got until then
            try:
                awake = actor.awake.remote().future()
            except Exception:  # of whatever kind Ray has
                self._release(actor)
            else:
                self._wait_for(actor, awake)
        if found is None:
            future.set_result(done.result())
        else:
            future.set_exception(found)

    def _wait_for(self, actor: Any, awake: Future[Any]) -> None:
        with self._lock:
            self._lost += 1
            if self._lost == self._max_workers and not self._closed:
                self._alone = threading.Timer(start_limit(), self._give_up)
                self._alone.daemon = True
                self._alone.start()

        def back(_: Future[Any]) -> None:
            with self._lock:
                self._lost -= 1
                if self._alone is not None:
                    self._alone.cancel()
                    self._alone = None
            self._release(actor)

        awake.add_done_callback(back)

    def _give_up(self) -> None:
        with self._lock:
            waiting, self._queue = list(self._queue), deque()
        for future, *_ in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._no_actors(start_limit()))
        self.shutdown()

    def _release(self, actor: Any) -> None:
        """It is free for another call."""
        with self._lock:
            if not self._closed:
                self._free.append(actor)
        self._next()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002  # the protocol's
        """End the actors; calls that run are lost."""
        self._closed = True
        if self._alone is not None:
            self._alone.cancel()
        with self._lock:
            waiting, self._queue = list(self._queue), deque()
        for future, *_ in waiting:
            future.cancel()
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._free = [], deque()
        self._sent = {}


def _plain(error: BaseException) -> BaseException:
    """What a worker met: Ray's own trouble is that of the executor, and a broken connection to it, too."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    if kinds & {"RayTaskError"}:
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, BaseException) else error
    if kinds & {"RayActorError", "WorkerCrashedError", "NodeDiedError", "ObjectLostError"}:
        return ConnectionError(str(error).splitlines()[0])
    return BrokenExecutor(str(error)) if "RaySystemError" in kinds else error

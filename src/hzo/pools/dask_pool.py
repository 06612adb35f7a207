"""dask's workers as a ``concurrent.futures.Executor`` that takes many calls at once and keeps the function.

dask's own executor sends one graph for each call, with the function in it, and asks for each result by itself; its
scheduler, which runs beside the process that asks or in it, is then what workers wait for. Here as many calls as may
wait go out in one graph (``Client.map``), the function is sent once, and results that are there are fetched together
(``Client.gather``).
"""

from __future__ import annotations

import importlib
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from hashlib import sha256
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from hzo.errors import InputError, QueryError
from hzo.pools.start_limit import start_limit

_LOOK = 2.0  # seconds without a result after which it is looked whether there are workers
_MOST_KEPT = 4  # functions that dask keeps for an executor


def on_dask(given: Any) -> Any:
    """An executor for dask's ``Client``, or for what its ``get_executor()`` gives; anything else as it is.

    Raises:
        InputError: an executor of dask's that does not say which client it belongs to.
    """
    if not type(given).__module__.startswith("distributed."):
        return given
    if all(hasattr(given, name) for name in ("map", "gather", "nthreads")):
        return DaskExecutor(given, {}, given)
    # dask has no public way from its executor to the client and the options; a client needs none of this.
    client = getattr(given, "_client", None)
    if client is None:
        raise InputError(
            "this version of dask hides the client of its executor; give the client itself: executor=client"
        )
    return DaskExecutor(client, getattr(given, "_kwargs", {}), given)


class DaskExecutor(Executor):
    """An executor on the workers of a dask client.

    Args:
        client: a ``distributed.Client``. options: of ``Client.map`` (``workers``, ``resources``, …). owner: the client,
            or dask's executor: what was given, and what ``shutdown`` ends.
    """

    def __init__(self, client: Any, options: Mapping[str, Any], owner: Any) -> None:
        self._client = client
        # dask takes functions to be pure: it would hash all arguments, and give two equal questions one answer.
        self._options = {**options, "pure": False}
        self._owner = owner
        self._max_workers = 0  # threads of workers; not known before one is there
        self._kept: dict[bytes, Any] = {}  # functions that the workers keep, by their content
        self._asked: dict[Any, Future[Any]] = {}  # what dask has not answered, and what is told of it
        self._done: SimpleQueue[Any] = SimpleQueue()
        self._lock = threading.Lock()
        self._collector: threading.Thread | None = None

    def kept(self, function: Callable[..., Any]) -> Any:
        """The function as the result of a task, which dask computes again where it is lost. Its code is sent: workers
        need neither hzo nor torch. Raises what ``cloudpickle`` raises where it cannot be written down."""
        content = importlib.import_module("cloudpickle").dumps(function)
        key = sha256(content).digest()
        if key not in self._kept:
            self._be_ready()
            while len(self._kept) >= _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._client.submit(pickle.loads, content, **self._options)
        return self._kept[key]

    def submit_all(self, kept: Any, given: Sequence[Any]) -> list[Future[Any]]:
        """``function(one)`` for each of ``given``, with a function from ``kept``.

        Raises:
            QueryError: there is no worker within ``start_limit()`` seconds. RuntimeError: it was shut down.
        """
        self._be_ready()
        written = [pickle.dumps(one) for one in given]  # dask would look for its own futures in lists
        asked = self._client.map(_call, [kept] * len(written), written, **self._options)
        futures: list[Future[Any]] = [Future() for _ in asked]
        with self._lock:
            self._asked.update(zip(asked, futures, strict=True))
            if self._collector is None:  # it ends when all is answered: an executor need not be shut down
                self._collector = threading.Thread(target=self._collect, name="hzo-dask", daemon=True)
                self._collector.start()
        for one, future in zip(asked, futures, strict=True):
            one.add_done_callback(self._done.put)
            future.add_done_callback(partial(_cancelled, one))
        return futures

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run one call in a worker."""
        return self.submit_all(self.kept(partial(_applied, fn)), [(args, kwargs)])[0]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End dask's executor, or the client, that this one stands for; calls that run are lost."""
        with self._lock:
            asked, self._asked = self._asked, {}
        for future in asked.values():
            future.cancel()
        self._kept = {}
        if self._owner is self._client:
            self._client.close()
        else:
            self._owner.shutdown(wait=wait and not cancel_futures)

    # -- workers ---

    def _be_ready(self) -> None:
        ended = self._owner is not self._client and getattr(self._owner, "_shutdown", False)
        if ended or self._client.status in ("closed", "closing"):
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._max_workers:
            return
        limit = start_limit()
        try:
            self._client.wait_for_workers(1, timeout=limit)
        except TimeoutError as error:
            raise self._no_workers(limit) from error
        self._max_workers = sum(self._client.nthreads().values())

    def _no_workers(self, limit: float) -> QueryError:
        return QueryError(
            f"dask has had no worker for {limit:g} seconds; the logs of its workers tell why they do not start. Where "
            "they wait for a machine, wait for them before (client.wait_for_workers(1)), or allow more seconds: "
            "HZO_CONNECT_SECONDS"
        )

    # -- results ---

    def _collect(self) -> None:
        alone = None  # since when there has been no worker
        while True:
            with self._lock:
                if not self._asked:
                    self._collector = None
                    return
            arrived = []
            with suppress(Empty):
                arrived.append(self._done.get(timeout=_LOOK))
                while True:
                    arrived.append(self._done.get_nowait())
            if arrived:
                alone = None
                self._hand_over(arrived)
            elif self._has_workers():
                alone = None
            else:
                alone = monotonic() if alone is None else alone
                if monotonic() - alone > (limit := start_limit()):
                    self._give_up(self._no_workers(limit))

    def _hand_over(self, arrived: Sequence[Any]) -> None:
        finished = [one for one in arrived if one.status == "finished" and one in self._asked]

        async def gathered() -> Any:
            return await self._client.gather(finished, asynchronous=True)

        results: dict[Any, Any] = {}
        with suppress(Exception):  # one of them was lost since: dask computes it again
            # With a limit: what is lost may have no worker to be computed in.
            results = dict(zip(finished, self._client.sync(gathered, callback_timeout=10 * _LOOK), strict=True))
        for one in arrived:
            if one not in results and one.status not in ("error", "cancelled"):
                if one in self._asked:
                    one.add_done_callback(self._done.put)
                continue
            with self._lock:
                future = self._asked.pop(one, None)
            if future is None or not future.set_running_or_notify_cancel():
                continue
            if one in results:
                future.set_result(results[one])
                continue
            try:
                future.set_result(one.result())
            except BaseException as error:  # it is handed on
                future.set_exception(error)

    def _has_workers(self) -> bool:
        try:
            return bool(self._client.nthreads())
        except Exception:  # of whatever kind: there is no scheduler to ask
            return False

    def _give_up(self, error: QueryError) -> None:
        with self._lock:
            asked, self._asked, self._max_workers = self._asked, {}, 0
        for one, future in asked.items():
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            with suppress(Exception):
                one.cancel()


def _cancelled(asked: Any, future: Future[Any]) -> None:
    if future.cancelled():
        with suppress(Exception):  # there is no connection, and nothing to cancel
            asked.cancel()


def _made() -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Functions within a function are sent as code.
    def call(function: Callable[..., Any], given: bytes) -> Any:
        return function(pickle.loads(given))

    def applied(function: Callable[..., Any], given: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Any:
        args, kwargs = given
        return function(*args, **kwargs)

    return call, applied


_call, _applied = _made()

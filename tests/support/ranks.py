"""Several processes that form a process group (gloo, by a file), each running one function of a module that they can
import, as it would be under torchrun."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hzo.errors import HzoError


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: what its task returned, or its error, as ``Type: message``; None for a rank that was killed
    or left waiting."""

    result: Any = None
    error: str | None = None
    status: int | None = None
    seconds: float = 0.0


def run(task: Callable[..., Any], ranks: int, *args: Any, limit: float = 120.0, timeout: float = 30.0) -> list[Outcome]:
    """``task(rank, *args)`` in each of ``ranks`` processes.

    Args:
        limit: seconds until all are killed. timeout: of the process group's collectives.
    """
    context = multiprocessing.get_context("spawn")
    found: list[Outcome | None] = [None] * ranks
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(target=_main, args=(task, rank, ranks, str(Path(folder) / "store"), timeout, end[1], args))
            for rank, end in enumerate(ends)
        ]
        for process in processes:
            process.start()
        for _, sending in ends:
            sending.close()
        stop = time.monotonic() + limit
        try:
            for rank, (receiving, _) in enumerate(ends):
                if receiving.poll(max(0.0, stop - time.monotonic())):
                    try:
                        found[rank] = receiving.recv()
                    except EOFError:  # killed
                        processes[rank].join(5)
        finally:
            for process in processes:
                process.join(1)
                if process.is_alive():
                    process.kill()
                    process.join()
    return [one or Outcome(status=p.exitcode) for one, p in zip(found, processes, strict=True)]


def results(task: Callable[..., Any], ranks: int, *args: Any, limit: float = 120.0) -> list[Any]:
    """What ``task`` returned on each rank; an error where it failed on one."""
    outcomes = run(task, ranks, *args, limit=limit)
    assert all(o.error is None and o.status is None for o in outcomes), outcomes
    return [o.result for o in outcomes]


def _main(
    task: Callable[..., Any], rank: int, ranks: int, store: str, timeout: float, pipe: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    began = time.monotonic()
    try:
        outcome = Outcome(task(rank, *args), seconds=time.monotonic() - began)
    except (HzoError, RuntimeError) as error:
        outcome = Outcome(error=f"{type(error).__name__}: {error}", seconds=time.monotonic() - began)
    pipe.send(outcome)
    pipe.close()
    torch.distributed.destroy_process_group()

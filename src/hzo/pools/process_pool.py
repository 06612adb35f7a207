"""Processes of this machine as workers: what ``workers=`` makes."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor


def processes(workers: int) -> ProcessPoolExecutor:
    """So many processes that answer calls.

    They are forks of this one where the system has forks (as PyTorch's data loaders are): a script needs no
    ``if __name__ == "__main__"``, and a notebook's functions are known to them. On a system without, they are new.
    """
    way = "fork" if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin" else "spawn"
    return ProcessPoolExecutor(workers, multiprocessing.get_context(way), initializer=_one_thread)


def _one_thread() -> None:
    """Workers are as many as there are cores: one thread each. And one that a fork of a pool of threads still has."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)

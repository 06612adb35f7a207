"""The processes of one run: one, or those that ``torchrun`` started. The first of them alone writes."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from hzo._options import seconds_set
from hzo.distributed import Shares, shared
from hzo.errors import DistributedError, HzoError

T = TypeVar("T")


def _patience() -> float:
    """Seconds that a process waits for another in the middle of a run."""
    return seconds_set("HZO_WAIT_SECONDS", 600.0)


class Ranks:
    """This process among those of a run.

    Attributes:
        rank, size: of a run by one process 0 and 1.
    """

    def __init__(self, rank: int = 0, size: int = 1, mesh: Any = None) -> None:
        self.rank, self.size = rank, size
        self._mesh = mesh

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, shows and measures."""
        return self.rank == 0

    def share(self, indices: Tensor) -> Tensor:
        """This process's samples of a batch: as even a part as there is, in order."""
        count = len(indices)
        return indices[self.rank * count // self.size : (self.rank + 1) * count // self.size]

    @contextmanager
    def together(self, model: nn.Module, x: Tensor, y: Tensor, how: str) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yields what makes of every process's ``.grad`` and loss those of the whole batch.

        Inside, an error of one process is one of all; before, they compare parameters, method and batch.
        """
        if self.size == 1:
            yield lambda loss: loss
            return
        with shared(self._mesh, model, x, y, how, _patience()) as (here, weight):

            def mean(loss: Tensor) -> Tensor:
                own = [(p, p.grad) for p in model.parameters() if p.grad is not None]
                found, whole = here.finish(model, own, loss.detach().double().cpu(), weight)
                for p, g in found:
                    p.grad = g
                return whole

            yield mean

    def gathered(self, value: T) -> list[T]:
        """What every process says, in order."""
        if self.size == 1:
            return [value]
        return Shares(self._mesh, _patience()).told_by_all(value)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each question whether one process says yes."""
        return tuple(map(any, zip(*self.gathered(flags), strict=True)))

    def total(self, *numbers: int) -> tuple[int, ...]:
        """Sums over the processes."""
        return tuple(map(sum, zip(*self.gathered(numbers), strict=True)))

    def on_first(self, do: Callable[[], T]) -> T:
        """What the first process finds when it does something, on all of them; its error, too."""
        found: Any = None
        failure: HzoError | None = None
        if self.first:
            try:
                found = do()
            except HzoError as error:
                failure = error
        found, message = self.gathered((found, None if failure is None else str(failure)))[0]
        if failure is not None:
            raise failure
        if message is not None:
            raise DistributedError(f"the first process failed: {message}")
        return found  # type: ignore[no-any-return]


def restarted() -> bool:
    """Whether ``torchrun`` has started this process anew, after one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def run_id() -> str | None:
    """The name that ``torchrun`` has for this run; None without it."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


@lru_cache(maxsize=1)
def ranks(device: str = "cpu") -> Ranks:
    """The processes of this run, connected the first time.

    Raises:
        DistributedError: they cannot reach each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if torch.distributed.is_torchelastic_launched() else 1
    if size == 1:
        return Ranks()
    limit = seconds_set("HZO_CONNECT_SECONDS", 60.0)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    try:
        wait = timedelta(seconds=limit)
        # A client of torch's store gives up after one to two and a half times of what it is given.
        serves = os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        once = wait if serves else 0.4 * wait
        store, rank, _ = next(rendezvous("env://", timeout=once))
        # torchrun keeps its store when it starts processes anew, with the addresses of those before.
        fresh = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        torch.distributed.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=wait)
        mesh = torch.distributed.device_mesh.init_device_mesh(
            device.partition(":")[0], (size,), mesh_dim_names=("sample",)
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise DistributedError(
            f"the {size} processes of this run cannot reach each other at {address} within {limit:g} seconds "
            f"({str(error).splitlines()[0][:120]}); check the address and the port (torchrun --rdzv-endpoint), and "
            "that all were started"
        ) from error
    atexit.register(_leave)
    return Ranks(torch.distributed.get_rank(), size, mesh)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

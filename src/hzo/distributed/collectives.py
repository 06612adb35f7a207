"""Collectives inside of a model: what one process computes then depends on the others, whom a query does not know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hzo.errors import DistributedError

_NAMESPACES = frozenset(("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional"))


def is_collective(func: Any) -> bool:
    """Whether an operator sends tensors to other processes, or waits for theirs."""
    return getattr(func, "namespace", None) in _NAMESPACES


def collective_in(what: str, func: Any, instead: str) -> DistributedError:
    """The error for a collective where its result cannot be followed.

    Args:
        what: where it ran. instead: the way that works.
    """
    return DistributedError(f"a collective ({func}) ran in {what}; {instead}")


@contextmanager
def without_collectives(what: str) -> Iterator[None]:
    """Inside, a collective is an error: of code that is run at perturbed states, on every process at its own.

    All processes would perturb their part of its result at once, and none would see the slope of its own. Cost: nothing
    where there is one process; else some microseconds for every operator inside. Source: ours.

    Raises:
        DistributedError: before anything is sent.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        yield
        return
    with _Watch(what):
        yield


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._what = what

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As of the recorder: PyTorch would import its compiler."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What a DTensor sends it sends below this mode.
        if is_collective(func) or any(kind.__name__ == "DTensor" for kind in types):
            raise collective_in(
                self._what,
                func,
                "queries perturb it on every process at once, and would not tell whose part of the result is whose. "
                "Keep it outside of what is perturbed, or take hzo.record() or hzo.backward(model, loss_fn, x, y) "
                "without a plan, which follow collectives that are custom Functions (torch.distributed.nn.functional)",
            )
        return func(*args, **(kwargs or {}))

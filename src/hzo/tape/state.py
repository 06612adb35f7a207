"""What a call starts from beside its operands: random states, and the buffers of a module."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

RandomState = dict[str, Tensor]


def captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that nothing is computed yet and no number can be looked at."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def used_devices() -> tuple[torch.device, ...]:
    """Devices beside the CPU whose generators code may draw from; none while a CUDA graph is captured.

    What a graph draws is drawn at every repetition; to ask for a state, or to set one, would end the capture.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ()
    if torch.cuda.is_current_stream_capturing():
        return ()
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))


def random_state(devices: Iterable[torch.device]) -> RandomState:
    """The state of the random generators that code on these devices may draw from; the CPU's always."""
    state = {"cpu": torch.get_rng_state()}
    for device in devices:
        if device.type == "cuda":
            state[str(device)] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: RandomState) -> None:
    """Go back to a state saved by ``random_state``."""
    for device, saved in state.items():
        if device == "cpu":
            torch.set_rng_state(saved)
        else:
            torch.cuda.set_rng_state(saved, device)


def restorer(source: Any) -> Callable[[], object] | None:
    """A function that puts a source of random numbers back to its present state; None for anything else.

    Sources are generators of PyTorch, Python (``random.Random``, and the module ``random`` itself) and NumPy.
    """
    if isinstance(source, torch.Generator):
        return partial(source.set_state, source.get_state())
    if isinstance(source, random.Random) or source is random:
        return partial(source.setstate, source.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(source, numpy.random.Generator):
        bits = source.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if isinstance(source, numpy.random.RandomState) or source is numpy.random:
        return partial(source.set_state, source.get_state())
    return None


def shared_restorers() -> list[Callable[[], object]]:
    """Functions that put the generators of Python and NumPy that all code shares back to their present states."""
    shared = (random, getattr(sys.modules.get("numpy"), "random", None))
    return [back for source in shared if (back := restorer(source)) is not None]


@dataclass(frozen=True)
class OperationState:
    """What an operation that is not pure started from: random state, and the buffers of its module with copies."""

    random: RandomState
    buffers: tuple[tuple[Tensor, Tensor], ...] = ()
    drew: bool = True  # random numbers
    moved: bool = False  # buffers

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, everything is as it was when the operation ran; outside, nothing has moved."""
        now = random_state(torch.device(device) for device in self.random)
        current = [(buffer, buffer.clone()) for buffer, _ in self.buffers]
        try:
            set_random_state(self.random)
            with torch.no_grad():
                for buffer, saved in self.buffers:
                    buffer.copy_(saved)
            yield
        finally:
            set_random_state(now)
            with torch.no_grad():
                for buffer, saved in current:
                    buffer.copy_(saved)

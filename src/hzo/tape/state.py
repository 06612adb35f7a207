"""What a call starts from beside its operands: random states, and the buffers of a module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RandomState = dict[str, Tensor]


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

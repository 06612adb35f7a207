"""Random numbers of a forward pass, drawn again by every query: torch's generators, NumPy's and Python's global
ones."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hzo.execution import RandomState, random_state, set_random_state


@dataclass(frozen=True)
class Randomness:
    """All global generators that a part may draw from, as they stood."""

    torch: RandomState
    python: Any
    numpy: Any

    def put_back(self) -> None:
        """Draw from here on what was drawn then."""
        set_random_state(self.torch)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Randomness):
            return False
        same = self.python == other.python and self.torch.keys() == other.torch.keys()
        same = same and all(torch.equal(state, other.torch[name]) for name, state in self.torch.items())
        return same and _key(self.numpy) == _key(other.numpy)

    __hash__ = None  # type: ignore[assignment]


def _key(state: Any) -> Any:
    return None if state is None else (state[1].tobytes(), state[2:])


def randomness(devices: Iterable[torch.device]) -> Randomness:
    """The generators that code on these devices may draw from."""
    numpy = sys.modules.get("numpy")
    return Randomness(random_state(devices), random.getstate(), None if numpy is None else numpy.random.get_state())

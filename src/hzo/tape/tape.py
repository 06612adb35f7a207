"""The tape: a finished recording, in single-assignment form."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hzo.errors import TapeError
from hzo.tape.absent import Absent
from hzo.tape.operations import Operation, Ref, Value
from hzo.tape.state import OperationState


@lru_cache(maxsize=1024)
def _absent(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return Absent(torch.empty(shape, dtype=dtype, device="meta"))


class Tape:
    """A recorded step: operations in the order in which they ran, the values between them, and what these held.

    Attributes:
        operations: calls in order. values: what they read and made; a leaf was there before the recording.
        tensors: what each value held. None for content that no rule reads (see ``Recorder``), and behind a sweep.
        leaves: the tensors that a gradient is for, by value.
        states: what operations started from that draw random numbers or move buffers inside, by their index.
        tainted: leaves that were computed from tensors which the recorder was told to follow.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.values: list[Value] = []
        self.tensors: list[Tensor | None] = []
        self.leaves: dict[int, Tensor] = {}
        self.states: dict[int, OperationState] = {}
        self.tainted: set[int] = set()
        self._index: dict[int, int] = {}  # id of a tensor alive -> its newest value

    def tensor(self, value: int) -> Tensor:
        """What a value held.

        Raises:
            TapeError: its memory was overwritten in place and nothing had asked to keep it, or it was released.
        """
        tensor = self.tensors[value]
        if tensor is None:
            raise TapeError(
                f"value %{value} {self.values[value]!r} is gone: the sweep released it, or code wrote over it in "
                "place. Where a hook or a backward of yours takes a derivative of what was recorded, say "
                "tape.backward(loss, retain_graph=True); otherwise please report this, with the model"
            )
        return tensor

    def resolve(self, arguments: Any) -> Any:
        """Arguments with tensors in place of references; one without content where code wrote over it.

        PyTorch's own derivatives would not read those, and neither do rules; their shape and dtype are right.
        """
        if type(arguments) is tuple:
            tensors = self.tensors
            found = []
            for a in arguments:
                if type(a) is Ref:
                    tensor = tensors[a.value]
                    found.append(self.without_content(a.value) if tensor is None else tensor)
                else:
                    found.append(self.resolve(a) if type(a) is tuple else a)
            return tuple(found)
        if type(arguments) is Ref:
            tensor = self.tensors[arguments.value]
            return self.without_content(arguments.value) if tensor is None else tensor
        return arguments

    def without_content(self, value: int) -> Tensor:
        """A tensor of a value's shape and dtype that takes no memory; computing with it is an error."""
        about = self.values[value]
        return _absent(about.shape, about.dtype)

    def value_of(self, tensor: Tensor) -> int | None:
        """The value that a tensor of the recorded code holds; None for one that the recording never saw."""
        return self._index.get(id(tensor))

    def __repr__(self) -> str:
        kinds = len({op.target for op in self.operations})
        return (
            f"<Tape: {len(self.operations)} calls of {kinds} operators, {len(self.leaves)} leaves that want a "
            "gradient; print() lists them>"
        )

    def __str__(self) -> str:
        lines = [f"%{k} = leaf {self.values[k]!r}" for k, v in enumerate(self.values) if v.producer < 0]
        return "\n".join(lines + [repr(op) for op in self.operations])

"""The parts of a tape: references, values and operations. Data only; record.py writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class Ref:
    """The place of a value among the arguments of an operation. There is one object for each number: ``ref(k)``."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"%{self.value}"


_REFS: list[Ref] = []


def ref(value: int) -> Ref:
    """The reference to a value; always the same object, so that references compare and hash by identity."""
    while len(_REFS) <= value:
        _REFS.append(Ref(len(_REFS)))
    return _REFS[value]


class Value:
    """A tensor at one moment: what an operation made, or what was there before the recording began.

    Attributes:
        shape, dtype, device: of the tensor.
        requires: whether autograd would carry a gradient to it.
        producer: index of the operation that made it; -1 for a leaf.
        weight: whether it was computed from parameters alone; no weight is read to carry a cotangent to an activation.
        foreign: where its history is not on the tape: what made it, and the way on, for the error.
    """

    __slots__ = ("device", "dtype", "foreign", "producer", "requires", "shape", "weight")

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        requires: bool,
        producer: int,
        weight: bool,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.requires = requires
        self.producer = producer
        self.weight = weight
        self.foreign: str | None = None

    def __repr__(self) -> str:
        marks = "".join(f" {name}" for name in ("requires", "weight") if getattr(self, name))
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}{marks}"


class Operation:
    """One call: an ATen operator, a custom Function, or a step that in-place code implies.

    Attributes:
        target: what was called, in its form without side effects.
        args, kwargs: its arguments, with a ``Ref`` in place of every tensor and tuples in place of lists.
        writes: the values it made, in the order of its results; None for a result that is no tensor.
        scope: the module whose forward was running, as its qualified name; empty outside all modules.
    """

    __slots__ = ("args", "index", "kwargs", "scope", "target", "writes")

    def __init__(
        self,
        index: int,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        writes: tuple[int | None, ...],
    ) -> None:
        self.index = index
        self.target = target
        self.args = args
        self.kwargs = kwargs
        self.writes = writes

    @property
    def name(self) -> str:
        """What was called, as PyTorch prints it."""
        return str(self.target)

    def reads(self) -> Iterator[int]:
        """The values among the arguments, one by one as they stand there."""
        yield from refs_in(self.args)
        if self.kwargs:
            yield from refs_in(tuple(self.kwargs.values()))

    def __repr__(self) -> str:
        made = ", ".join("_" if v is None else f"%{v}" for v in self.writes)
        given = ", ".join([*(repr(a) for a in self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())])
        return f"{made} = {self.name}({given})"


def refs_in(arguments: tuple[Any, ...]) -> Iterator[int]:
    """The values that arguments refer to, nested tuples included."""
    for argument in arguments:
        if type(argument) is Ref:
            yield argument.value
        elif type(argument) is tuple:
            yield from refs_in(argument)

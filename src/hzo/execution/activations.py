"""What a base pass leaves for queries and rules: its tape, with the content of every value."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from hzo.tape import Operation, Recorder, Tape
from hzo.tracing import Graph


@dataclass
class Activations:
    """A base pass as it ran. The tape's operations are those of the graph, with arguments for this batch.

    Attributes:
        batch: samples. tape: what was recorded; its tensors have no history.
        recorder: what recorded it, of which custom Functions get back what they saved.
    """

    batch: int
    tape: Tape
    recorder: Recorder | None = None

    @property
    def values(self) -> list[Tensor | None]:
        """What every value held."""
        return self.tape.tensors

    def tensor(self, value: int) -> Tensor:
        """What a value held."""
        return self.tape.tensor(value)

    def operation(self, index: int) -> Operation:
        """An operation with its arguments for this batch."""
        return self.tape.operations[index]

    def again(self) -> Activations:
        """The same, to release values without taking them from this one."""
        tape = copy(self.tape)
        tape.tensors = list(self.tape.tensors)
        return Activations(self.batch, tape, self.recorder)

    def release(self, graph: Graph, values: Iterable[int]) -> None:
        """Free the memory of these values; a tensor that takes none keeps their shape, dtype and device.

        Whoever reads one by mistake gets NaN, which no estimate survives, or the least integer, which is no index.
        """
        for value in values:
            tensor, about = self.tape.tensors[value], graph.values[value]
            if about.batched and tensor is not None:
                dtype = tensor.dtype
                integer = dtype != torch.bool and not dtype.is_floating_point and not dtype.is_complex
                nothing = torch.iinfo(dtype).min if integer else False if dtype == torch.bool else float("nan")
                self.tape.tensors[value] = tensor.new_full((), nothing).expand(tensor.shape)

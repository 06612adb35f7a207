"""One recorded training step: ``with hzo.record() as tape: loss = …``, then ``tape.backward(loss)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hzo.errors import InputError
from hzo.reverse.sweep import sweep
from hzo.tape import Recorder
from hzo.tape.surroundings import recording


class RecordedStep:
    """What ``hzo.record`` wrote down; ``backward`` turns it into gradients."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.tape = recorder.tape

    def gradients(self, loss: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a leaf and its gradient of the loss; ``.grad`` is left alone."""
        value = self._recorder.read(loss)
        seed = torch.ones_like(loss) if loss.dim() == 0 else torch.full_like(loss, 1 / loss.numel())
        with torch.no_grad():
            found = sweep(self.tape, {value: seed}, self._hooks())
        return [(self.tape.leaves[v], g) for v, g in found.items()]

    def _hooks(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {}

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss to ``.grad`` of every leaf, as ``loss.backward()`` would."""
        if not isinstance(loss, Tensor):
            raise InputError(f"expected the loss, a tensor, got {type(loss).__name__}")
        for leaf, gradient in self.gradients(loss):
            if leaf.grad is None:
                leaf.grad = torch.empty_like(leaf).copy_(gradient)
            else:
                leaf.grad += gradient


@contextmanager
def record(keep: bool = False) -> Iterator[RecordedStep]:
    """Record what a training step computes."""
    recorder = Recorder(keep)
    with recording(recorder):
        yield RecordedStep(recorder)


def gradient_of(step: RecordedStep, loss: Tensor) -> dict[int, Any]:
    """By id of the leaf."""
    return {id(leaf): g for leaf, g in step.gradients(loss)}

"""One call of a function, recorded, and the map from cotangents of its outputs to those of all it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hzo.errors import TapeError
from hzo.reverse.step import record
from hzo.reverse.walk import sweep


class Pullback:
    """The vector-Jacobian product of one call, by the rules of what it ran; made by ``recorded_call``.

    Attributes:
        outputs: the tensors that came out and carry a gradient.
        leaves: what they depend on: parameters, inputs, other tensors that require a gradient.
        read: leaves and outputs whose content the product reads: where one is written to, it is wrong.
    """

    def __init__(self, step: Any, outputs: Sequence[Tensor]) -> None:
        recorder = step._recorder
        self._step, self._tape = step, step.tape
        self.outputs = list(outputs)
        self._values = [recorder.read(t) for t in outputs]
        self._hooks = step._hooks()
        reached = self._reached(self._values)
        self._leaf_values: dict[int, list[int]] = {}  # one tensor may stand for two leaves
        tensors: dict[int, Tensor] = {}
        for value, leaf in self._tape.leaves.items():
            if value in reached:
                self._leaf_values.setdefault(id(leaf), []).append(value)
                tensors[id(leaf)] = leaf
        self.leaves = list(tensors.values())
        self.read = recorder.read_by_derivatives((*self.leaves, *self.outputs))
        self._swept = False
        recorder.release()

    def _reached(self, values: Iterable[int]) -> set[int]:
        """The values that these depend on, themselves among them."""
        reached = set(values)
        for op in reversed(self._tape.operations):
            if any(v in reached for v in op.writes):
                reached.update(v for v in op.reads() if self._tape.values[v].requires)
        return reached

    def __call__(self, cotangents: Sequence[Tensor | None], *, keep: bool = False) -> list[Tensor | None]:
        """For each leaf its cotangent; None where no output that has one depends on it.

        Args:
            cotangents: for each output, or None. keep: what the recording holds, for another time.

        Raises:
            TapeError: it was released before, or the way leads through something that was not recorded.
        """
        if self._swept:
            raise TapeError(
                "a second backward pass through one forward pass, whose recording was released; say retain_graph=True "
                "the first time, or add the losses up"
            )
        self._swept = not keep
        seeds: dict[int, Tensor] = {}
        for value, g in zip(self._values, cotangents, strict=True):
            if g is not None:
                seeds[value] = seeds[value] + g if value in seeds else g
        if not seeds:
            return [None] * len(self.leaves)
        device = self.outputs[0].device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            found = sweep(self._tape, dict(seeds), self._hooks, free=not keep and not self._hooks)
        reached = self._reached(seeds)
        result: list[Tensor | None] = []
        for leaf in self.leaves:
            values = self._leaf_values[id(leaf)]
            parts = [found[v] for v in values if v in found]
            if parts:
                result.append(sum(parts[1:], parts[0]))
            else:  # a derivative that is zero wherever it exists is one, as for autograd
                result.append(torch.zeros_like(leaf) if any(v in reached for v in values) else None)
        return result


def recorded_call(
    f: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors_of: Callable[[Any], Sequence[Any]],
    modules: Sequence[nn.Module] = (),
) -> tuple[Any, Pullback | None]:
    """What ``f`` returns for these arguments, and the pullback of this call; None where nothing carries a gradient.

    Args:
        tensors_of: the leaves of a nested result. modules: see ``hzo.record``.

    Tensors among the arguments that require a gradient must be leaves. Cost: a forward pass. Source: ours.
    """
    with record(*modules) as step:
        result = f(*args, **kwargs)
    outputs = [t for t in tensors_of(result) if isinstance(t, Tensor) and t.requires_grad and _made_here(step, t)]
    return result, Pullback(step, outputs) if outputs else None


def _made_here(step: Any, tensor: Tensor) -> bool:
    """Whether the recording knows how a tensor came about; autograd goes on with others by itself."""
    recorder = step._recorder
    return step.tape.values[recorder.read(tensor)].foreign is None

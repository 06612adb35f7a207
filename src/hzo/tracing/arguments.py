"""Arguments of a recorded call: what stands for a value, a parameter or a batch size, and walks over nested ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hzo.errors import TraceError


@dataclass(frozen=True)
class Ref:
    """An argument that is a value of the graph."""

    value: int


@dataclass(frozen=True)
class Attribute:
    """An argument that is a parameter or buffer; looked up when the operation runs, so that it may move or change."""

    owner: nn.Module
    name: str

    def get(self) -> Tensor:
        tensor = getattr(self.owner, self.name)
        assert isinstance(tensor, Tensor)
        return tensor


@dataclass(frozen=True)
class Extent:
    """An integer argument proportional to the batch size, such as the 6 of ``x.view(6, -1)`` for a batch of 2."""

    per_sample: int


def map_arguments(function: Callable[[Any], Any], argument: Any) -> Any:
    """Apply ``function`` to every leaf of nested tuples, lists, dicts and slices, keeping their structure."""
    if isinstance(argument, (tuple, list)):
        if isinstance(argument, PackedSequence):
            raise TraceError(
                "the model packs sequences (PackedSequence), which mixes samples in one dimension; a plan cannot "
                "tell them apart: take the gradient without a plan (hzo.backward(model, ...) or hzo.record())"
            )
        items = [map_arguments(function, item) for item in argument]
        if hasattr(argument, "_fields"):
            return type(argument)(*items)
        return tuple(items) if isinstance(argument, torch.Size) else type(argument)(items)
    if isinstance(argument, dict):
        return {key: map_arguments(function, item) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*(map_arguments(function, part) for part in (argument.start, argument.stop, argument.step)))
    return function(argument)


def leaves(argument: Any) -> Iterator[Any]:
    """The leaves of a nested argument, in the order of ``map_arguments``."""
    if isinstance(argument, (tuple, list)):
        for item in argument:
            yield from leaves(item)
    elif isinstance(argument, dict):
        for item in argument.values():
            yield from leaves(item)
    elif isinstance(argument, slice):
        yield from (argument.start, argument.stop, argument.step)
    else:
        yield argument


def tensors_in(argument: Any) -> list[Tensor]:
    """The tensors among the leaves."""
    return [leaf for leaf in leaves(argument) if isinstance(leaf, Tensor)]

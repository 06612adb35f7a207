"""Walks over nested arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def map_arguments(function: Callable[[Any], Any], argument: Any) -> Any:
    """Apply ``function`` to every leaf of nested tuples, lists, dicts and slices, keeping their structure."""
    if isinstance(argument, (tuple, list)):
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

"""Walks over nested arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from copy import copy
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


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


def map_output(function: Callable[[Any], Any], output: Any, _inside: tuple[int, ...] = ()) -> Any:
    """Apply ``function`` to every leaf of what a model returns, in copies of whatever holds a leaf that changes.

    Looked into are what PyTorch knows as trees (tuples, lists, dicts, outputs of transformers), dataclasses, and plain
    objects with attributes.
    """
    if isinstance(output, Tensor) or id(output) in _inside:
        return function(output)
    inside = (*_inside, id(output))
    children, form = pytree.tree_flatten(output, is_leaf=lambda part: part is not output)
    if len(children) != 1 or children[0] is not output:
        made = [map_output(function, child, inside) for child in children]
        return output if _same(made, children) else pytree.tree_unflatten(made, form)
    if isinstance(output, MutableMapping):
        held = dict(output.items())
    else:
        held = _held(output)
        if not held:
            return function(output)
    made = [map_output(function, value, inside) for value in held.values()]
    if _same(made, held.values()):
        return output
    copied = copy(output)
    for name, value in zip(held, made, strict=True):
        if isinstance(copied, MutableMapping):
            copied[name] = value
        else:
            object.__setattr__(copied, name, value)
    return copied


def _same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(some, others, strict=True))


def _held(output: Any) -> dict[str, Any]:
    """The attributes of a dataclass, or of an object that is neither a module nor code."""
    if isinstance(output, type) or callable(output):
        return {}
    if dataclasses.is_dataclass(output):
        names = (field.name for field in dataclasses.fields(output))
        return {name: getattr(output, name) for name in names if hasattr(output, name)}
    plain = type(output).__module__ not in _OF_PYTHON and not isinstance(output, Enum)
    return dict(getattr(output, "__dict__", {})) if plain else {}


_OF_PYTHON = frozenset(("builtins", "torch", "numpy", "hzo.tape.operations"))


def output_leaves(output: Any) -> list[Any]:
    """The leaves of what a model returns, in the order of ``map_output``."""
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    map_output(note, output)
    return found


def tensors_in(argument: Any) -> list[Tensor]:
    """The tensors among the leaves."""
    return [leaf for leaf in leaves(argument) if isinstance(leaf, Tensor)]

"""Steps and bounds of a box's inputs: for all, for each input, or for each element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hzo._options import positive
from hzo.errors import InputError

MEASURED = "measured"


def _tensor(value: Any) -> Tensor | None:
    """Arrays and tensors as a tensor; None for what is neither."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.as_tensor(value) if type(value).__module__ == "numpy" and hasattr(value, "shape") else None


def _each(given: Any, what: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """What is given for each leaf: one for all, by the name of an argument, or in the order of the inputs.

    Args:
        names, shapes: of the leaves; shapes are those of one sample.
    """
    inputs = list(dict.fromkeys(names))
    if isinstance(given, Mapping):
        unknown = [key for key in given if str(key) not in inputs]
        if unknown:
            raise InputError(f"{what} names {unknown[0]!r}, and the part was called with {', '.join(inputs)}")
        by_name = {str(key): value for key, value in given.items()}
        return [by_name.get(name) for name in names]
    array = _tensor(given)
    if array is not None and array.dim() == 1 and len(inputs) > 1:
        if array.numel() == len(inputs):
            if any(len(shape) and shape[-1] == array.numel() for shape in shapes):
                raise InputError(
                    f"{what}: {array.numel()} numbers may be one for each of {len(inputs)} inputs or one for each of "
                    f"so many elements; say which: a list with an entry for each input, or a dict by their names"
                )
            return [float(array[inputs.index(name)]) for name in names]
        return [given for _ in names]
    if isinstance(given, (list, tuple)):
        if len(inputs) == 1 and all(isinstance(v, (int, float)) for v in given) and len(given) != 1:
            return [torch.tensor(given, dtype=torch.float64) for _ in names]
        if len(given) != len(inputs):
            raise InputError(
                f"{what} has {len(given)} entries for {len(inputs)} inputs ({', '.join(inputs)}); give one for each, "
                "or a dict by their names"
            )
        return [given[inputs.index(name)] for name in names]
    return [given for _ in names]


@dataclass(frozen=True)
class Steps:
    """``step`` of ``hzo.blackbox``: None, a number, ``"measured"``; one for each input in a list, tuple or dict; a
    tensor for the elements of a sample. ``relative``: they are shares of the size of each element."""

    given: Any = None
    relative: bool = False

    def __post_init__(self) -> None:
        _check_step(self.given)

    def of(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[Any]:
        """For each leaf: None, ``"measured"``, a number, or a tensor that expands to a sample."""
        found = _each(self.given, "step", names, shapes)
        for value, name, shape in zip(found, names, shapes, strict=True):
            array = _tensor(value)
            if array is not None:
                _check_expands(array, shape, f"step of {name}")
        return found

    @property
    def measured(self) -> bool:
        """Whether any is to be measured."""
        values = self.given.values() if isinstance(self.given, Mapping) else self.given
        several = isinstance(self.given, (list, tuple, Mapping))
        return any(isinstance(v, str) for v in values) if several else isinstance(self.given, str)


def _check_step(given: Any) -> None:
    if given is None or (isinstance(given, str) and given == MEASURED):
        return
    array = _tensor(given)
    if array is not None:
        if not array.numel() or not bool((array > 0).all()) or not bool(array.isfinite().all()):
            raise InputError("expected a positive finite step for each element, got a tensor with another number")
        return
    if isinstance(given, Mapping):
        for value in given.values():
            _check_step(value)
        return
    if isinstance(given, (list, tuple)):
        for value in given:
            _check_step(value)
        return
    if isinstance(given, str):
        raise InputError(
            f"expected step to be a number, a tensor, one for each input, 'measured' or None, got {given!r}"
        )
    positive("step", given, "step=None chooses one from dtype and scale")


def _check_expands(array: Tensor, shape: tuple[int, ...], what: str) -> None:
    try:
        torch.broadcast_to(array, shape)
    except RuntimeError as error:
        raise InputError(
            f"{what} has shape {tuple(array.shape)} and does not expand to a sample of shape {shape}"
        ) from error


@dataclass(frozen=True)
class Bounds:
    """``bounds`` of ``hzo.blackbox``: None, a pair (low, high) of numbers, tensors or None; or one for each input."""

    given: Any = None

    def __post_init__(self) -> None:
        if self.given is None:
            return
        if not isinstance(self.given, (list, tuple, Mapping)):
            raise InputError(f"expected bounds to be a pair (low, high), or one for each input, got {self.given!r}")
        if self._one(self.given):
            pairs = [self.given]
        else:
            pairs = list(self.given.values() if isinstance(self.given, Mapping) else self.given)
        for pair in pairs:
            if pair is None:
                continue
            if not self._one(pair):
                raise InputError(f"expected bounds to be a pair (low, high), or one for each input, got {self.given!r}")
            low, high = (None if v is None else torch.as_tensor(v, dtype=torch.float64) for v in pair)
            if low is not None and high is not None and not bool((low < high).all()):
                raise InputError(f"expected bounds with low < high, got {pair!r}")

    @staticmethod
    def _one(given: Any) -> bool:
        return (
            isinstance(given, (tuple, list))
            and len(given) == 2
            and all(v is None or isinstance(v, (int, float)) or _tensor(v) is not None for v in given)
        )

    def of(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[tuple[Any, Any]]:
        """For each leaf the pair (low, high)."""
        if self.given is None:
            return [(None, None) for _ in names]
        found = [self.given for _ in names] if self._one(self.given) else _each(self.given, "bounds", names, shapes)
        pairs = [(None, None) if pair is None else tuple(pair) for pair in found]
        for pair, name, shape in zip(pairs, names, shapes, strict=True):
            for value in pair:
                array = _tensor(value)
                if array is not None:
                    _check_expands(array, shape, f"a bound of {name}")
        return pairs

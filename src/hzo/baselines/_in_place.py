"""Weights moved in place and put back to the bit, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hzo.baselines import _evaluate as ev

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Lost:
    """What a move and its reverse lose of a tensor, as differences of the numbers that its bits make.

    Attributes:
        small: those of at most 127, by element. places, large: the others.
    """

    small: Tensor
    places: tuple[Tensor, ...]
    large: Tensor


def move(tensor: Tensor, z: Tensor, by: float) -> _Lost:
    """``tensor += by * z`` in place, and what ``put_back`` needs: a byte for each element, and a few exceptions.

    ``w + d − d`` is not ``w``: the sum is rounded, by more the larger ``d`` is beside ``w``. The difference is a few
    units in the last place for most elements, and is kept as such.
    """
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    before = bits.clone()
    tensor.add_(z, alpha=by)
    moved = tensor.clone()
    tensor.add_(z, alpha=-by)  # in the tensor itself: by the very instructions that will put it back
    before -= bits
    tensor.copy_(moved)
    far = (before > 127) | (before < -127)
    places = far.nonzero(as_tuple=True)
    large = before[places]
    return _Lost(before.masked_fill_(far, 0).to(torch.int8), places, large)


def put_back(tensor: Tensor, z: Tensor, by: float, lost: _Lost) -> None:
    """Undo ``move``, to the bit."""
    tensor.add_(z, alpha=-by)
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    bits += lost.small
    bits[lost.places] += lost.large


@contextmanager
def moved_along(parameters: Sequence[nn.Parameter], draw: ev.Draw, seed: int, by: float) -> Iterator[None]:
    """Inside, parameters are ``by`` away along the direction of a seed; outside, they have the bits that they had.

    Memory: a byte for each element instead of a copy, and a few tensors as large as one parameter, for a moment.
    Cost: the direction is drawn twice. Nothing inside may write to the parameters. Source: ours.
    """
    tensors = [parameter.data for parameter in parameters]
    lost: list[_Lost] = []
    try:
        for tensor, z in zip(tensors, ev.directions(tensors, draw, seed), strict=True):
            lost.append(move(tensor, z, by))
        yield
    finally:
        moved = tensors[: len(lost)]
        for tensor, z, what in zip(moved, ev.directions(moved, draw, seed), lost, strict=True):
            put_back(tensor, z, by, what)


def can_move(parameters: Sequence[nn.Parameter], versions: Sequence[int]) -> bool:
    """Whether parameters can be moved in place: each in memory of its own, and not written to by the model itself.

    Args:
        versions: ``_version`` of each before the model ran.
    """
    memory = {parameter.untyped_storage().data_ptr() for parameter in parameters if parameter.numel()}
    return (
        len(memory) == sum(parameter.numel() > 0 for parameter in parameters)
        and all(torch._debug_has_internal_overlap(parameter) == 0 for parameter in parameters)
        and [parameter._version for parameter in parameters] == [*versions]
    )

"""Convolutions: stationary, so that impulses on a small canvas show the whole kernel.

An impulse in one channel of every group, at each phase of the stride, meets every tap of the kernel once. The adjoint
is PyTorch's own kernel with the measured weight. Padding other than zeros is a step of its own: the convolution is
then measured where it does not touch the padding, and the cotangent of the padded map is folded back by a map of
places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hzo.declared.common import DeclaredCall, Shape, impulse_size


@dataclass(frozen=True)
class Geometry:
    """Everything of a convolution but its weights; one entry an axis, padding as (before, behind)."""

    channels_in: int
    channels_out: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str
    transposed: bool
    output_padding: tuple[int, ...]

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance between the first and the last tap."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def impulse(self) -> tuple[int, ...]:
        """Where the impulse of phase 0 stands on the canvas."""
        if self.transposed:
            return tuple(-(-before // s) for (before, _), s in zip(self.padding, self.stride, strict=True))
        outside = 0 if self.mode == "zeros" else 1
        return tuple(
            reach + before if outside else max(0, reach - before)
            for reach, (before, _) in zip(self.reach, self.padding, strict=True)
        )

    @property
    def canvas(self) -> tuple[int, ...]:
        """The smallest canvas on which every tap answers, and padding (if not zeros) does not."""
        axes = zip(self.impulse, self.reach, self.stride, self.padding, strict=True)
        if self.transposed:
            return tuple(p + 1 + -(-before // s) for p, _, s, (before, _) in axes)
        if self.mode == "zeros":
            return tuple(max(p + s, p + s - behind + reach) for p, reach, s, (_, behind) in axes)
        return tuple(p + s + behind + reach + 1 for p, reach, s, (_, behind) in axes)

    @property
    def phases(self) -> list[tuple[int, ...]]:
        """Shifts of the impulse; a transposed convolution shows all taps at once."""
        return [tuple(0 for _ in self.stride)] if self.transposed else list(product(*(range(s) for s in self.stride)))

    @property
    def probe(self) -> Shape:
        """Impulses for each channel of a group and phase, and one empty canvas for the bias."""
        count = self.channels_in // self.groups * len(self.phases) + 1
        return (count, self.channels_in, *self.canvas)


def measured_weight(call: DeclaredCall, shape: Geometry) -> Tensor:
    """The kernel that the layer's responses to impulses show, in the layout of ``torch`` for such a layer."""
    per_group = shape.channels_in // shape.groups
    operand = call.operand
    h = impulse_size(operand.dtype)
    response = call.measure(impulses(shape, h, operand)).to(call.dtype)
    response = (response[:-1] - response[-1:]) / h
    size = (
        (shape.channels_in, shape.channels_out // shape.groups) if shape.transposed else (shape.channels_out, per_group)
    )
    weight = response.new_zeros(*size, *shape.kernel)
    for k, phase in enumerate(shape.phases):
        places, taps = where_taps_answer(shape, phase, tuple(response.shape[2:]))
        seen = response[k * per_group : (k + 1) * per_group][places]  # (per_group, channels_out, taps seen ...)
        if shape.transposed:  # input channel c of group q answers in the outputs of group q
            by_group = seen.view(per_group, shape.groups, -1, *seen.shape[2:])
            weight[taps] = by_group.transpose(0, 1).flatten(0, 1)
        else:
            weight[taps] = seen.transpose(0, 1)
    return weight


def impulses(shape: Geometry, height: float, like: Tensor) -> Tensor:
    """A canvas for each channel of a group and phase, with an impulse in that channel of every group; an empty one."""
    per_group = shape.channels_in // shape.groups
    probe = torch.zeros(shape.probe, dtype=like.dtype, device=like.device)
    channels = torch.arange(shape.channels_in, device=like.device)
    for k, phase in enumerate(shape.phases):
        place = tuple(p + shift for p, shift in zip(shape.impulse, phase, strict=True))
        index: Any = (k * per_group + channels % per_group, channels, *place)
        probe[index] = height
    return probe


@lru_cache(maxsize=1024)
def where_taps_answer(shape: Geometry, phase: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[Any, Any]:
    """Indices of the output places that answer to an impulse, and of the taps of the kernel that they show."""
    places, taps = [], []
    for axis, size in enumerate(outputs):
        stride, dilation = shape.stride[axis], shape.dilation[axis]
        at, before = shape.impulse[axis] + phase[axis], shape.padding[axis][0]
        found = []
        for tap in range(shape.kernel[axis]):
            if shape.transposed:
                found.append((stride * at + dilation * tap - before, tap))
            elif (at + before - dilation * tap) % stride == 0:
                found.append(((at + before - dilation * tap) // stride, tap))
        found = [(place, tap) for place, tap in found if 0 <= place < size]
        places.append(torch.tensor([place for place, _ in found], dtype=torch.long))
        taps.append(torch.tensor([tap for _, tap in found], dtype=torch.long))
    every = (slice(None), slice(None))
    return (*every, *torch.meshgrid(*places, indexing="ij")), (*every, *torch.meshgrid(*taps, indexing="ij"))


def _backward(call: DeclaredCall, shape: Geometry) -> Tensor:
    weight = measured_weight(call, shape)
    operand = call.operand
    axes = len(shape.kernel)
    by_hand = pads_by_hand(shape)
    size = tuple(n + (b + a if by_hand else 0) for n, (b, a) in zip(operand.shape[2:], shape.padding, strict=True))
    # The kernel needs the shape of the input, not its values: an expanded scalar takes no memory.
    given = torch.empty((), dtype=call.dtype, device=operand.device).expand(*operand.shape[:2], *size)
    of_input: Tensor = torch.ops.aten.convolution_backward(
        call.cotangent.contiguous(),
        given,
        weight,
        None,
        list(shape.stride),
        [0] * axes if by_hand else [before for before, _ in shape.padding],
        list(shape.dilation),
        shape.transposed,
        list(shape.output_padding),
        shape.groups,
        [True, False, False],
    )[0]
    return of_input


def pads_by_hand(shape: Geometry) -> bool:
    """Whether padding is a step of its own: not zeros, or not alike on both sides."""
    return shape.mode != "zeros" or any(before != behind for before, behind in shape.padding)


def convolution_vjp(call: DeclaredCall, shape: Geometry) -> Tensor:
    """The cotangent of what went into a convolution of this geometry."""
    found = _backward(call, shape)
    return _fold_padding(found, call.operand.shape, shape) if pads_by_hand(shape) else found


def _fold_padding(cotangent: Tensor, shape: torch.Size, of: Geometry) -> Tensor:
    """The adjoint of padding: what lies on a padded place returns to the place it was copied from."""
    pads = [side for both in reversed(of.padding) for side in both]
    numbers = torch.arange(prod(shape[2:]), dtype=torch.float64, device=cotangent.device).view(1, 1, *shape[2:]) + 1
    origin = F.pad(numbers, pads, mode="constant" if of.mode == "zeros" else of.mode).long().flatten()
    folded = cotangent.new_zeros(*shape[:2], numbers.numel() + 1)
    folded.index_add_(2, origin, cotangent.flatten(2))
    return folded[..., 1:].reshape(shape)

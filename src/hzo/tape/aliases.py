"""What in-place code on views means without side effects: functions between the content of a storage and its windows.

A tape is in single-assignment form. Where several tensors share memory and one of them is written to, the content of
the storage becomes a value of its own, one-dimensional: ``write_window`` puts what was written into it, and a tensor
that is read later is a ``read_window`` of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Window = tuple[tuple[int, ...], tuple[int, ...], int]
"""Size, stride and offset of a window, in elements."""


def geometry_of(tensor: Tensor) -> Window:
    """Where in its storage a tensor lies."""
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def overlaps_itself(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether two elements of a window may be one in memory; says yes for some rare windows that do not overlap."""
    reach = 0
    for length, step in sorted(zip(size, stride, strict=True), key=lambda pair: pair[1]):
        if length > 1:
            if step <= reach:
                return True
            reach += step * (length - 1)
    return False


def extent(geometry: Window) -> int:
    """How many elements a storage has at least in which this window lies."""
    size, stride, offset = geometry
    if 0 in size:
        return 0
    return offset + 1 + sum(step * (length - 1) for length, step in zip(size, stride, strict=True))


def disjoint(a: Window, b: Window) -> bool:
    """Whether two windows of a storage share no element; says no for some that share none either.

    Windows with the same strides (rows, columns or blocks of one tensor) share an element where the distance of their
    beginnings is a sum of strides, each taken at most as often as the windows are long.
    """
    if 0 in a[0] or 0 in b[0] or extent(a) <= b[2] or extent(b) <= a[2]:
        return True
    if a[1] != b[1]:
        return False
    dims = sorted(zip(a[1], a[0], b[0], strict=True), reverse=True)

    def meet(distance: int, k: int) -> bool:
        if k == len(dims):
            return distance == 0
        step, of_a, of_b = dims[k]
        low, high = 1 - of_b, of_a - 1  # how often the step may be taken
        if step == 0:
            return meet(distance, k + 1)
        reach = sum(s * (max(m, n) - 1) for s, m, n in dims[k + 1 :])
        first, last = -((reach - distance) // step), (distance + reach) // step
        return any(meet(distance - step * times, k + 1) for times in range(max(low, first), min(high, last) + 1))

    return not meet(b[2] - a[2], 0)


def read_window(content: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """A copy of the elements that a window of a storage shows."""
    return content.as_strided(size, stride, offset).clone()


def write_window(content: Tensor, window: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """The content of a storage after a window of it was replaced."""
    result = content.clone()
    result.as_strided(size, stride, offset).copy_(window)
    return result


def pass_through(old: Tensor, new: Tensor) -> Tensor:  # noqa: ARG001
    """``new`` as the value, with ``old`` as its path: what a write under ``no_grad`` does for autograd."""
    return new.clone()


def restride(
    x: Tensor, around: Tensor, layout: Window, size: Sequence[int], stride: Sequence[int], offset: int
) -> Tensor:
    """``as_strided`` of a tensor that lies in its storage as ``layout`` says.

    Args:
        around: what the result showed; of elements that lie outside of ``x``, which are constants.
    """
    inside = mask_of(layout, (tuple(size), tuple(stride), offset), x.device).as_strided(size, stride, offset)
    content = spread(x, layout, (tuple(size), tuple(stride), offset))
    return torch.where(inside, content.as_strided(size, stride, offset), around)


def restride_scatter(
    x: Tensor, window: Tensor, layout: Window, size: Sequence[int], stride: Sequence[int], offset: int
) -> Tensor:
    """``as_strided_scatter`` into a tensor that lies in its storage as ``layout`` says."""
    content = spread(x, layout, (tuple(size), tuple(stride), offset))
    content.as_strided(size, stride, offset).copy_(window)
    return content.as_strided(*layout).clone()


def spread(x: Tensor, layout: Window, other: Window) -> Tensor:
    """A storage of zeros in which ``x`` lies as ``layout`` says, large enough for another window as well."""
    content = x.new_zeros(max(extent(layout), extent(other)))
    content.as_strided(*layout).copy_(x)
    return content


def mask_of(layout: Window, other: Window, device: torch.device) -> Tensor:
    """Which elements of a storage that is large enough for both windows lie in the first."""
    mask = torch.zeros(max(extent(layout), extent(other)), dtype=torch.bool, device=device)
    mask.as_strided(*layout).fill_(True)
    return mask

"""Steps for each element of a tensor, from its own size and that of its surroundings, without a query more.

Two errors pull apart: a step that is large beside the scale on which a network varies along an element loses curvature,
one that is small beside all that is added up loses digits. That scale is not known: it may be the size of the elements
of its kind (another unit, a narrow input of an exponential), or that of the whole (what is added up). With ``ρ`` the
first over the second, the step that is in error by as much in either case is ``ρ^(2/3)`` of the step of the whole, and
its error ``ρ^(-2/3)`` times as large. Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = 1e3  # masks are written by hand as large numbers: -1e4, -1e9, finfo.min
_ALIKE = 4.0  # ... that are as good as equal ...
_APART = 2.0**10  # ... and far from all else
_KINDS = 8  # of masks in one tensor
_ROUNDINGS = 100  # smaller than these of the whole: zero but for rounding
_FEW = 3  # elements that may all be small by chance


def real_parts(tensor: Tensor) -> Tensor:
    """The real numbers that a tensor holds, in its own memory: of a complex one (…, 2), real and imaginary parts.

    A change of the loss is the sum over them of gradient times change, as PyTorch defines gradients of complex numbers.
    """
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()


def immovable(tensor: Tensor) -> Tensor:
    """Elements that no step moves: infinite, or so large that a step would leave the range of the dtype."""
    return ~(tensor.abs() <= torch.finfo(tensor.dtype).max / 4)


def masks(size: Tensor) -> Tensor:
    """Which elements of rows (B, n) are no data: not finite, or masks, large and equal numbers far above all others.

    Args:
        size: of the elements, in the accumulation dtype; infinite where they are immovable.
    """
    found = ~size.isfinite()
    for _ in range(_KINDS):
        data = size.masked_fill(found, 0)
        largest = data.amax(1, keepdim=True)
        if not bool((largest >= _LARGE).any()):
            break
        alike = (data >= largest / _ALIKE) & (data > 0)
        below = data.masked_fill(alike, 0).amax(1, keepdim=True)
        masked = alike & (largest >= _LARGE) & (below > 0) & (below < largest / _APART)
        if not bool(masked.any()):
            break
        found = found | masked
    return found


def scale_of(tensor: Tensor) -> float:
    """The root mean square of the data, masks left out; 1 for a tensor of zeros or without elements."""
    size, masked = _sizes(tensor.reshape(1, -1))
    return float(_root_mean_square(size, masked, 1)) or 1.0 if size.numel() else 1.0


def element_scales(rows: Tensor, unit: float) -> tuple[Tensor, float]:
    """(B, n): the scale of each element of some rows, in the accumulation dtype; and that of them all.

    A sample has its own scale; an element that is smaller than chance explains a smaller one, as the first lines of
    this file say, a larger one a larger, a mask its own size. Where all elements lie on one side of zero, which may be
    the end of their domain, the size of each counts as the scale of its kind: no step then crosses zero, but for
    elements so small that they are rounding of the whole.

    Args:
        unit: rounding of what queries compute, relative.
    """
    size, masked = _sizes(rows)
    if not size.numel():
        return size, 1.0
    whole = _root_mean_square(size, masked, None)
    whole = torch.where(whole > 0, whole, torch.ones_like(whole))
    of_sample = _root_mean_square(size, masked, 1)
    of_sample = whole * _share(of_sample / whole, unit)
    relative = (size / of_sample).masked_fill_(masked, 0)
    scales = of_sample * _by_size(relative, unit, _of_one_sign(rows, masked))
    return torch.where(masked & size.isfinite(), size, scales), float(whole)


def _sizes(rows: Tensor) -> tuple[Tensor, Tensor]:
    still = immovable(rows)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    size = rows.detach().abs().to(wide).masked_fill_(still, torch.inf)
    return size, masks(size) if size.numel() else still


def _root_mean_square(size: Tensor, masked: Tensor, dim: int | None) -> Tensor:
    """Of all elements, or of each row, (B, 1); without overflow."""
    data = size.masked_fill(masked, 0)
    largest = data.amax() if dim is None else data.amax(dim, keepdim=True)
    divisor = torch.where(largest > 0, largest, torch.ones_like(largest))
    kept = (~masked).sum() if dim is None else (~masked).sum(dim, keepdim=True)
    squares = (data / divisor).square_()
    total = squares.sum() if dim is None else squares.sum(dim, keepdim=True)
    return divisor * (total / kept.clamp(min=1)).sqrt()


def _share(ratio: Tensor, unit: float) -> Tensor:
    """The scale to use over the scale of the whole, where the elements' own is ``ratio`` of it."""
    least = _ROUNDINGS * unit
    small = torch.where(ratio > least, ratio.clamp(min=least, max=1) ** (2 / 3), torch.ones_like(ratio))
    return torch.where(ratio > 1, ratio, small)


def _by_size(relative: Tensor, unit: float, one_sign: bool) -> Tensor:
    """The scale of each element over that of its sample, from its size alone and how many there are of no larger size.

    Sizes count as the nearest powers of two. Of n numbers that are spread evenly about zero, k are smaller than k/n of
    the scale: so k numbers that are smaller than some size tell of a scale of n/k times that. Fewer than three tell
    nothing.
    """
    least, most = torch.frexp(torch.tensor(_ROUNDINGS * unit)).exponent.item(), 64
    exponent = torch.frexp(relative * 2**0.5).exponent.sub_(1).clamp_(least, most).sub_(least).long()
    exponent.masked_fill_(relative == 0, 0)  # counted with the rounding
    sizes = torch.arange(least, most + 1, dtype=torch.float64, device="cpu")
    counts = torch.bincount(exponent.flatten(), minlength=len(sizes)).cpu().double()
    counts[0] = 0
    smaller = counts.cumsum(0)
    if one_sign:
        kind = 2.0**sizes
    else:
        few = int(torch.searchsorted(smaller, min(_FEW, float(smaller[-1]))))
        kind = 2.0 ** (sizes + 0.5) * smaller[-1] / smaller.clamp(min=1)
        kind[:few] = kind[few]
    table = _share(kind.clamp(max=1), unit)
    table[0] = 1
    table[sizes > 0] = 2.0 ** (sizes[sizes > 0] / 3)
    return table.to(relative)[exponent]


def _of_one_sign(rows: Tensor, masked: Tensor) -> bool:
    up, down = ((rows > 0) | masked).all(), ((rows < 0) | masked).all()
    return rows.numel() > 1 and bool(up | down)

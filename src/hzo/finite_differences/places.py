"""Where a difference is taken: a step for each element from its own surroundings, inside bounds, with its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hzo.errors import InputError, NonFiniteError, StepError
from hzo.finite_differences.scales import masks
from hzo.finite_differences.steps import Scheme, accumulation_dtype, check_values_survive

_LOOKED_AT = 32
_CHANCE = 1e-7  # smaller than this by chance alone: then it is another unit


@dataclass(frozen=True)
class Stencil:
    """Two places for each element, and the weights of what is found there.

    The derivative along an element is ``weight · (F(upper) − F(base)) + other · (F(lower) − F(base))``; where
    ``paired``, ``other = −weight``, and the base is not needed. All are (B, n); weights in the accumulation dtype.
    """

    upper: Tensor
    lower: Tensor
    weight: Tensor
    other: Tensor
    paired: bool


def element_scale(rows: Tensor, precision: torch.dtype | None = None) -> Tensor:
    """(B, n): how large a change of each element is large, from its own size and its surroundings.

    An element that is smaller than most others of its sample, and than most of the same place in other samples, is near
    zero by chance: its surroundings are its scale, whichever of the two are smaller. Columns may stand in different
    units, samples be of different size, and masks of −1e9 stand beside numbers of 1. A few elements may all be small by
    chance, too: these are followed down as far as rounding allows, and all the way where chance would be less than one
    in ten million. Source: ours.
    """
    size, whole, lowest = _sizes(rows, precision)
    if not size.numel():
        return size
    surroundings = torch.minimum(*(_followed(*_middle(size, dim), whole, lowest) for dim in (1, 0)))
    surroundings = torch.where(surroundings.isfinite(), surroundings, whole)
    return torch.maximum(size, surroundings)


def _sizes(rows: Tensor, precision: torch.dtype | None) -> tuple[Tensor, Tensor, float]:
    """Of each element; of a middle one of no mask; and the share of that which rounding lets a step be made for."""
    size = rows.detach().abs().to(accumulation_dtype(rows.dtype))
    whole = _middle(size.masked_fill(masks(size), 0).reshape(1, -1), 1)[0] if size.numel() else size.new_ones(1, 1)
    whole = torch.where(whole.isfinite(), whole, torch.ones_like(whole))
    unit = float(torch.finfo(precision or rows.dtype).eps)
    return size, whole, min(1.0, max(1e-4, 1e3 * unit ** (2 / 3)))  # where rounding costs a thousandth


def _middle(size: Tensor, dim: int) -> tuple[Tensor, int]:
    """Along an axis the upper median of the numbers that are not zero; infinity where all are.

    Also how many numbers at least are no larger. Of long axes every k-th number is looked at.
    """
    stride = -(-size.shape[dim] // _LOOKED_AT)
    looked = size[:, ::stride] if dim == 1 else size[::stride]
    ordered = torch.where(looked > 0, looked, torch.inf).sort(dim).values
    place = ordered.isfinite().sum(dim, keepdim=True) // 2
    place = place.clamp(max=max(0, looked.shape[dim] - 1))
    found = ordered.gather(dim, place)
    # An even number of them, and no larger one: the last that there is.
    found = torch.where(found.isfinite(), found, ordered.gather(dim, (place - 1).clamp(min=0)))
    return found, int(place.min()) + 1


def _followed(part: Tensor, count: int, whole: Tensor, lowest: float) -> Tensor:
    """The size of a part, and no less than ``lowest`` of the whole unless chance cannot have made it so small."""
    ratio = part / whole.clamp(min=torch.finfo(part.dtype).tiny)
    unlikely = 4 * count * ratio ** min(count, 100) < _CHANCE
    return torch.where(unlikely, part, torch.maximum(part, lowest * whole))


def element_steps(rows: Tensor, scheme: Scheme, where: str, precision: torch.dtype | None = None) -> Tensor:
    """(B, n): the default step of each element: its scale times the power of the rounding unit that balances errors.

    Where all elements are of one sign, none steps across zero.

    Raises:
        NonFiniteError: the rows hold NaN or infinity.
    """
    if not bool(rows.isfinite().all()):
        raise NonFiniteError(f"{where} holds NaN or infinity; find out why before estimating a gradient there")
    steps = element_scale(rows, precision) * _share(rows, scheme, precision)
    if of_one_sign(rows):
        steps = torch.minimum(steps, rows.abs().to(steps.dtype) / 4)  # a domain may end at zero
    return steps


def coarse_steps(rows: Tensor, scheme: Scheme, precision: torch.dtype | None = None) -> Tensor:
    """(B, n): longer steps for each element, for a function that does not change over its default steps."""
    size, whole, lowest = _sizes(rows, precision)
    return torch.maximum(size, lowest * whole) * _share(rows, scheme, precision)


def of_one_sign(rows: Tensor) -> bool:
    """Whether all of several elements lie on one side of zero, so that it may be the end of their domain."""
    return rows.numel() > 1 and bool((rows > 0).all() | (rows < 0).all())


def _share(rows: Tensor, scheme: Scheme, precision: torch.dtype | None) -> float:
    unit = float(torch.finfo(precision or rows.dtype).eps)
    share: float = unit ** (1 / 3 if scheme == "central" else 1 / 2)
    return share


def stencil(
    rows: Tensor,
    steps: Tensor | float,
    scheme: Scheme,
    where: str,
    *,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    window: bool = False,
) -> Stencil:
    """The places at which an element's difference is taken.

    Central differences step up and down; beside a bound both places lie inward, at one step and at two, with the
    weights that keep the error of second order. With ``window`` the difference is the mean slope over a width of two
    steps, and beside a bound the window is moved inward instead. Forward differences step up, beside an upper bound
    down.

    Args:
        rows: (B, n). steps: (B, n), or one. low, high: bounds, of shapes that expand to (B, n).

    Raises:
        InputError: an element lies outside the bounds. StepError: a step is lost in rounding.
    """
    wide = accumulation_dtype(rows.dtype)
    at = rows.to(wide)
    h = torch.as_tensor(steps, dtype=wide, device=rows.device).expand(rows.shape)
    if h.numel():
        check_values_survive(rows, float(h.min()), where)
    if low is None and high is None:
        second = at - h if scheme == "central" else at
        return _paired(rows, at, (at + h).to(rows.dtype), second.to(rows.dtype), h, where)
    lowest = at - torch.inf if low is None else torch.as_tensor(low, dtype=wide, device=rows.device).expand(rows.shape)
    highest = (
        at + torch.inf if high is None else torch.as_tensor(high, dtype=wide, device=rows.device).expand(rows.shape)
    )
    outside = (at < lowest) | (at > highest)
    if bool(outside.any()):
        worst = at[outside][0]
        raise InputError(
            f"{where} holds {float(worst):.6g}, outside its bounds ({float(lowest[outside][0]):.6g}, "
            f"{float(highest[outside][0]):.6g}); clamp it before the part, or widen bounds="
        )
    if window and scheme == "central":
        room = (highest - lowest) / 2
        h = torch.minimum(h, room)
        middle = torch.minimum(torch.maximum(at, lowest + h), highest - h)
        first, second = middle + h, middle - h
    elif scheme == "central":
        up, down = highest - at, at - lowest
        h = torch.where((up < h) & (down < 2 * h), torch.maximum(up, down) / 2, h)  # a narrow room
        beside_high, beside_low = up < h, down < h
        h = torch.where(beside_low & ~beside_high, torch.minimum(h, up / 2), h)
        sign = torch.where(beside_high, -1.0, 1.0)
        first = at + sign * h
        second = torch.where(beside_high | beside_low, at + 2 * sign * h, at - h)
    else:
        up, down = highest - at, at - lowest
        h = torch.where((up < h) & (down < h), torch.maximum(up, down), h)
        first = torch.where(up < h, at - h, at + h)
        second = at
    upper, lower = first.to(rows.dtype), second.to(rows.dtype)
    upper, lower = (torch.minimum(torch.maximum(t, lowest.to(t.dtype)), highest.to(t.dtype)) for t in (upper, lower))
    if window or scheme == "forward" or not bool((beside_high | beside_low).any()):
        return _paired(rows, at, upper, lower, h, where)
    p, q = upper.to(wide) - at, lower.to(wide) - at  # as rounding left them
    if bool(((p == q) | (p == 0) | (q == 0)).any()):
        raise _vanishing(at, h, where, rows.dtype)
    sided = beside_high | beside_low
    weight = torch.where(sided, -q / (p * (p - q)), 1 / (p - q))
    other = torch.where(sided, -p / (q * (q - p)), -1 / (p - q))
    return Stencil(upper, lower, weight, other, False)


def _paired(rows: Tensor, at: Tensor, upper: Tensor, lower: Tensor, h: Tensor, where: str) -> Stencil:
    """Two places and the gap that rounding left between them."""
    gap = upper.to(at.dtype) - lower.to(at.dtype)
    if not bool(gap.isfinite().all()):
        raise StepError(
            f"a step of {float(h.max()):.3g} leaves the range of {rows.dtype} in {where}; give a smaller step"
        )
    if not bool(gap.all()):
        raise _vanishing(at, h, where, rows.dtype)
    weight = 1 / gap
    return Stencil(upper, lower, weight, -weight, True)


def _vanishing(at: Tensor, h: Tensor, where: str, dtype: torch.dtype) -> StepError:
    return StepError(
        f"a step of {float(h.min()):.3g} vanishes beside values of up to {float(at.abs().max()):.3g} of {where} in "
        f"{dtype}; give a larger step, or run this part in a wider dtype"
    )

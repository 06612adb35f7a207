"""Where a difference is taken: a step for each element from its own surroundings, inside bounds, with its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hzo.errors import InputError, NonFiniteError, StepError
from hzo.finite_differences.steps import Scheme, accumulation_dtype

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

    An element is of the size of the others of its sample, or of the same element of other samples, whichever is
    smaller: columns may stand in different units, and samples be of different size. One that is smaller than both is
    near zero by chance. Few elements may all be small by chance, too; they are followed down as far as rounding allows,
    and all the way where chance would be less than one in ten million. Source: ours.
    """
    wide = accumulation_dtype(rows.dtype)
    size = rows.detach().abs().to(wide)
    batch, elements = size.shape
    if not size.numel():
        return size
    whole = size.square().mean().sqrt()
    row, column = (size.square().mean(dim, keepdim=True).sqrt() for dim in (1, 0))
    unit = float(torch.finfo(precision or rows.dtype).eps)
    lowest = min(1.0, max(1e-4, 1e3 * unit ** (2 / 3)))  # where rounding costs a thousandth
    surroundings = torch.minimum(
        _followed(row, whole, elements, lowest) if elements > 1 or batch > 1 else row,
        _followed(column, whole if batch > 1 else row, batch, lowest),
    )
    scale = torch.maximum(size, surroundings)
    return torch.where(scale > 0, scale, torch.where(whole > 0, whole, torch.ones_like(whole)))


def _followed(part: Tensor, whole: Tensor, count: int, lowest: float) -> Tensor:
    """The size of a part, and no less than ``lowest`` of the whole unless chance cannot have made it so small."""
    ratio = part / whole.clamp(min=torch.finfo(part.dtype).tiny)
    unlikely = (ratio ** min(count, 1000) < _CHANCE) & (part > 0)
    return torch.where(unlikely, part, torch.maximum(part, lowest * whole))


def element_steps(rows: Tensor, scheme: Scheme, where: str, precision: torch.dtype | None = None) -> Tensor:
    """(B, n): the default step of each element: its scale times the power of the rounding unit that balances errors.

    Raises:
        NonFiniteError: the rows hold NaN or infinity.
    """
    if not bool(rows.isfinite().all()):
        raise NonFiniteError(f"{where} holds NaN or infinity; find out why before estimating a gradient there")
    unit = float(torch.finfo(precision or rows.dtype).eps)
    share: float = unit ** (1 / 3 if scheme == "central" else 1 / 2)
    return element_scale(rows, precision) * share


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
    p, q = upper.to(wide) - at, lower.to(wide) - at  # as rounding left them
    if bool((p == q).any()) or (scheme == "central" and not window and bool(((p == 0) | (q == 0)).any())):
        raise StepError(
            f"a step of {float(h.min()):.3g} vanishes beside values of up to {float(at.abs().max()):.3g} of {where} in "
            f"{rows.dtype}; give a larger step, or run this part in a wider dtype"
        )
    if window or scheme == "forward" or not bool((beside_high | beside_low).any()):
        weight = 1 / (p - q)
        return Stencil(upper, lower, weight, -weight, True)
    sided = beside_high | beside_low
    weight = torch.where(sided, -q / (p * (p - q)), 1 / (p - q))
    other = torch.where(sided, -p / (q * (q - p)), -1 / (p - q))
    return Stencil(upper, lower, weight, other, False)

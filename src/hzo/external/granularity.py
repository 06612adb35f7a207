"""How far to step: measured from what a part does at steps of many lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor

from hzo.execution import counting
from hzo.external.queries import BoxSweep
from hzo.external.sites import Site
from hzo.finite_differences import element_scale

_RATIO = 4.0  # between one step and the next
_LONGEST = 2.0  # in scales of an element
_PLATEAU, _BROKEN = 0.05, 0.3  # differences agree, or no longer do
_MANY, _ROUGH, _AS_NOISE = 16, 0.2, 0.7  # numbers that do not agree by chance; an error; what noise differs by
_STEEPER = 100.0  # than a slope that may be the right one


@dataclass(frozen=True)
class MeasuredStep:
    """A step that suits a part.

    Attributes:
        length: a share of the scale of each element; of ``absolute``, in units of the input.
        error: estimate of the relative error of differences over it.
    """

    length: float
    error: float
    absolute: bool = False

    def of(self, rows: Tensor) -> Tensor:
        """(B, n): the step of each element."""
        return torch.full_like(rows, self.length) if self.absolute else self.length * element_scale(rows)


def measured_step(sweep: BoxSweep, site: Site, bounds: tuple[Any, Any]) -> MeasuredStep:
    """The step at which neighbouring ones agree best, or half the quantum of a part that has one.

    What a part is made of (its rounding, its quantum, its tolerance) spoils small steps like 1/h, its curvature large
    ones like h². Differences along one random direction, at steps from rounding to twice the scale, show both. Where
    they agree at large steps and again at small ones, and not between, the part is rough on a small scale: the large
    ones are right. An elementwise part whose every jump is as large as any other has a quantum, and half of it gives
    the mean slope (see docs/blackbox.md).

    Cost: about 20 (float32) or 50 (float64) evaluations, and 40 more for a quantum, counted as checks. Source: ours,
    after Moré and Wild (2011).
    """
    rows = sweep.rows(site)
    scale = element_scale(rows)
    generator = torch.Generator("cpu").manual_seed(0)
    sign = (torch.randint(0, 2, rows.shape, generator=generator, device="cpu") * 2 - 1).to(rows)
    low, high = (None if b is None else sweep.expanded(site, b, rows) for b in bounds)

    def moved(h: Tensor) -> tuple[list[Tensor], Tensor]:
        """Differences over a step, and the share of the scale that was really stepped."""
        upper, lower = rows + sign * h, rows - sign * h
        for bound, pick in ((low, torch.maximum), (high, torch.minimum)):
            if bound is not None:
                upper, lower = pick(upper, bound.to(rows.dtype)), pick(lower, bound.to(rows.dtype))
        with counting.doing(f"the measurement of a step for {site.name}"):
            above, below = (sweep.run(site, t.unsqueeze(0)) for t in (upper, lower))
        width = ((upper - lower).abs() / scale).amax(1, keepdim=True).double().clamp(min=1e-300)
        return [a[0].double() - b[0].double() for a, b in zip(above, below, strict=True)], width

    shares = [_LONGEST]
    while shares[-1] > 8 * _RATIO * float(torch.finfo(rows.dtype).eps):
        shares.append(shares[-1] / _RATIO)
    with counting.as_checks():
        found = [moved(share * scale) for share in shares]
        jumps = [differences[0] for differences, _ in found]
        if sweep.call.settings.elementwise and len(sweep.outputs) == 1 and site.pairs == 1 and bounds == (None, None):
            quantum = _quantum(jumps, shares, scale, lambda h: moved(torch.full_like(rows, h))[0][0])
            if quantum is not None:
                return quantum
    return _agreeing(shares, [[d / width for d in differences] for differences, width in found])


def _agreeing(shares: list[float], slopes: list[list[Tensor]]) -> MeasuredStep:
    """From long steps to short ones the best of a plateau; a second one below a gap is another part's affair."""
    sizes = [sum(float(t.square().sum()) for t in s) ** 0.5 for s in slopes]
    apart = [sum(float((a - b).square().sum()) for a, b in zip(s, t, strict=True)) ** 0.5 for s, t in pairwise(slopes)]
    if not any(sizes):
        return MeasuredStep(shares[0], inf)
    # Where nothing moved at two steps, they agree on nothing.
    relative = [d / max(a, b) if a and b else inf for d, a, b in zip(apart, sizes, sizes[1:], strict=False)]
    many = min((sum(int((t != 0).sum()) for t in s) for s, size in zip(slopes, sizes, strict=True) if size), default=0)
    best, error, errors = 0, inf, []
    for k in range(len(shares)):
        longer = relative[k - 1] / _RATIO**2 if k else inf  # curvature is less here than there
        shorter = relative[k] / _RATIO if k < len(relative) else inf  # and granularity less than there
        if longer == inf:
            longer = relative[0] if relative else inf
        errors.append(longer + shorter)
        if errors[-1] < error:
            best, error = k, errors[-1]
        if error < _PLATEAU and k < len(relative) and relative[k] > _BROKEN:
            break
        # Loud noise leaves no plateau so flat. Behind its best step many numbers disagree as noise does, fourfold from
        # step to step, and where they agree again, it is on the slope of the noise.
        if many >= _MANY and error < _ROUGH and min(relative[max(best + 1, k - 1) : k + 1], default=0) > _AS_NOISE:
            break
    before = min(range(best + 1), key=lambda k: errors[k] if sizes[best] > _STEEPER * sizes[k] else inf)
    if many < _MANY and errors[before] < _ROUGH and before != best:
        # A few numbers may have agreed by chance, or what is so steep is noise: nobody can tell.
        return MeasuredStep(shares[before], max(errors[before], _BROKEN))
    return _between(shares, relative, best, error)


def _between(shares: list[float], relative: list[float], k: int, error: float) -> MeasuredStep:
    """The step between those tried at which noise, as 1/h, and curvature, as h², make the smallest error.

    Differences at two steps disagree by the noise of both and by what curvature makes of their ratio: at the steps on
    either side, two equations for the two at step ``k``.
    """
    if not 0 < k < len(relative) or inf in (relative[k - 1], relative[k]):
        return MeasuredStep(shares[k], error)
    near, far = relative[k] ** 2, relative[k - 1] ** 2
    of_noise, of_curve = 1 + _RATIO**2, (1 - _RATIO**-2) ** 2  # of the next one, in units of this one
    of_noise_far, of_curve_far = 1 + _RATIO**-2, (_RATIO**2 - 1) ** 2
    determinant = of_noise * of_curve_far - of_curve * of_noise_far
    noise = (near * of_curve_far - far * of_curve) / determinant
    curve = (far * of_noise - near * of_noise_far) / determinant
    # Where only one of them shows, half the way to the next step.
    ratio = max(noise, 0.0) / (2 * curve) if curve > 0 else inf
    longer = min(2.0, max(0.5, ratio ** (1 / 6)))
    return MeasuredStep(shares[k] * longer, error)


def _quantum(
    jumps: list[Tensor], shares: list[float], scale: Tensor, over: Callable[[float], Tensor]
) -> MeasuredStep | None:
    """Half the quantum of a part that goes up by equal steps at equal distances; None of another one."""
    height = None
    for jump in jumps[::-1]:
        there = jump.abs()[jump != 0]
        if there.numel() >= 3:  # the shortest step at which anything moved: nothing has moved twice yet
            if there.numel() < 0.5 * jump.numel() and float(there.max()) <= 1.001 * float(there.min()):
                height = float(there.median())
            break
    if height is None:
        return None
    slope = float(jumps[0].abs().sum() / (2 * shares[0] * scale.double()).sum())
    width = height / slope

    def misfit(h: float) -> float:
        """How many places go up by something else than one quantum over a width of 2 h."""
        return float(((over(h).abs() / height - 1).abs() > 0.01).double().mean())

    spread = 0.2
    for _ in range(4):
        tried = [width * (1 + spread * k / 4) for k in range(-4, 5)]
        misfits = [misfit(w / 2) for w in tried]
        width = tried[misfits.index(min(misfits))]
        spread /= 4
    twice = over(width).abs()
    doubled = float(twice[twice > 0].median()) if bool((twice > 0).any()) else 0.0
    if abs(doubled / height - 2) > 0.01 or min(misfits) > 0.5:
        return None
    return MeasuredStep(width / 2, min(misfits), absolute=True)

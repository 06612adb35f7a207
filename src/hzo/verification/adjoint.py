"""The dot-product test of an adjoint: ⟨Jᵀg, e⟩ against ⟨g, J e⟩ with J e from central differences.

Along random directions everything is tested at once, along single coordinates closely. The tolerance is made of what
the test itself shows: how much the residual changes when the step doubles (curvature), and what rounding of the operand
does to the results. Results that have
a kink inside the step get no cotangent. Source: textbook (Claerbout, Earth Soundings Analysis, 1992); tolerances: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hzo.finite_differences import accumulation_dtype
from hzo.verification.properties import Evaluate, PropertyResult, deviation_of, place, resolution

Carry = Callable[[list[Tensor]], Tensor]
"""Cotangents (B, m) of every result, in the accumulation dtype -> that of the operand (B, n)."""


@dataclass(frozen=True)
class _Side:
    """Both sides of the test along one direction at one step, by sample.

    Attributes:
        adjoint: ⟨Jᵀg, e⟩. forward: ⟨g, J e⟩. rounding: of the differences. size: of the terms of both sums.
    """

    adjoint: Tensor
    forward: Tensor
    rounding: Tensor
    size: Tensor


def dot_product_test(
    run: Evaluate,
    carry: Carry,
    rows: Tensor,
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    apart: bool = True,
    coordinates: int = 16,
) -> PropertyResult:
    """Whether ``carry`` is the adjoint of the derivative of ``run`` at ``rows``.

    Args:
        shape: of one sample, to name places.
        apart: samples do not influence each other, so that the test holds for each; else for their sum.
        coordinates: how many single elements of every sample are tested; all where there are no more.

    Cost: six runs for each of ``coordinates`` + 2 directions and three more, one application of the adjoint.
    """
    base = run(rows)
    wide = accumulation_dtype(rows.dtype)
    unit = resolution(rows, *base)
    step = max(deviation_of(rows) * unit ** (1 / 3), 8 * float(torch.finfo(rows.dtype).eps) * float(rows.abs().max()))
    if step > deviation_of(
        rows
    ):  # rounding has left nothing of how the operand varies, and differences see nothing of it
        return PropertyResult(0.0, 0.0, 0, "values too coarse for differences: not tested")
    directions = _directions(rows, coordinates, generator)
    smooth = [torch.ones_like(t, dtype=torch.bool) for t in base]
    for e in directions:
        above, below = run(rows + 2 * step * e), run(rows - 2 * step * e)
        agree = [
            _is_smooth(middle.to(wide), up.to(wide), down.to(wide), unit)
            for middle, up, down in zip(base, above, below, strict=True)
        ]
        smooth = [a & b for a, b in zip(smooth, agree, strict=True)]
    noise = _noise(run, rows, base, unit, generator)
    g = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, wide) * t for t in smooth]
    carried = carry(g)

    def side(e: Tensor, h: float) -> _Side:
        above, below = rows + h * e, rows - h * e
        direction = (above.to(wide) - below.to(wide)) / (2 * h)
        slopes = [(u.to(wide) - d.to(wide)) / (2 * h) for u, d in zip(run(above), run(below), strict=True)]
        # Where a result is infinite, or no number, on either side there is no derivative.
        terms = torch.cat([(c * s).nan_to_num(0.0, 0.0, 0.0) for c, s in zip(g, slopes, strict=True)], 1)
        errors = torch.cat([(c * t).nan_to_num(0.0, 0.0, 0.0) for c, t in zip(g, noise, strict=True)], 1)
        products = carried * direction
        size = terms.norm(dim=1) + products.norm(dim=1)
        found = _Side(products.sum(1), terms.sum(1), errors.norm(dim=1) / h, size)
        if apart:
            return found
        return _Side(*(t.sum(0, keepdim=True) for t in (found.adjoint, found.forward, found.rounding, found.size)))

    worst = PropertyResult(0.0, 0.0, 0)
    for kind in (directions[:2], directions[2:]):
        pairs = [(e, side(e, step), side(e, 2 * step)) for e in kind]
        if not pairs:
            continue
        residuals = torch.stack([_residual(one).abs() for _, one, _ in pairs])
        drift = torch.stack([(_residual(two) - _residual(one)).abs() for _, one, two in pairs])
        typical = torch.maximum(drift.amax(0), drift.square().mean().sqrt())
        rounding = torch.stack([8 * one.rounding + 3 * unit**0.5 * one.size for _, one, _ in pairs])
        tolerances = 4 * typical + rounding
        excess = (residuals / tolerances.clamp(min=torch.finfo(wide).tiny)).nan_to_num(nan=float("inf"))
        k, b = divmod(int(excess.argmax()), excess.shape[1])
        if float(excess[k, b]) > worst.error / max(worst.tolerance, 1e-300) or not worst.tests:
            e, one, _ = pairs[k]
            where = ""
            if not float(excess[k, b]) <= 1:
                row = e[b] if apart else e.abs().sum(0)
                element = _heaviest(row, e, lambda part, b=b: float(_residual(side(part, step)).abs()[b]))  # type: ignore[misc]
                where = f"the derivative by element {place(element, shape)}" + (f" of sample {b}" if apart else "")
            worst = PropertyResult(
                float(residuals[k, b]), float(tolerances[k, b]), 0, where, float(one.forward[b]), float(one.adjoint[b])
            )
    return PropertyResult(worst.error, worst.tolerance, len(directions), worst.where, worst.expected, worst.got)


def _noise(run: Evaluate, rows: Tensor, base: list[Tensor], unit: float, generator: torch.Generator) -> list[Tensor]:
    """What rounding may change in each result: its own, and that of the operand, which a difference of large numbers
    (a mean taken off) magnifies."""
    wide = accumulation_dtype(rows.dtype)
    found = [t.to(wide).abs() * unit for t in base]
    for _ in range(2):
        signs = torch.randint(0, 2, rows.shape, generator=generator).to(rows) * 2 - 1
        changed = run(rows * (1 + unit * signs))
        found = [n.maximum((t.to(wide) - b.to(wide)).abs()) for n, t, b in zip(found, changed, base, strict=True)]
    return found


def _residual(side: _Side) -> Tensor:
    return side.adjoint - side.forward


def _heaviest(row: Tensor, e: Tensor, residual: Callable[[Tensor], float]) -> int:
    """The element of a direction that the residual comes from, by halving."""
    support = row.nonzero().flatten()
    while len(support) > 1:
        halves = support[: len(support) // 2], support[len(support) // 2 :]
        parts = [torch.zeros_like(e).index_copy_(1, half, e[:, half]) for half in halves]
        first, second = (residual(part) for part in parts)
        support = halves[0] if first >= second else halves[1]
    return int(support[0]) if len(support) else 0


def _directions(rows: Tensor, coordinates: int, generator: torch.Generator) -> list[Tensor]:
    """Two that move everything, then single elements: another one in each sample."""
    batch, n = rows.shape
    dense = [torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows) for _ in range(2)]
    orders = torch.stack([torch.randperm(n, generator=generator) for _ in range(batch)]).to(rows.device)
    single = []
    for k in range(min(n, coordinates)):
        single.append(torch.zeros_like(rows).scatter_(1, orders[:, k : k + 1], 1.0))
    return [*dense, *single]


def _is_smooth(middle: Tensor, up: Tensor, down: Tensor, unit: float) -> Tensor:
    """Where the slopes on both sides agree: no kink lies between, and nothing is infinite."""
    bend, slope = (up - 2 * middle + down).abs(), (up - down).abs()
    typical = float(slope[slope.isfinite()].square().mean().sqrt()) if bool(slope.isfinite().any()) else 0.0
    allowed = max(0.1, 8 * unit ** (1 / 3)) * (slope + 0.1 * typical) + 8 * unit * middle.abs()
    agree: Tensor = (bend <= allowed) & middle.isfinite() & up.isfinite() & down.isfinite()
    return agree

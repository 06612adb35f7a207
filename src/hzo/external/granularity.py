"""How far to step: measured from what a part does at steps of many lengths."""

from __future__ import annotations

from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor

from hzo.execution import counting
from hzo.external.queries import Sweep
from hzo.external.sites import Site
from hzo.finite_differences import (
    element_scale,
)

_RATIO = 4.0  # between one step and the next


def measured_step(sweep: Sweep, site: Site, bounds: tuple[Any, Any]) -> tuple[float, float]:
    """The step, as a share of each element's scale, at which two neighbouring ones agree best; and the error there.

    What a part is made of (its rounding, its quantum, its tolerance) spoils small steps like 1/h, its curvature large
    ones like h². Differences along one random direction, at steps from rounding to half the scale, show both. Cost:
    about 20 (float32) or 40 (float64) evaluations, counted as checks. Source: ours, after Moré and Wild (2011).
    """
    rows = sweep.rows(site)
    scale = element_scale(rows)
    generator = torch.Generator().manual_seed(0)
    sign = (torch.randint(0, 2, rows.shape, generator=generator) * 2 - 1).to(rows)
    low, high = (None if b is None else sweep.expanded(site, b, rows) for b in bounds)
    share, shares = 0.5, []
    while share > 8 * float(torch.finfo(rows.dtype).eps):
        shares.append(share)
        share /= _RATIO
    slopes: list[list[Tensor]] = []
    with counting.as_checks():
        for share in shares[::-1]:
            h = share * scale
            upper, lower = rows + sign * h, rows - sign * h
            for bound, pick in ((low, torch.maximum), (high, torch.minimum)):
                if bound is not None:
                    upper, lower = pick(upper, bound.to(rows.dtype)), pick(lower, bound.to(rows.dtype))
            with counting.doing(f"the measurement of a step for {site.name}"):
                above, below = (sweep.run(site, t.unsqueeze(0)) for t in (upper, lower))
            width = ((upper - lower).abs() / scale).amax(1, keepdim=True).double().clamp(min=1e-300)
            slopes.append([(a[0].double() - b[0].double()) / width for a, b in zip(above, below, strict=True)])
    sizes = [sum(float(t.square().sum()) for t in s) ** 0.5 for s in slopes]
    apart = [sum(float((a - b).square().sum()) for a, b in zip(s, t, strict=True)) ** 0.5 for s, t in pairwise(slopes)]
    if not any(sizes):
        return shares[0], inf
    # Where nothing moved at two steps, they agree on nothing.
    relative = [d / max(a, b) if a and b else inf for d, a, b in zip(apart, sizes, sizes[1:], strict=False)]
    best, error = len(shares) - 1, inf
    for k in range(1, len(shares)):
        behind = relative[k - 1] / _RATIO
        ahead = relative[k] / _RATIO**2 if k < len(relative) else relative[k - 1]
        if behind + ahead < error:
            best, error = k, behind + ahead
    return shares[::-1][best], error

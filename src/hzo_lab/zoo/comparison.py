"""Two gradients of one model: how far apart, and how far apart they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

GradientsOrNone = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Tolerance:
    """How far apart two gradients may be.

    Attributes:
        error: the largest relative error of a parameter's gradient that counts as right.
        floor: gradients smaller than this share of the largest one are measured against that share.
    """

    error: float
    floor: float


_TOLERANCES = {
    torch.float64: Tolerance(error=1e-6, floor=1e-6),
    torch.float32: Tolerance(error=1e-3, floor=1e-4),
    torch.float16: Tolerance(error=5e-2, floor=1e-2),
    torch.bfloat16: Tolerance(error=1e-1, floor=1e-2),
}
# A float64 model that computes its norms in float32, as most of transformers do, has gradients with rounding errors of
# float32. The floor stays: a lower one has hidden errors of percents in parameters with small gradients.
_MIXED = Tolerance(error=1e-4, floor=1e-6)


def tolerance(dtype: torch.dtype, coarsest: torch.dtype) -> Tolerance:
    """For a model of a dtype, by the coarsest dtype of the values on the path of its gradient."""
    if dtype == torch.float64:
        return _TOLERANCES[dtype] if coarsest == dtype else _MIXED
    return max(_TOLERANCES[dtype], _TOLERANCES[coarsest], key=lambda t: t.error)


@dataclass(frozen=True)
class Difference:
    """The largest relative error over all parameters, and whose it is."""

    worst: float
    parameter: str
    problem: str = ""  # what no tolerance excuses


def largest_difference(found: GradientsOrNone, expected: GradientsOrNone, floor: float) -> Difference:
    """‖found − expected‖ / max(‖expected‖, floor · largest ‖expected‖), the worst of all parameters.

    A gradient that is missing counts as zero, and so does one that autograd leaves out: a missing gradient that
    should not be zero has an error of 1.
    """
    norms = {name: _norm(g) for name, g in expected.items()}
    largest = max(norms.values(), default=0.0)
    worst, where = 0.0, ""
    for name, g in expected.items():
        f = found.get(name)
        if f is not None and not bool(f.isfinite().all()):
            return Difference(float("inf"), name, f"the gradient of {name} is not finite")
        distance = _norm(f) if g is None else norms[name] if f is None else _norm(f.double() - g.double())
        scale = max(norms[name], floor * largest)
        error = distance / scale if scale else (0.0 if distance == 0 else float("inf"))
        if error > worst:
            worst, where = error, name
    return Difference(worst, where)


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.detach().to_dense().double().norm())

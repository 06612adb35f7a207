"""Finite differences: schemes, and how far to step.

Central differences of a function with curvature lose ``h²`` and ``u/h`` to rounding, forward differences ``h`` and
``u/h``; the steps that balance the two are ``u^(1/3)`` and ``u^(1/2)`` times the scale of what is perturbed (Nocedal
and Wright, Numerical Optimization, section 8.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from hzo._options import positive
from hzo.errors import InputError, NonFiniteError, StepError

Scheme = Literal["central", "forward"]


def check_scheme(scheme: str) -> Scheme:
    """The scheme, or an error that lists what there is."""
    if scheme not in get_args(Scheme):
        raise InputError(f"expected scheme to be one of {get_args(Scheme)}, got {scheme!r}")
    return scheme  # type: ignore[return-value]


def evaluations(scheme: Scheme) -> int:
    """Queries per direction and sample; ``forward`` reuses the unperturbed result."""
    return 2 if scheme == "central" else 1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where differences are taken and summed: float64 for float64, float32 for all below."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def narrowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The floating dtype that rounds most."""
    return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)


def default_step(
    tensor: Tensor, scheme: Scheme, where: str = "the perturbed tensor", precision: torch.dtype | None = None
) -> float | Tensor:
    """The step from dtype and scale (root mean square; 1 for a tensor of zeros).

    Args:
        precision: of what a query computes, where that is narrower than the tensor (under autocast, say).

    Returns one step; in low precision, where an outlier would swallow it, one for each element.

    Raises:
        NonFiniteError: the tensor holds NaN or infinity.
    """
    power = 1 / 3 if scheme == "central" else 1 / 2
    unit = float(torch.finfo(precision or tensor.dtype).eps)
    return scaled_step(tensor, unit**power, where, precision)


def scale_of(tensor: Tensor) -> float:
    """The root mean square; 1 for a tensor of zeros or without elements."""
    norm = torch.linalg.vector_norm(tensor, dtype=accumulation_dtype(tensor.dtype))
    return float(norm) / max(tensor.numel(), 1) ** 0.5 or 1.0


def scaled_step(
    tensor: Tensor, relative: float, where: str = "the perturbed tensor", precision: torch.dtype | None = None
) -> float | Tensor:
    """``relative`` times the scale of the tensor, its root mean square; as a ``default_step`` else."""
    scale = scale_of(tensor)
    if not scale < float("inf"):
        raise NonFiniteError(f"{where} holds NaN or infinity; find out why before estimating a gradient there")
    step = scale * relative
    unit = float(torch.finfo(precision or tensor.dtype).eps)
    return step if unit < 1e-4 else (tensor.abs() * (8 * unit)).clamp(min=step)


def check_step(step: float | None) -> float | None:
    """A step that may be used: positive and finite, or None for the default."""
    return None if step is None else positive("step", step, "step=None chooses one from dtype and scale")


def stepped(tensor: Tensor, step: float | Tensor, scheme: Scheme, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """``tensor`` moved up and down by the step, and the distance that rounding really left between the two.

    Returns ``(upper, lower, distance)``; ``lower`` is the tensor itself for forward differences. The distance is in
    the accumulation dtype; dividing by it instead of by the nominal step removes the rounding of the perturbed state.

    Raises:
        StepError: the step is lost in rounding for some element, or leaves the range of the dtype.
    """
    upper = tensor + step
    lower = tensor - step if scheme == "central" else tensor
    wide = accumulation_dtype(tensor.dtype)
    distance = upper.to(wide) - lower.to(wide)
    if not bool(distance.isfinite().all()):
        raise StepError(
            f"a step of {float(torch.as_tensor(step).max()):.3g} leaves the range of {tensor.dtype} in {where}; give a "
            "smaller step"
        )
    if not bool((distance > 0).all()):
        largest = float(tensor.abs().max())
        smallest = float(torch.as_tensor(step).min())
        raise StepError(
            f"a step of {smallest:.3g} vanishes beside values of up to {largest:.3g} of {where} in {tensor.dtype}; "
            "give a larger step, or run this part in a wider dtype"
        )
    return upper, lower, distance

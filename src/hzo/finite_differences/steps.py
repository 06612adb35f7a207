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

from hzo._options import one_of, positive
from hzo.errors import NonFiniteError, StepError
from hzo.finite_differences.scales import element_scales, immovable, scale_of

Scheme = Literal["central", "forward"]
_SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


def check_scheme(scheme: str) -> Scheme:
    """The scheme, or an error that lists what there is."""
    return one_of("scheme", scheme, _SCHEMES)


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
    rows: Tensor, scheme: Scheme, where: str = "the perturbed tensor", precision: torch.dtype | None = None
) -> Tensor:
    """(B, n): the step of each element of some rows, from dtype and scale: see ``element_scales``.

    Args:
        precision: of what a query computes, where that is narrower than the tensor (under autocast, say).

    Raises:
        NonFiniteError: the tensor holds NaN, or its squares overflow. Single infinite elements are not moved: see
            ``stepped``.
    """
    dtype = precision or rows.dtype
    unit = float(torch.finfo(dtype).eps)
    scales, whole = element_scales(rows, unit)
    _check_scale(rows, whole, where)
    steps = scales * relative_step(scheme, dtype)
    return torch.maximum(steps, _resolved(rows, unit).to(steps))


_ROUNDINGS = 64  # what the outputs of a segment carry of rounding, and what a cotangent sums over, in units of one


def relative_step(scheme: Scheme, dtype: torch.dtype) -> float:
    """The share of the scale that balances the errors of a difference in this dtype.

    Curvature adds an error of h² to a central difference and of h to a forward one; rounding one of ε / h, where ε is
    more than that of one number: outputs carry the rounding of all that made them, and a cotangent sums over those
    that the moved element hardly changes, too. On networks of ``hzo train`` forward steps of 8 √ε leave 1 − cosine of
    the gradient at 1e-6 to 6e-4 in float32, where √ε leaves 4e-5 to 4e-2. Source: ours.
    """
    unit = float(torch.finfo(dtype).eps)
    share: float = unit ** (1 / 3)
    return share if scheme == "central" else min((_ROUNDINGS * unit) ** (1 / 2), share)


def scaled_step(
    tensor: Tensor, relative: float, where: str = "the perturbed tensor", precision: torch.dtype | None = None
) -> float | Tensor:
    """One step for all, ``relative`` times the root mean square of the data.

    For queries with noise, and for elements that share outputs. In low precision and beside masks one for each element:
    no smaller than what is resolved at its size.

    Raises:
        NonFiniteError: the tensor holds NaN, or its squares overflow.
    """
    scale = scale_of(tensor)
    _check_scale(tensor, scale, where)
    step = scale * relative
    unit = float(torch.finfo(precision or tensor.dtype).eps)
    resolved = _resolved(tensor, unit)
    return step if unit < 1e-4 and not bool((resolved > step).any()) else resolved.clamp(min=step)


def _check_scale(tensor: Tensor, scale: float, where: str) -> None:
    if bool(tensor.isnan().any()) or not scale**2 < torch.finfo(accumulation_dtype(tensor.dtype)).max:
        raise NonFiniteError(
            f"{where} holds NaN or infinity, or numbers whose squares are infinite; find out why before estimating a "
            "gradient there"
        )


def _resolved(tensor: Tensor, unit: float) -> Tensor:
    """The least steps that rounding leaves as they are, but for an eighth."""
    return (tensor.abs() * (8 * unit)).masked_fill(immovable(tensor), 0)


def check_step(step: float | None) -> float | None:
    """A step that may be used: positive and finite, or None for the default."""
    return None if step is None else positive("step", step, "step=None chooses one from dtype and scale")


def check_values_survive(tensor: Tensor, step: float, where: str, what: str = "step") -> None:
    """Raise StepError where a step, or what else is added, is so large that rounding leaves nothing of any value that
    it is added to."""
    largest = float(tensor.masked_fill(immovable(tensor), 0).abs().max()) if tensor.numel() else 0.0
    numbers = torch.finfo(tensor.dtype)
    if step < numbers.max and 0 < largest < step * numbers.eps / 4:
        raise StepError(
            f"a {what} of {step:.3g} leaves nothing of values of up to {largest:.3g} of {where} in {tensor.dtype}; "
            f"give a smaller one, or None, which {'chooses one' if what == 'step' else 'takes none'}"
        )


def stepped(tensor: Tensor, step: float | Tensor, scheme: Scheme, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """``tensor`` moved up and down by the step, and the gap that rounding really left between the two.

    Returns ``(upper, lower, gap)``; ``lower`` is the tensor itself for forward differences. The gap is in
    the accumulation dtype; dividing by it instead of by the nominal step removes the rounding of the perturbed state.

    An infinite element does not move, and its gap is infinite: what is taken of it is zero, as is the slope of
    whatever makes something finite of infinity.

    Raises:
        StepError: the step is lost in rounding for some element, all elements are lost beside the step, or it leaves
            the range of the dtype.
    """
    wide = accumulation_dtype(tensor.dtype)
    if not isinstance(step, Tensor):
        check_values_survive(tensor, step, where)
    by = step.to(tensor) if isinstance(step, Tensor) else step
    upper = tensor + by
    lower = tensor - by if scheme == "central" else tensor
    gap = upper.to(wide) - lower.to(wide)
    if bool(((gap > 0) & gap.isfinite()).all()):
        return upper, lower, gap
    still = immovable(tensor)
    if not bool((gap.isfinite() | still).all()):
        raise StepError(
            f"a step of {float(torch.as_tensor(step).max()):.3g} leaves the range of {tensor.dtype} in {where}; give a "
            "smaller step"
        )
    if not bool(((gap > 0) | still).all()):
        largest = float(tensor.masked_fill(still, 0).abs().max())
        smallest = float(torch.as_tensor(step).expand(tensor.shape)[~still].min())
        raise StepError(
            f"a step of {smallest:.3g} vanishes beside values of up to {largest:.3g} of {where} in {tensor.dtype}; "
            "give a larger step, or run this part in a wider dtype"
        )
    return torch.where(still, tensor, upper), torch.where(still, tensor, lower), gap.masked_fill(still, torch.inf)

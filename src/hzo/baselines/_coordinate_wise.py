"""Coordinate-wise gradient estimation (CGE): every parameter perturbed by itself."""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

from torch import Tensor, nn

from hzo.baselines import _evaluate as ev
from hzo.baselines._registry import baseline
from hzo.errors import InputError, StepError
from hzo.losses import LossFn


@baseline("coordinate")
def coordinate_wise(
    model: ev.Model,
    loss_fn: LossFn,
    x: Any,
    y: Any = None,
    *,
    scheme: Literal["central", "forward"] = "central",
    step: float | None = None,
) -> Tensor:
    """Finite differences over every trainable parameter; adds the gradient to ``.grad`` and returns the loss.

    Estimates: ``ĝᵢ = (L(θ + h eᵢ) − L(θ − h eᵢ)) / 2h`` (central), or ``(L(θ + h eᵢ) − L(θ)) / h`` (forward).
    The h divided by is the change that the parameter's dtype really made.

    Error, nothing being random: O(h²) from third derivatives (central; exact for a quadratic loss up to
    rounding) or O(h) from second ones (forward), and rounding of about u·|L|/h.

    Cost: a base pass and 2d (central) or d (forward) full forward passes for d trainable elements.

    Args:
        model: module or ``hzo.Chain``.
        loss_fn: called as ``loss_fn(model(x), y)``; returns a scalar, or values whose mean is the loss.
        x: tensor, tuple (``model(*x)``) or dict (``model(**x)``).
        y: target; None calls ``loss_fn(output)``.
        scheme: "central" or "forward".
        step: h; default u^(1/3) central (5e-3 in float32, the paper's step) and u^(1/2) forward, u the
            rounding unit.

    Source: A. Chen et al., DeepZero: Scaling up zeroth-order optimization for deep model training, ICLR 2024,
    which uses forward differences on a sparse choice of coordinates; all of them are taken here.
    """
    if scheme not in ("central", "forward"):
        raise InputError(f"expected scheme 'central' or 'forward', got {scheme!r}")
    p = ev.problem(model, loss_fn, x, y)
    parameters = list(p.parameters.values())
    default = ev.rounding(parameters) ** (1 / 3 if scheme == "central" else 1 / 2)
    step = ev.checked_step(step, default, p.parameters)
    gradients = [ev.accumulator(parameter) for parameter in parameters]
    with ev.queried(p) as (loss, loss_at, _), ev.held(parameters) as copies:
        base = float(loss)
        for parameter, copy, gradient in zip(parameters, copies, gradients, strict=True):
            for index in product(*map(range, parameter.shape)):
                upper, above = _query(parameter, copy, index, step, loss_at)
                lower, below = float(copy[index]), base
                if scheme == "central":
                    lower, below = _query(parameter, copy, index, -step, loss_at)
                gradient[index] = (above - below) / (upper - lower)
    ev.add_to_grad(p, zip(parameters, gradients, strict=True))
    return loss


def _query(
    parameter: nn.Parameter, copy: Tensor, index: tuple[int, ...], change: float, loss_at: ev.LossAt
) -> tuple[float, float]:
    """The value that one element took, and the loss there; afterwards it holds its own value again."""
    centre = float(copy[index])
    parameter.data[index] = centre + change
    moved = float(parameter.data[index])
    if moved == centre:
        raise StepError(
            f"a step of {change:g} vanishes in an element of {centre:.3g} in {parameter.dtype}. "
            "Give a larger step, or the model a wider dtype."
        )
    loss = loss_at()
    parameter.data[index] = copy[index]
    return moved, loss

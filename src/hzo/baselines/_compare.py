"""``compare_gradients``: hzo's gradient beside backprop's, parameter by parameter, where backprop exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from hzo.baselines._backprop import backprop
from hzo.distributed import refuse_wrappers
from hzo.execution import as_checks, contained, copied
from hzo.finite_differences import real_parts
from hzo.gradients import grad_and_value
from hzo.tape.surroundings import refuse_transforms
from hzo.tracing import Chain, module_of


@dataclass(frozen=True)
class GradientComparison:
    """The result of ``hzo.compare_gradients``: how each parameter's gradient differs from backprop's, by name.

    Attributes:
        cosines: between the two gradients; 1 where both are zero. errors: relative to backprop's length.
        missing: parameters that only one of the two has a gradient for that is not zero.
        overall: the cosine between the gradients of all parameters together; NaN where one of the two is zero.
    """

    cosines: dict[str, float]
    errors: dict[str, float]
    missing: tuple[str, ...]
    overall: float

    @property
    def cosine(self) -> float:
        """The lowest cosine of all parameters."""
        return min(self.cosines.values(), default=1.0) if not self.missing else 0.0

    def __str__(self) -> str:
        width = max((len(name) for name in self.cosines), default=9)
        lines = [f"{'parameter':{width}}  1 − cosine  relative error"]
        for name in sorted(self.cosines, key=self.cosines.__getitem__):
            lines.append(f"{name:{width}}  {1 - self.cosines[name]:10.1e}  {self.errors[name]:14.1e}")
        lines.append(f"{'all':{width}}  {1 - self.overall:10.1e}")
        return "\n".join([*lines, *(f"{name}: has a gradient by one of the two only" for name in self.missing)])

    __repr__ = __str__


def compare_gradients(
    model: Chain | nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any = None,
    *,
    gradient: dict[str, Tensor] | None = None,
    **options: Any,
) -> GradientComparison:
    """Compare hzo's gradient with backprop's for every parameter; runs autograd, so for networks that allow it.

    Args:
        model, loss_fn, x, y: as for ``hzo.backward``.
        gradient: to compare, by parameter name; None takes that of ``hzo.grad_and_value`` with ``options``.

    Returns cosines and relative errors; ``print`` it. ``.grad``, buffers and random state are as before. Cost: one
    gradient of each, from the same random numbers. Source: ours.
    """
    refuse_transforms()
    refuse_wrappers(model)
    module = module_of(model)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    held = [module, *([loss_fn] if isinstance(loss_fn, nn.Module) else [])]
    with as_checks():
        if gradient is None:
            with contained(held, [loss_fn]):
                gradient, _ = grad_and_value(model, loss_fn, *copied((x, y)), **options)
        with contained(held, [loss_fn]):  # .grad included
            for p in (p for part in held for p in part.parameters()):
                p.grad = None
            backprop(model, loss_fn, *copied((x, y)))
            exact = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    cosines, errors, missing = {}, {}, []
    product = squares = exact_squares = 0.0
    for name in parameters:
        g, e = gradient.get(name), exact.get(name)
        # In float64: a cosine is to tell 0.999999 from 1, whatever the dtype.
        a, b = (None if t is None else real_parts(t.to_dense()).double().flatten() for t in (g, e))
        lengths = [0.0 if t is None else float(t.norm()) for t in (a, b)]
        squares, exact_squares = squares + lengths[0] ** 2, exact_squares + lengths[1] ** 2
        if a is None or b is None:
            if any(lengths):
                missing.append(name)
            continue
        both, along = lengths[0] * lengths[1], float(torch.dot(a, b.to(a.device)))
        product += along
        cosines[name] = along / both if both else float(lengths[0] == lengths[1])
        errors[name] = float((a - b.to(a.device)).norm()) / lengths[1] if lengths[1] else lengths[0]
    size = (squares * exact_squares) ** 0.5
    return GradientComparison(cosines, errors, tuple(missing), product / size if size > 0 else nan)

"""``compare_gradients``: hzo's gradient beside backprop's, parameter by parameter, where backprop exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hzo.baselines._backprop import backprop
from hzo.execution import as_checks, contained
from hzo.gradients import grad_and_value
from hzo.tracing import Chain


@dataclass(frozen=True)
class GradientComparison:
    """What ``compare_gradients`` found, by parameter name.

    Attributes:
        cosines: between the two gradients; 1 where both are zero. errors: relative to backprop's length.
        missing: parameters that only one of the two has a gradient for that is not zero.
    """

    cosines: dict[str, float]
    errors: dict[str, float]
    missing: tuple[str, ...]

    @property
    def cosine(self) -> float:
        """The lowest cosine of all parameters."""
        return min(self.cosines.values(), default=1.0) if not self.missing else 0.0

    def __str__(self) -> str:
        width = max((len(name) for name in self.cosines), default=9)
        lines = [f"{'parameter':{width}}  1 − cosine  relative error"]
        for name in sorted(self.cosines, key=self.cosines.__getitem__):
            lines.append(f"{name:{width}}  {1 - self.cosines[name]:10.1e}  {self.errors[name]:14.1e}")
        return "\n".join([*lines, *(f"{name}: has a gradient by one of the two only" for name in self.missing)])

    __repr__ = __str__


def compare_gradients(
    model: Chain | nn.Module, loss_fn: Callable[..., Any], x: Any, y: Any = None, **options: Any
) -> GradientComparison:
    """Compare hzo's gradient with backprop's for every parameter; runs autograd, so for networks that allow it.

    Args:
        model, loss_fn, x, y, options: as for ``hzo.backward``.

    Returns cosines and relative errors; ``print`` it. ``.grad``, buffers and random state are as before. Cost: one
    gradient of each, from the same random numbers. Source: ours.
    """
    module = model.model if isinstance(model, Chain) else model
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    held = {name: p.grad for name, p in parameters.items()}
    with as_checks():
        with contained([module]):
            found, _ = grad_and_value(model, loss_fn, x, y, **options)
        try:
            with contained([module]):
                for p in parameters.values():
                    p.grad = None
                backprop(model, loss_fn, x, y)
                exact = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        finally:
            for name, p in parameters.items():
                p.grad = held[name]
    cosines, errors, missing = {}, {}, []
    for name in parameters:
        g, e = found.get(name), exact.get(name)
        if g is None or e is None:
            only = g if e is None else e
            if only is not None and bool(only.any()):
                missing.append(name)
            continue
        a, b = g.double().flatten(), e.to_dense().double().flatten()
        lengths = float(a.norm()), float(b.norm())
        both = lengths[0] * lengths[1]
        cosines[name] = float(torch.dot(a, b)) / both if both else float(lengths[0] == lengths[1])
        errors[name] = float((a - b).norm()) / lengths[1] if lengths[1] else lengths[0]
    return GradientComparison(cosines, errors, tuple(missing))

"""``check_gradient``: is a gradient the derivative of what the model really computes? By forward passes alone.

The only test of a gradient that needs no autograd, and so the only one for a network with real hardware in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from hzo._options import whole
from hzo.distributed import refuse_wrappers, unwrapped, without_collectives
from hzo.errors import InputError
from hzo.execution import as_checks, contained, copied, counting
from hzo.finite_differences import real_parts
from hzo.gradients import grad_and_value
from hzo.tape.surroundings import refuse_transforms
from hzo.tracing import Chain, call_arguments, module_of
from hzo.verification.localize import WrongOperation, locate
from hzo.verification.slopes import Slope, measured_slope


@dataclass(frozen=True)
class GradientCheck:
    """The result of ``hzo.check_gradient``: measured slopes of the loss beside those that the gradient predicts.

    Attributes:
        slopes: along the gradient itself, then along random directions.
        wrong: the parameters whose gradient disagrees with the loss, found by bisection. Empty where all agree.
        operation: the call that hands back a wrong cotangent, found by bisection over the boundaries between calls.
            None where all agree, and where the gradient was given and hzo's own is right.
    """

    slopes: tuple[Slope, ...]
    wrong: tuple[Slope, ...]
    operation: WrongOperation | None = None

    @property
    def holds(self) -> bool:
        """Whether the loss agrees with the gradient along every direction tried."""
        return all(slope.agrees for slope in self.slopes)

    @property
    def ratio(self) -> float:
        """Along the gradient: its squared length over the measured slope; 1 for a right gradient."""
        return self.slopes[0].ratio

    def __str__(self) -> str:
        head = "the gradient agrees with the loss" if self.holds else "the gradient DISAGREES with the loss"
        lines = [head, *(f"  {slope}" for slope in self.slopes)]
        if self.wrong:
            lines += ["the disagreement sits in:", *(f"  {slope}" for slope in self.wrong)]
        if self.operation is not None:
            lines += ["and begins, from the loss back, in:", f"  {self.operation}"]
        return "\n".join(lines)

    __repr__ = __str__


def check_gradient(
    model: Chain | nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any = None,
    *,
    directions: int = 3,
    gradient: dict[str, Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> GradientCheck:
    """Test a gradient against the loss itself, by forward passes alone: no autograd, no assumption about any layer.

    Along the gradient and along random directions ``v`` in parameter space, the measured slope
    ``(L(θ + εv) − L(θ − εv)) / 2ε`` must equal ``⟨g, v⟩``. Where it does not, parameters are bisected until those are
    found that disagree, and the boundaries between calls, until the call is found whose cotangent is wrong first.

    Args:
        model, loss_fn, x, y: as for ``hzo.backward``.
        directions: random directions beside the gradient's own.
        gradient: the gradient to test, by parameter name; None takes that of ``hzo.grad_and_value`` with ``options``.
        seed: of the directions, drawn apart from the global random state.

    Returns slopes with error bars, the parameters that are wrong and the call that makes them so; ``print`` it.
    Parameters, buffers, ``.grad`` and random state are as before. Cost: 4 forward passes a direction, and where one
    disagrees 4 for each step of a bisection over parameters, 12 over calls, counted as ``check_evaluations``. A kink
    (ReLU) inside the step shows in the error bar. Source: ours.

    Raises:
        InputError: nothing to test. Errors of ``hzo.grad_and_value``.
    """
    refuse_transforms()
    refuse_wrappers(model)
    model = unwrapped(model)  # each process tests its own gradient against its own loss
    module = module_of(model)
    whole("directions", directions)
    was_given = gradient is not None
    held = [module, *([loss_fn] if isinstance(loss_fn, nn.Module) else [])]
    with contained(held, [loss_fn]), as_checks():
        if gradient is None:
            gradient, _ = grad_and_value(model, loss_fn, *copied((x, y)), **options)
    gradient = {name: real_parts(g.to_dense()) for name, g in gradient.items()}
    parameters = {name: p for name, p in module.named_parameters() if name in gradient}
    if not parameters:
        raise InputError("there is no gradient to test: none of the names given belongs to a parameter of the model")
    task = _GradientTest(module, held, loss_fn, x, y, parameters, gradient)
    generator = torch.Generator().manual_seed(seed)
    own = {name: g for name, g in gradient.items() if name in parameters}
    slopes = [task.slope("along the gradient", own)]
    drawn = [task.random(generator) for _ in range(directions)]
    slopes += [task.slope(f"random direction {k + 1}", v) for k, v in enumerate(drawn)]
    wrong: list[Slope] = []
    for slope, v in zip(slopes, [own, *drawn], strict=True):
        if not slope.agrees and not wrong:
            wrong = task.bisect(list(parameters), v)
    if all(slope.agrees for slope in slopes):
        return GradientCheck(tuple(slopes), ())
    with contained(held, [loss_fn]), as_checks():
        x, y = copied((x, y))
        operation = locate(model, loss_fn, x, y, options, seed, () if was_given else wrong)
    return GradientCheck(tuple(slopes), tuple(wrong), operation)


def padding_rows(module: nn.Module) -> dict[int, list[int]]:
    """Rows of embedding tables that stand for padding, by the table's identity."""
    found: dict[int, list[int]] = {}
    for inner in module.modules():
        if isinstance(inner, (nn.Embedding, nn.EmbeddingBag)) and inner.padding_idx is not None:
            found.setdefault(id(inner.weight), []).append(inner.padding_idx)
    return found


@dataclass(frozen=True)
class _GradientTest:
    module: nn.Module
    held: list[nn.Module]  # with the loss, where that is a module
    loss_fn: Callable[..., Any]
    x: Any
    y: Any
    parameters: dict[str, nn.Parameter]
    gradient: dict[str, Tensor]

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A direction that moves every parameter in proportion to its size, rows of padding, by convention without a
        gradient, not at all."""
        found, rows = {}, padding_rows(self.module)
        for name, p in self.parameters.items():
            moved = real_parts(p)
            scale = float(moved.square().mean().sqrt()) if p.numel() else 0.0
            noise = torch.randn(moved.shape, generator=generator, dtype=torch.float64)
            found[name] = (noise * (scale or 1.0)).to(moved)
            for row in rows.get(id(p), ()):
                found[name][row] = 0
        return found

    def slope(self, name: str, direction: dict[str, Tensor]) -> Slope:
        """Measure along a direction: two central differences, whose difference tells the error."""
        wide = {n: v.double() for n, v in direction.items()}
        length = sqrt(sum(float(v.square().sum()) for v in wide.values()))
        expected = sum(float((self.gradient[n].double() * v).sum()) for n, v in wide.items())
        if length == 0:
            return Slope(name, expected, 0.0, 0.0)
        size = sqrt(sum(float(real_parts(self.parameters[n]).double().square().sum()) for n in direction))
        unit = max(torch.finfo(p.dtype).eps for p in self.parameters.values())
        step = unit ** (1 / 3) * (size or 1.0) / length
        return measured_slope(name, expected, lambda by: self.loss(direction, by), step, unit)

    def loss(self, direction: dict[str, Tensor], step: float) -> float:
        """The mean loss with the parameters moved; everything else as before."""
        before = {name: self.parameters[name].detach().clone() for name in direction}
        x, y = copied((self.x, self.y))
        args, kwargs = call_arguments(x)
        with contained(self.held, [self.loss_fn]), torch.no_grad(), without_collectives("the model"):
            try:
                for name, v in direction.items():
                    real_parts(self.parameters[name]).add_(v, alpha=step)
                output = self.module(*args, **kwargs)
                loss = self.loss_fn(output) if y is None else self.loss_fn(output, y)
                counting.add(check_evaluations=1)
                return float(torch.as_tensor(loss).double().mean())
            finally:
                for name, copy in before.items():
                    self.parameters[name].copy_(copy)

    def bisect(self, names: Sequence[str], direction: dict[str, Tensor]) -> list[Slope]:
        """The parameters, one by one, along which gradient and loss disagree."""
        slope = self.slope(names[0] if len(names) == 1 else "", {n: direction[n] for n in names})
        if slope.agrees:
            return []
        if len(names) == 1:
            return [slope]
        half = len(names) // 2
        return [*self.bisect(names[:half], direction), *self.bisect(names[half:], direction)]

"""``declare``: what a user promises of a module of their own, in one line.

A declared module is one operation of the chain and keeps its forward pass. Nothing is assumed of it but what was
declared, its type notwithstanding: ``hzo.declare(layer)`` makes a black box of an ``nn.Linear`` whose forward pass
runs in hardware that is not what its type says. Its parameters have no closed rule and are perturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor
from typing import TypeVar, cast

from torch import nn
from torch.nn.modules import module as _module_globals

from hzo._options import positive
from hzo.errors import InputError
from hzo.tape.marks import ATTRIBUTE, Marks, marks_of
from hzo.tape.surroundings import others_watch_calls

PROMISES = {
    "elementwise": "an output element depends on the input element of the same place alone",
    "affine": "x ↦ A x + b for every sample, with one A and one b for all samples",
    "tokens": "every place along the last dimension's vectors is mapped on its own, and all places alike",
    "reindexing": "every output element is a copy of an input element, or zero",
    "symmetric": "the Jacobian of every sample is its own transpose, as that of a gradient, or of a symmetric matrix",
    "stationary": "shifted input, shifted output; outside lie zeros: with 'affine' and a Local for every spatial axis",
}
"""Promises that are a word; ``Local`` is the one that has numbers in it."""

Number = int | Fraction
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Local:
    """A promise for ``hzo.declare``: along one axis, an output depends on a window of the input, as in a convolution.

    Along ``axis`` output place o depends on input places o·stride + low … o·stride + high alone.

    Axes are those of the whole tensor, the batch is axis 0; a negative one counts from the end. ``Local(axis)`` says
    that places along the axis do not mix. An upsampling by two has ``stride=Fraction(1, 2)``.
    """

    axis: int
    low: Number = 0
    high: Number = 0
    stride: Number = 1

    def __str__(self) -> str:
        numbers = ", ".join(_written(number) for number in (self.low, self.high, self.stride))
        return f"Local({self.axis}, {numbers})"

    def matrix(self, inputs: int, outputs: int) -> tuple[int, ...]:
        """For every output place the input places it may depend on, as the bits of a whole number."""
        rows = []
        for o in range(outputs):
            first = max(0, ceil(o * self.stride + self.low))
            last = min(inputs - 1, floor(o * self.stride + self.high))
            rows.append(((1 << (last + 1)) - 1) & -(1 << first) if last >= first else 0)
        return tuple(rows)


Promise = str | Local


def _written(number: Number) -> str:
    return repr(number) if isinstance(number, Fraction) and number.denominator > 1 else str(number)


def declare(module: Module, *promises: Promise, step: float | None = None) -> Module:
    """Tell hzo what holds of a module of your own, so that its gradient takes fewer queries; returns the module.

    What is declared (elementwise, affine, local, …) holds of its Jacobian, and nothing else is assumed of it.

    Args:
        module: your own, from one tensor with the batch in dimension 0 to one alike. Only this instance (and copies of
            it) is declared; declaring again replaces what was declared before.
        promises: words out of ``hzo.tracing.PROMISES``, and ``hzo.Local`` for locality along an axis. None make the
            module a black box, perturbed element by element.
        step: length h of all differences of what goes into this module, whatever step a plan takes elsewhere: half
            the quantum of a quantizer, whose difference over a whole quantum is then its mean slope.

    ``hzo.check_structure`` tests what is declared, ``hzo.infer_structure`` proposes it. Cost: none. Source: ours.

    Raises:
        InputError: not a module, an unknown promise, or a step that is not positive and finite.
    """
    if not isinstance(module, nn.Module):
        raise InputError(
            f"hzo.declare expected an nn.Module, got a {type(module).__name__}; put a function into hzo.blackbox first"
        )
    for promise in promises:
        if isinstance(promise, Local):
            _check_local(promise)
        elif promise not in PROMISES:
            raise InputError(f"expected promises out of {', '.join(PROMISES)} and hzo.Local(axis, …), got {promise!r}")
    length = None if step is None else positive("step", step, "leave it out for the plan's own")
    known = marks_of(module) or Marks()
    setattr(module, ATTRIBUTE, replace(known, promises=tuple(dict.fromkeys(promises)), step=length))
    return module


def _check_local(promise: Local) -> None:
    if promise.axis == 0:
        raise InputError("hzo.Local(0) speaks of the batch, whose samples are apart anyway; give an axis of a sample")
    if promise.low > promise.high or promise.stride <= 0:
        raise InputError(f"expected a Local with low ≤ high and stride > 0, got {promise}")


def declared(module: nn.Module | None) -> tuple[Promise, ...] | None:
    """What was declared of a module; None where nothing was, so that its type speaks for it."""
    marks = marks_of(module)
    return None if marks is None else cast("tuple[Promise, ...] | None", marks.promises)


def declared_step(module: nn.Module | None) -> float | None:
    """The step that was declared for what goes into a module."""
    marks = marks_of(module)
    return None if marks is None else marks.step


def local_along(promises: Sequence[Promise], dims: int) -> dict[int, Local]:
    """By axis (counted from the start) what is promised of it, elementwise and tokens included."""
    local = [p for p in promises if isinstance(p, Local)]
    for promise in local:
        if not -dims < promise.axis < dims:
            raise InputError(f"{promise} was declared of a module whose input has {dims} axes, the batch's included")
    found = {promise.axis % dims: promise for promise in local}
    if "elementwise" in promises:
        found.update({axis: Local(axis) for axis in range(1, dims)})
    if "tokens" in promises:
        found.update({axis: Local(axis) for axis in range(1, dims - 1)})
    return found


def untouched(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs the forward of its class and nothing else.

    False with forward hooks (its own or global), a parametrization or weight norm, an instance attribute
    in place of a method, or a declaration (``hzo.declare``), which speaks for it instead. The exact type of the
    module is the caller's to check. Source: ours.
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        _module_globals._global_forward_hooks,
    )
    shadowed = any(callable(getattr(type(module), name, None)) for name in vars(module))
    spoken_for = declared(module) is not None or nn.utils.parametrize.is_parametrized(module)
    return not any(hooks) and not others_watch_calls() and not shadowed and not spoken_for


def declared_links(
    promises: Sequence[Promise], inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[dict[int, tuple[int, ...]], ...]:
    """What is declared as links of a dependence pattern (see sparsity.py), one for each axis of the input.

    Args:
        inputs, outputs: shapes of one sample, with an axis of size 1 in place of the batch.
    """
    if len(outputs) != len(inputs):
        return tuple({} for _ in inputs)
    local = local_along(promises, len(inputs))
    return tuple(
        {axis: local[axis].matrix(size, outputs[axis])} if axis in local else {} for axis, size in enumerate(inputs)
    )

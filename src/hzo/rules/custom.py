"""Custom autograd Functions: their own backward is their rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo.errors import TapeError
from hzo.rules.base import Call, Cotangents, Key, Rule
from hzo.tape.custom import CustomFunction
from hzo.tape.operations import Ref


def _backward(call: Call) -> Cotangents:
    """What the user's backward says, one cotangent for every argument of the forward."""
    function = call.op.target
    assert isinstance(function, CustomFunction)
    grads: list[Tensor | None] = []
    for value, grad in zip(call.op.writes, call.grads, strict=True):
        if grad is None and value is not None and function.materializes:
            about = call.tape.values[value]
            grad = torch.zeros(about.shape, dtype=about.dtype, device=about.device)  # noqa: PLW2901
        grads.append(grad)
    try:
        result = function.carry_back(grads)
    except RuntimeError as error:
        if "no autograd formula was registered" not in str(error):
            raise
        raise TapeError(
            f"{error} Or make the operator a black box, whose derivative is measured: hzo.blackbox"
        ) from error
    _check(repr(function), result, [_shape(call, argument) for argument in call.op.args])
    found: dict[Key, Any] = {}
    for key, grad in enumerate(result[: len(call.args)]):
        if isinstance(grad, Tensor) and call.needs(key):
            found[key] = grad
    return found


def _shape(call: Call, argument: Any) -> torch.Size | None:
    return call.tape.values[argument.value].shape if isinstance(argument, Ref) else None


def _check(name: str, result: tuple[Any, ...], shapes: list[torch.Size | None]) -> None:
    """What autograd asks of a backward: a gradient, or None, for each argument, each of its argument's shape."""
    if len(result) < len(shapes) or any(grad is not None for grad in result[len(shapes) :]):
        raise TapeError(
            f"the backward of {name} returned {len(result)} gradients for {len(shapes)} arguments of its forward; "
            "return one for each, None where there is none"
        )
    for k, (grad, shape) in enumerate(zip(result, shapes, strict=False)):
        if grad is not None and not isinstance(grad, Tensor):
            raise TapeError(
                f"the backward of {name} returned a {type(grad).__name__} for argument {k}; return a tensor, or None"
            )
        if grad is not None and shape is not None and not _expands(shape, grad.shape):
            raise TapeError(
                f"the backward of {name} returned a gradient of shape {tuple(grad.shape)} for argument {k}, which has "
                f"shape {tuple(shape)}"
            )


def _expands(shape: torch.Size, wide: torch.Size) -> bool:
    """Whether a gradient of the second shape can be summed to the first."""
    n = len(wide) - len(shape)
    return n >= 0 and all(a in (1, b) for a, b in zip(shape, wide[n:], strict=True))


CUSTOM = Rule(_backward)

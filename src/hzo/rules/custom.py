"""Custom autograd Functions: their own backward is their rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo.errors import TapeError
from hzo.rules.base import Call, Cotangents, Key, Rule
from hzo.tape.custom import CustomFunction


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
    found: dict[Key, Any] = {}
    for key, grad in enumerate(result[: len(call.args)]):
        if isinstance(grad, Tensor) and call.needs(key):
            found[key] = grad
    return found


CUSTOM = Rule(_backward)

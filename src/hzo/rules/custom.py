"""Custom autograd Functions: their own backward is their rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, Rule
from hzo.tape.custom import CustomFunction


def _backward(call: Call) -> Cotangents:
    """What the user's backward says, one cotangent for every argument of the forward."""
    function = call.op.target
    assert isinstance(function, CustomFunction)
    grads: list[Tensor] = []
    for value, grad in zip(call.op.writes, call.grads, strict=True):
        if grad is not None:
            grads.append(grad)
        elif value is not None:
            about = call.tape.values[value]
            grads.append(torch.zeros(about.shape, dtype=about.dtype, device=about.device))
    result = function.carry_back(grads)
    found: dict[Key, Any] = {}
    for key, grad in enumerate(result[: len(call.args)]):
        if isinstance(grad, Tensor) and call.needs(key):
            found[key] = grad
    return found


CUSTOM = Rule(_backward)

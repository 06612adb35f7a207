"""Elementwise calls: the slope of their type, element by element."""

from __future__ import annotations

import torch

from hzo.rules.base import Call, Cotangents, unbroadcast, vjp

aten = torch.ops.aten


@vjp(aten.add.Tensor)
def add(call: Call) -> Cotangents:
    """``a + alpha * b``."""
    a, b = call.args[:2]
    alpha = call.kwargs.get("alpha", 1)
    found = {}
    if call.needs(0):
        found[0] = unbroadcast(call.grad, a)
    if call.needs(1):
        found[1] = unbroadcast(call.grad if alpha == 1 else call.grad * alpha, b)
    return found


@vjp(aten.tanh.default)
def tanh(call: Call) -> Cotangents:
    """``tanh(x)``, from its result."""
    return {0: aten.tanh_backward(call.grad, call.result)}

"""Softmax and its logarithm, from their results."""

from __future__ import annotations

import torch

from hzo.rules.base import Call, Cotangents, vjp

aten = torch.ops.aten


@vjp(aten._softmax.default, lean=True)
def softmax(call: Call) -> Cotangents:
    """``y (g - sum(g y))``."""
    x, dim = call.args[:2]
    return {0: aten._softmax_backward_data(call.grad, call.result, dim, x.dtype)}


@vjp(aten._safe_softmax.default)
def safe_softmax(call: Call) -> Cotangents:
    """Softmax that is zero where everything is masked."""
    return {0: aten._softmax_backward_data(call.grad, call.result, call.args[1], call.grad.dtype)}


@vjp(aten._masked_softmax.default)
def masked_softmax(call: Call) -> Cotangents:
    """Softmax of what a mask leaves."""
    return {0: aten._masked_softmax_backward(call.grad, call.result, call.args[1], call.arg(2, "dim"))}


@vjp(aten._log_softmax.default, lean=True)
def log_softmax(call: Call) -> Cotangents:
    """``g - exp(y) sum(g)``."""
    x, dim = call.args[:2]
    return {0: aten._log_softmax_backward_data(call.grad, call.result, dim, x.dtype)}

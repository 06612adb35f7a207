"""Calls that move elements: their VJP moves the cotangent back."""

from __future__ import annotations

import torch

from hzo.rules.base import Call, Cotangents, vjp

aten = torch.ops.aten


@vjp(aten.t.default)
def t(call: Call) -> Cotangents:
    """A matrix transposed."""
    return {0: call.grad.t()}


@vjp(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(call: Call) -> Cotangents:
    """Another shape for the same elements in order."""
    return {0: call.grad.reshape(call.args[0].shape)}

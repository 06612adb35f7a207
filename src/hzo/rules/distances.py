"""Distances between rows. They are not affine, so that no identity measures them: what they were given is read."""

from __future__ import annotations

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, vjp

aten = torch.ops.aten


@vjp(aten._cdist_forward.default)
def cdist(call: Call) -> Cotangents:
    """Distances between the rows of two matrices, or of batches of them."""
    x, y, p = call.args[:3]
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = aten._cdist_backward(call.grad.contiguous(), x, y, p, call.result)
    if call.needs(1):
        found[1] = aten._cdist_backward(call.grad.mT.contiguous(), y, x, p, call.result.mT.contiguous())
    return found


@vjp(aten._euclidean_dist.default)
def euclidean_dist(call: Call) -> Cotangents:
    """Euclidean distances between rows, computed by a product; no slope where a distance is zero."""
    x, y = call.args
    distance = call.result
    ratio = torch.where(distance == 0, torch.zeros_like(distance), call.grad / distance)
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = x * ratio.sum(-1, keepdim=True) - ratio @ y
    if call.needs(1):
        found[1] = y * ratio.sum(-2).unsqueeze(-1) - ratio.mT @ x
    return found


@vjp(aten._pdist_forward.default)
def pdist(call: Call) -> Cotangents:
    """Distances between the rows of one matrix."""
    p = call.arg(1, "p", 2.0)
    return {0: aten._pdist_backward(call.grad.contiguous(), call.args[0], p, call.result)}

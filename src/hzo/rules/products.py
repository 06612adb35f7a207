"""Products of two operands: the Jacobian with respect to one is the other; where that is a weight, it is measured."""

from __future__ import annotations

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, vjp

aten = torch.ops.aten


def _identity(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _right_factor(call: Call, left: int, right: int) -> Tensor:
    """The right factor of ``left @ right``: as it was seen, or measured by the rows of an identity where it is a weight.

    Cost: as many samples as the left factor has columns. What the operator adds for a left factor of zeros (an offset of
    the hardware) is taken off.
    """
    if not call.weight(right) or call.weight(left):
        seen: Tensor = call.args[right]
        return seen
    x: Tensor = call.args[left]
    n = x.shape[-1]
    probe = torch.cat([_identity(x, n), x.new_zeros(1, n)])
    replaced = {left: probe}
    if left == 1:  # addmm: without its own offset, which would cost precision
        replaced[0] = call.args[0].new_zeros(1)
    seen = call.measure(replaced, probe)
    return seen[:n] - seen[n:]


@vjp(aten.mm.default, measures=True)
def mm(call: Call) -> Cotangents:
    """``x @ w``."""
    found = {}
    if call.needs(0):
        found[0] = call.grad @ _right_factor(call, 0, 1).mT
    if call.needs(1):
        found[1] = call.args[0].mT @ call.grad
    return found


@vjp(aten.addmm.default, measures=True)
def addmm(call: Call) -> Cotangents:
    """``beta * b + alpha * x @ w``."""
    b, x, _ = call.args[:3]
    alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
    g = call.grad
    found = {}
    if call.needs(0):
        found[0] = (g if beta == 1 else g * beta).sum_to_size(b.shape)
    if call.needs(1):
        measured = call.weight(2) and not call.weight(1)  # alpha included
        factor = g @ _right_factor(call, 1, 2).mT
        found[1] = factor if measured or alpha == 1 else factor * alpha
    if call.needs(2):
        product = x.mT @ g
        found[2] = product if alpha == 1 else product * alpha
    return found

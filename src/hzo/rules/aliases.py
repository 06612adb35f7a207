"""The steps that in-place code implies: a storage's content, what is written into it, and what is read from it."""

from __future__ import annotations

from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, vjp
from hzo.tape.aliases import pass_through, read_window, write_window


@vjp(write_window)
def write(call: Call) -> Cotangents:
    """The content behind the window receives nothing; the window what shows there."""
    _, _, size, stride, offset = call.args
    g = call.grad
    found: dict[Key, Tensor] = {}
    if call.needs(1):
        found[1] = g.as_strided(size, stride, offset)
    if call.needs(0):
        rest = g.clone()
        rest.as_strided(size, stride, offset).zero_()
        found[0] = rest
    return found


@vjp(read_window)
def read(call: Call) -> Cotangents:
    """Zeros with the window filled."""
    content, size, stride, offset = call.args
    g = call.grad
    grad = g.new_zeros(content.shape)
    grad.as_strided(size, stride, offset).copy_(g)
    return {0: grad}


@vjp(pass_through)
def passed(call: Call) -> Cotangents:
    """A write under ``no_grad``: the cotangent passes to what was there before."""
    return {0: call.grad}

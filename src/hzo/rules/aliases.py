"""The steps that in-place code implies: a storage's content, what is written into it, and what is read from it."""

from __future__ import annotations

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, vjp
from hzo.tape.aliases import (
    Window,
    extent,
    overlaps_itself,
    pass_through,
    read_window,
    restride,
    restride_scatter,
    write_window,
)


@vjp(write_window)
def write(call: Call) -> Cotangents:
    """The window receives what shows there; the content that it replaced receives nothing."""
    _, _, size, stride, offset = call.args
    g = call.grad.contiguous()
    found: dict[Key, Tensor] = {}
    if call.needs(1):
        found[1] = g.as_strided(size, stride, g.storage_offset() + offset)
    if call.needs(0):
        rest = g.clone()
        rest.as_strided(size, stride, offset).zero_()
        found[0] = rest
    return found


@vjp(read_window)
def read(call: Call) -> Cotangents:
    """Zeros with the window filled."""
    content, *geometry = call.args
    return {0: _spread(call.grad, tuple(geometry), content.shape[0])}


def _spread(grad: Tensor, geometry: Window, length: int) -> Tensor:
    """A storage of zeros with a window added; elements that a window shows several times add up."""
    size, stride, offset = geometry
    content = grad.new_zeros(length)
    if 0 in stride:  # repeated along an axis
        repeated = [k for k, step in enumerate(stride) if step == 0]
        grad = grad.sum(repeated, keepdim=True)
        size = tuple(1 if k in repeated else length for k, length in enumerate(size))
    if overlaps_itself(size, stride):
        places = torch.arange(length, device=grad.device).as_strided(size, stride, offset)
        return content.index_add_(0, places.reshape(-1), grad.reshape(-1))
    content.as_strided(size, stride, offset).copy_(grad)
    return content


@vjp(pass_through)
def passed(call: Call) -> Cotangents:
    """A write under ``no_grad``: the cotangent passes to what was there before."""
    return {0: call.grad}


@vjp(restride)
def as_strided(call: Call) -> Cotangents:
    """``as_strided``: elements that lie outside of the operand are constants.

    Where the operand itself shows an element several times, each place receives an equal part, as in PyTorch.
    """
    _, _, layout, *window = call.args
    geometry: Window = tuple(window)
    content = _spread(call.grad, geometry, max(extent(layout), extent(geometry)))
    return {0: _parts(content, layout)}


def _parts(content: Tensor, layout: Window) -> Tensor:
    shown = content.as_strided(*layout)
    if not overlaps_itself(layout[0], layout[1]):
        return shown
    count = _spread(torch.ones_like(shown), layout, content.shape[0])
    return shown / count.as_strided(*layout)


@vjp(restride_scatter)
def as_strided_scatter(call: Call) -> Cotangents:
    """``as_strided_scatter``. PyTorch's own derivative of its first operand is wrong (seen in 2.13 and 2.14.1)."""
    _, _, layout, *window = call.args
    geometry: Window = tuple(window)
    content = _spread(call.grad, layout, max(extent(layout), extent(geometry)))
    found: dict[Key, Tensor] = {}
    if call.needs(1):
        found[1] = content.as_strided(*geometry).clone()
    if call.needs(0):
        content.as_strided(*geometry).zero_()
        found[0] = _parts(content, layout)
    return found

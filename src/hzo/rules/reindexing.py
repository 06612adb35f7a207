"""Calls that move, repeat, drop or pad elements: their VJP moves the cotangent back, and sums what was repeated.

No rule here reads a number of its operands, only shapes; reflection and replication pass the operand to PyTorch's own
kernels, which look at its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, vjp

aten = torch.ops.aten


# -- another shape for the same elements ------------------------------------------------------------------------------


@vjp(
    aten.view.default,
    aten.view_copy.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.unsqueeze.default,
    aten.unsqueeze_copy.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze_copy.default,
    aten.squeeze_copy.dim,
    aten.squeeze_copy.dims,
    lean=True,
)
def view(call: Call) -> Cotangents:
    """The same elements in the same order."""
    return {0: call.grad.reshape(call.args[0].shape)}


@vjp(aten.t.default, aten.t_copy.default, lean=True)
def t(call: Call) -> Cotangents:
    """A matrix transposed."""
    return {0: call.grad.t()}


@vjp(aten.transpose.int, aten.transpose_copy.int, lean=True)
def transpose(call: Call) -> Cotangents:
    """Two axes exchanged."""
    return {0: call.grad.transpose(call.args[1], call.args[2])}


@vjp(aten.permute.default, aten.permute_copy.default, lean=True)
def permute(call: Call) -> Cotangents:
    """Axes in another order."""
    dims = call.args[1]
    order = [0] * len(dims)
    for place, dim in enumerate(dims):
        order[dim] = place
    return {0: call.grad.permute(order)}


@vjp(aten.lift.default, aten.lift_fresh.default, aten.alias_copy.default)
def lift(call: Call) -> Cotangents:
    """The tensor itself."""
    return {0: call.grad}


@vjp(aten.view.dtype, aten.view_copy.dtype)
def view_dtype(_: Call) -> Cotangents:
    """The bits read as another type: no derivative, and autograd gives none."""
    return {}


# -- parts of a tensor ------------------------------------------------------------------------------------------------


@vjp(aten.slice.Tensor, aten.slice_copy.Tensor, lean=True)
def slice_(call: Call) -> Cotangents:
    """``x[..., start:end:step, ...]``."""
    dim, start, end, step = _slice_arguments(call, 1)
    return {0: aten.slice_backward(call.grad, call.args[0].shape, dim, start, end, step)}


def _slice_arguments(call: Call, first: int) -> tuple[int, int, int, int]:
    start, end = call.arg(first + 1, "start"), call.arg(first + 2, "end")
    return (
        call.arg(first, "dim", 0),
        0 if start is None else start,
        torch.iinfo(torch.int64).max if end is None else end,
        call.arg(first + 3, "step", 1),
    )


@vjp(aten.narrow_copy.default)
def narrow_copy(call: Call) -> Cotangents:
    """A copy of ``length`` elements of an axis."""
    x, dim, start, length = call.args
    start = start + x.shape[dim] if start < 0 else start
    return {0: aten.slice_backward(call.grad, x.shape, dim, start, start + length, 1)}


@vjp(aten.select.int, aten.select_copy.int, lean=True)
def select(call: Call) -> Cotangents:
    """One element of an axis."""
    x, dim, index = call.args
    return {0: aten.select_backward(call.grad, x.shape, dim, index)}


@vjp(aten.diagonal.default, aten.diagonal_copy.default)
def diagonal(call: Call) -> Cotangents:
    """A diagonal of two axes."""
    return {0: aten.diagonal_backward(call.grad, call.args[0].shape, *_diagonal_arguments(call, 1, (0, 0, 1)))}


def _diagonal_arguments(call: Call, first: int, default: tuple[int, int, int]) -> tuple[int, int, int]:
    return (
        call.arg(first, "offset", default[0]),
        call.arg(first + 1, "dim1", default[1]),
        call.arg(first + 2, "dim2", default[2]),
    )


@vjp(aten.unfold.default, aten.unfold_copy.default)
def unfold(call: Call) -> Cotangents:
    """Windows of an axis, which may overlap."""
    x, dim, size, step = call.args
    return {0: aten.unfold_backward(call.grad, x.shape, dim, size, step)}


@vjp(
    aten.split.Tensor,
    aten.split_copy.Tensor,
    aten.split_with_sizes.default,
    aten.split_with_sizes_copy.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    lean=True,
)
def split(call: Call) -> Cotangents:
    """Pieces of an axis."""
    return {0: torch.cat(_filled(call), call.arg(2, "dim", 0))}


@vjp(aten.unbind.int, aten.unbind_copy.int, lean=True)
def unbind(call: Call) -> Cotangents:
    """The elements of an axis one by one."""
    return {0: torch.stack(_filled(call), call.arg(1, "dim", 0))}


def _filled(call: Call) -> list[Tensor]:
    """Cotangents of all results; of those without one, zeros that take no memory."""
    given = next(g for g in call.grads if g is not None)
    zero = given.new_zeros(())
    return [
        zero.expand(call.tape.values[v].shape) if g is None and v is not None else g  # type: ignore[misc]
        for v, g in zip(call.op.writes, call.grads, strict=True)
    ]


# -- the VJPs of these, which derivatives inside a model call ---------------------------------------------------------


@vjp(aten.slice_backward.default)
def slice_backward(call: Call) -> Cotangents:
    """Zeros with a slice filled."""
    _, _, dim, start, end, step = call.args
    return {0: aten.slice(call.grad, dim, start, end, step)}


@vjp(aten.select_backward.default)
def select_backward(call: Call) -> Cotangents:
    """Zeros with one element of an axis filled."""
    return {0: call.grad.select(call.args[2], call.args[3])}


@vjp(aten.diagonal_backward.default)
def diagonal_backward(call: Call) -> Cotangents:
    """Zeros with a diagonal filled."""
    return {0: call.grad.diagonal(*call.args[2:5])}


@vjp(aten.unfold_backward.default)
def unfold_backward(call: Call) -> Cotangents:
    """Windows of an axis added up."""
    return {0: call.grad.unfold(*call.args[2:5])}


# -- a part replaced --------------------------------------------------------------------------------------------------


@vjp(aten.slice_scatter.default)
def slice_scatter(call: Call) -> Cotangents:
    """``x`` with ``x[..., start:end:step, ...]`` replaced."""
    dim, start, end, step = _slice_arguments(call, 2)
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = _emptied(call.grad, lambda g: aten.slice(g, dim, start, end, step))
    if call.needs(1):
        found[1] = aten.slice(call.grad, dim, start, end, step).expand(call.args[1].shape)
    return found


@vjp(aten.select_scatter.default)
def select_scatter(call: Call) -> Cotangents:
    """``x`` with one element of an axis replaced."""
    _, _, dim, index = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = _emptied(call.grad, lambda g: g.select(dim, index))
    if call.needs(1):
        found[1] = call.grad.select(dim, index)
    return found


@vjp(aten.diagonal_scatter.default)
def diagonal_scatter(call: Call) -> Cotangents:
    """``x`` with a diagonal replaced."""
    arguments = _diagonal_arguments(call, 2, (0, 0, 1))
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = _emptied(call.grad, lambda g: g.diagonal(*arguments))
    if call.needs(1):
        found[1] = call.grad.diagonal(*arguments)
    return found


def _emptied(grad: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy with zeros in a part of it."""
    copy = grad.clone()
    part(copy).zero_()
    return copy


# -- tensors put together ---------------------------------------------------------------------------------------------


@vjp(aten.cat.default, lean=True)
def cat(call: Call) -> Cotangents:
    """Tensors one after the other along an axis."""
    tensors: tuple[Tensor, ...] = call.args[0]
    g = call.grad
    dim = call.arg(1, "dim", 0) % g.dim()
    found: list[Tensor | None] = []
    start = 0
    for tensor, needed in zip(tensors, call.each(0), strict=True):
        if tensor.dim() != g.dim():  # an empty tensor of one axis may stand beside any others
            found.append(g.new_zeros(tensor.shape) if needed else None)
            continue
        length = tensor.shape[dim]
        found.append(g.narrow(dim, start, length) if needed else None)
        start += length
    return {0: found}


@vjp(aten.stack.default, lean=True)
def stack(call: Call) -> Cotangents:
    """Tensors along an axis of their own."""
    dim = call.arg(1, "dim", 0)
    return {0: [call.grad.select(dim, k) if needed else None for k, needed in enumerate(call.each(0))]}


@vjp(aten.block_diag.default)
def block_diag(call: Call) -> Cotangents:
    """Matrices along the diagonal of a larger one."""
    found: list[Tensor | None] = []
    row = column = 0
    for tensor, needed in zip(call.args[0], call.each(0), strict=True):
        height, width = tensor.shape if tensor.dim() == 2 else (1, tensor.numel())
        block = call.grad[row : row + height, column : column + width]
        found.append(block.reshape(tensor.shape) if needed else None)
        row, column = row + height, column + width
    return {0: found}


# -- elements repeated ------------------------------------------------------------------------------------------------


@vjp(aten.expand.default, aten.expand_copy.default, lean=True)
def expand(call: Call) -> Cotangents:
    """Axes of one element, repeated."""
    return {0: call.grad.sum_to_size(call.args[0].shape)}


@vjp(aten.repeat.default)
def repeat(call: Call) -> Cotangents:
    """The tensor itself, repeated along its axes."""
    x, repeats = call.args
    new = len(repeats) - x.dim()
    shape: list[int] = list(repeats[:new])
    summed = list(range(new))
    for times, length in zip(repeats[new:], x.shape, strict=True):
        if times != 1:
            summed.append(len(shape))
            shape.append(times)
        shape.append(length)
    g = call.grad.reshape(shape)
    return {0: g.sum(summed) if summed else g}


# -- elements moved ---------------------------------------------------------------------------------------------------


@vjp(aten.flip.default)
def flip(call: Call) -> Cotangents:
    """The elements of some axes in reverse order."""
    return {0: call.grad.flip(call.args[1])}


@vjp(aten.roll.default)
def roll(call: Call) -> Cotangents:
    """Elements shifted along axes, those that fall out at the end put in at the start."""
    return {0: call.grad.roll([-s for s in _ints(call.args[1])], _ints(call.arg(2, "dims", ())))}


def _ints(given: int | Sequence[int]) -> list[int]:
    return [given] if isinstance(given, int) else list(given)


@vjp(aten.rot90.default)
def rot90(call: Call) -> Cotangents:
    """A plane turned by ``k`` quarters."""
    return {0: call.grad.rot90(-call.arg(1, "k", 1), call.arg(2, "dims", (0, 1)))}


@vjp(aten.pixel_shuffle.default)
def pixel_shuffle(call: Call) -> Cotangents:
    """Channels spread over the pixels of a larger image."""
    return {0: aten.pixel_unshuffle(call.grad, call.args[1])}


@vjp(aten.pixel_unshuffle.default)
def pixel_unshuffle(call: Call) -> Cotangents:
    """Pixels gathered into channels of a smaller image."""
    return {0: aten.pixel_shuffle(call.grad, call.args[1])}


@vjp(aten.channel_shuffle.default)
def channel_shuffle(call: Call) -> Cotangents:
    """Channels of groups interleaved."""
    return {0: aten.channel_shuffle(call.grad, call.grad.shape[1] // call.args[1])}


# -- triangles and diagonals ------------------------------------------------------------------------------------------


@vjp(aten.tril.default)
def tril(call: Call) -> Cotangents:
    """Zeros above a diagonal."""
    return {0: call.grad.tril(call.arg(1, "diagonal", 0))}


@vjp(aten.triu.default)
def triu(call: Call) -> Cotangents:
    """Zeros below a diagonal."""
    return {0: call.grad.triu(call.arg(1, "diagonal", 0))}


@vjp(aten.trace.default)
def trace(call: Call) -> Cotangents:
    """The sum of a matrix's diagonal."""
    grad = call.grad.new_zeros(call.args[0].shape)
    grad.diagonal().copy_(call.grad)
    return {0: grad}


@vjp(aten.diag_embed.default)
def diag_embed(call: Call) -> Cotangents:
    """Matrices with a given diagonal."""
    return {0: call.grad.diagonal(*_diagonal_arguments(call, 1, (0, -2, -1)))}


# -- patches and borders ----------------------------------------------------------------------------------------------


@vjp(aten.im2col.default)
def im2col(call: Call) -> Cotangents:
    """The patches that a convolution sees, as columns."""
    return {0: aten.col2im(call.grad, call.args[0].shape[-2:], *call.args[1:5])}


@vjp(aten.col2im.default)
def col2im(call: Call) -> Cotangents:
    """Patches added up to an image."""
    return {0: aten.im2col(call.grad, *call.args[2:6])}


@vjp(aten.constant_pad_nd.default, lean=True)
def constant_pad_nd(call: Call) -> Cotangents:
    """A border of one number, or a border cut off."""
    return {0: aten.constant_pad_nd(call.grad, [-p for p in call.args[1]], 0)}


@vjp(aten.reflection_pad1d.default)
def reflection_pad1d(call: Call) -> Cotangents:
    """A border that mirrors the inside."""
    return {0: aten.reflection_pad1d_backward(call.grad, *call.args)}


@vjp(aten.reflection_pad2d.default)
def reflection_pad2d(call: Call) -> Cotangents:
    """A border that mirrors the inside."""
    return {0: aten.reflection_pad2d_backward(call.grad, *call.args)}


@vjp(aten.reflection_pad3d.default)
def reflection_pad3d(call: Call) -> Cotangents:
    """A border that mirrors the inside."""
    return {0: aten.reflection_pad3d_backward(call.grad, *call.args)}


@vjp(aten.replication_pad1d.default)
def replication_pad1d(call: Call) -> Cotangents:
    """A border that repeats the outermost elements."""
    return {0: aten.replication_pad1d_backward(call.grad, *call.args)}


@vjp(aten.replication_pad2d.default)
def replication_pad2d(call: Call) -> Cotangents:
    """A border that repeats the outermost elements."""
    return {0: aten.replication_pad2d_backward(call.grad, *call.args)}


@vjp(aten.replication_pad3d.default)
def replication_pad3d(call: Call) -> Cotangents:
    """A border that repeats the outermost elements."""
    return {0: aten.replication_pad3d_backward(call.grad, *call.args)}


_PADDINGS: dict[Any, Any] = {
    aten.reflection_pad1d_backward.default: aten.reflection_pad1d,
    aten.reflection_pad2d_backward.default: aten.reflection_pad2d,
    aten.reflection_pad3d_backward.default: aten.reflection_pad3d,
    aten.replication_pad1d_backward.default: aten.replication_pad1d,
    aten.replication_pad2d_backward.default: aten.replication_pad2d,
    aten.replication_pad3d_backward.default: aten.replication_pad3d,
}


@vjp(*_PADDINGS)
def pad_backward(call: Call) -> Cotangents:
    """A border folded back onto the inside."""
    return {0: _PADDINGS[call.op.target](call.grad, call.args[2])}

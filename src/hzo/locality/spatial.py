"""Windows over space: convolutions, pooling, resizing. The batch stands first, channels second, space behind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from hzo.finite_differences import Link, Links, Matrix, identity, matrix_of, without_full
from hzo.locality.common import LinkRule, argument, is_first_operand, sizes
from hzo.locality.pointwise import blocks
from hzo.tracing import Graph, GraphOperation

aten = torch.ops.aten
_LARGEST_CANVAS = 2**24  # elements of the impulses that show how one axis is resized


def _over_space(graph: Graph, read: int, write: int, channels: Link, space: Sequence[Matrix]) -> Links | None:
    before, after = sizes(graph, read), sizes(graph, write)
    if graph.values[read].batch_dim != 0 or graph.values[write].batch_dim != 0 or before[0] != after[0]:
        return None
    links: list[Link] = [{0: identity(before[0])}, channels, *({2 + k: matrix} for k, matrix in enumerate(space))]
    return tuple(without_full(link, size) for link, size in zip(links, before, strict=True))


def _shapes(graph: Graph, op: GraphOperation, read: int, write: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Space before and after; None where the operand is not (batch, channels, space...)."""
    before, after = sizes(graph, read), sizes(graph, write)
    fits = is_first_operand(op, read) and len(before) == len(after) >= 3
    return (before[2:], after[2:]) if fits else None


def window(before: int, after: int, taps: Sequence[int], stride: int, offset: int) -> Matrix:
    """An output ``o`` sees the places ``o · stride + tap − offset``."""
    pairs = ((o, o * stride + tap - offset) for o, tap in product(range(after), taps))
    return matrix_of(after, ((o, place) for o, place in pairs if 0 <= place < before))


def _spread(before: int, after: int, taps: Sequence[int], stride: int, offset: int) -> Matrix:
    """A place ``i`` reaches the outputs ``i · stride + tap − offset``: a transposed convolution."""
    pairs = ((i * stride + tap - offset, i) for i, tap in product(range(before), taps))
    return matrix_of(after, ((o, i) for o, i in pairs if 0 <= o < after))


def _convolution(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    space = _shapes(graph, op, read, write)
    kernel = graph.values[op.args[1].value].shape
    axes = len(kernel) - 2
    if space is None or len(space[0]) != axes:
        return None
    strides, paddings, dilations = (_each(argument(op, n), axes) for n in ("stride", "padding", "dilation"))
    groups, transposed = int(argument(op, "groups")), bool(argument(op, "transposed"))
    matrices = []
    for axis, (before, after) in enumerate(zip(*space, strict=True)):
        taps = [dilations[axis] * tap for tap in range(kernel[2 + axis])]
        spread = _spread if transposed else window
        matrices.append(spread(before, after, taps, strides[axis], paddings[axis]))
    channels_in, channels_out = sizes(graph, read)[1], sizes(graph, write)[1]
    grouped: Link = {1: blocks(channels_out, channels_in, groups)} if groups > 1 else {}
    return _over_space(graph, read, write, grouped, matrices)


def _each(option: Any, axes: int) -> tuple[int, ...]:
    values = (option,) if isinstance(option, int) else tuple(option)
    return values * axes if len(values) == 1 else values


def _pooling(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    space = _shapes(graph, op, read, write)
    if space is None:
        return None
    axes = len(space[0])
    kernel = _each(argument(op, "kernel_size"), axes)
    stride = _each(argument(op, "stride") or kernel, axes)
    padding = _each(argument(op, "padding") or 0, axes)
    dilation = _each(argument(op, "dilation") or 1, axes)
    matrices = [
        window(before, after, [dilation[k] * tap for tap in range(kernel[k])], stride[k], padding[k])
        for k, (before, after) in enumerate(zip(*space, strict=True))
    ]
    return _over_space(graph, read, write, {1: identity(sizes(graph, read)[1])}, matrices)


def _adaptive(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    space = _shapes(graph, op, read, write)
    if space is None:
        return None
    matrices = [
        matrix_of(m, ((o, i) for o in range(m) for i in range(o * n // m, -(-(o + 1) * n // m))))
        for n, m in zip(*space, strict=True)
    ]
    return _over_space(graph, read, write, {1: identity(sizes(graph, read)[1])}, matrices)


def _resized(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """Interpolation: what each place reaches shows when the operation runs on impulses along one axis at a time.

    Both precisions are asked, since they may round a coordinate to different places.
    """
    space = _shapes(graph, op, read, write)
    if space is None:
        return None
    before, after = space
    if max(before) * max(prod(before), prod(after)) > _LARGEST_CANVAS:
        return None
    matrices = []
    for axis, (n, m) in enumerate(zip(before, after, strict=True)):
        reached = torch.zeros(m, n, dtype=torch.bool, device="cpu")
        for dtype in (torch.float32, torch.float64):
            shape = [n, 1, *(n if k == axis else 1 for k in range(len(before)))]
            impulses = torch.eye(n, dtype=dtype, device="cpu").view(shape).expand(n, 1, *before).contiguous()
            response = _call_on(op, impulses)
            others = [d for d in range(response.dim()) if d not in (0, 2 + axis)]
            reached |= (response != 0).sum(others).T > 0
        matrices.append(matrix_of(m, ((int(o), int(i)) for o, i in reached.nonzero().tolist())))
    return _over_space(graph, read, write, {1: identity(sizes(graph, read)[1])}, matrices)


@torch.no_grad()
def _call_on(op: GraphOperation, operand: Tensor) -> Tensor:
    result: Tensor = op.target(operand, *op.args[1:], **op.kwargs)
    return result


_POOLS = (
    aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default, aten.avg_pool2d.default,
    aten.avg_pool3d.default,
)  # fmt: skip
_ADAPTIVE = (
    aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default, aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
)  # fmt: skip
_RESIZES = (
    aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest3d.default,
    aten._upsample_nearest_exact2d.default, aten.upsample_linear1d.default, aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.default, aten.upsample_trilinear3d.default, aten._upsample_bilinear2d_aa.default,
)  # fmt: skip
RULES: dict[Any, LinkRule] = {
    aten.convolution.default: _convolution,
    **dict.fromkeys(_POOLS, _pooling),
    **dict.fromkeys(_ADAPTIVE, _adaptive),
    **dict.fromkeys(_RESIZES, _resized),
}

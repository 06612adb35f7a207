"""Windows over space: convolutions, pooling, resizing. The batch stands first, channels second, space behind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.adjoints.common import argument, is_first_operand
from hzo.adjoints.convolution import geometry
from hzo.finite_differences import Link, Links, Matrix, identity, matrix_of, without_full
from hzo.locality.common import Rule, functions, sizes
from hzo.locality.pointwise import blocks
from hzo.tracing import Extent, Graph, Operation, Ref, leaves, map_arguments

_LARGEST_CANVAS = 2**24  # elements of the impulses that show how one axis is resized


def _over_space(graph: Graph, read: int, write: int, channels: Link, space: Sequence[Matrix]) -> Links | None:
    before, after = sizes(graph, read), sizes(graph, write)
    if graph.values[read].batch_dim != 0 or graph.values[write].batch_dim != 0 or before[0] != after[0]:
        return None
    links: list[Link] = [{0: identity(before[0])}, channels, *({2 + k: matrix} for k, matrix in enumerate(space))]
    return tuple(without_full(link, size) for link, size in zip(links, before, strict=True))


def _shapes(graph: Graph, op: Operation, read: int, write: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Space before and after; None where the operand is not (batch, channels, space...)."""
    before, after = sizes(graph, read), sizes(graph, write)
    fits = is_first_operand(graph, op, read) and len(before) == len(after) >= 3
    return (before[2:], after[2:]) if fits else None


def _source(place: int, size: int, mode: str) -> int | None:
    """Where a padded map takes a place from, counted from the first place that is no padding."""
    if 0 <= place < size:
        return place
    if mode == "circular":
        return place % size
    if mode == "reflect":
        return -place if place < 0 else 2 * (size - 1) - place
    if mode == "replicate":
        return 0 if place < 0 else size - 1
    return None


def window(before: int, after: int, taps: Sequence[int], stride: int, offset: int, mode: str = "zeros") -> Matrix:
    """An output ``o`` sees the places ``o · stride + tap − offset``."""
    pairs = []
    for o, tap in product(range(after), taps):
        place = _source(o * stride + tap - offset, before, mode)
        if place is not None:
            pairs.append((o, place))
    return matrix_of(after, pairs)


def _spread(before: int, after: int, taps: Sequence[int], stride: int, offset: int) -> Matrix:
    """A place ``i`` reaches the outputs ``i · stride + tap − offset``: a transposed convolution."""
    pairs = ((i * stride + tap - offset, i) for i, tap in product(range(before), taps))
    return matrix_of(after, ((o, i) for o, i in pairs if 0 <= o < after))


def _convolution(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    shape, space = geometry(op), _shapes(graph, op, read, write)
    if shape is None or space is None or len(space[0]) != len(shape.kernel):
        return None
    matrices = []
    for axis, (before, after) in enumerate(zip(*space, strict=True)):
        taps = [shape.dilation[axis] * tap for tap in range(shape.kernel[axis])]
        stride, offset = shape.stride[axis], shape.padding[axis][0]
        if shape.transposed:
            matrices.append(_spread(before, after, taps, stride, offset))
        else:
            matrices.append(window(before, after, taps, stride, offset, shape.mode))
    grouped: Link = {1: blocks(shape.channels_out, shape.channels_in, shape.groups)} if shape.groups > 1 else {}
    return _over_space(graph, read, write, grouped, matrices)


def _each(option: Any, axes: int) -> tuple[int, ...]:
    values = (option,) if isinstance(option, int) else tuple(option)
    return values * axes if len(values) == 1 else values


def _options(op: Operation, names: Sequence[str]) -> dict[str, Any]:
    module: Any = op.module
    if module is not None:
        return {name: getattr(module, name, None) for name in names}
    return {name: argument(op, 1 + k, name) for k, name in enumerate(names)}


def _pooling(graph: Graph, op: Operation, read: int, write: int, names: Sequence[str]) -> Links | None:
    space = _shapes(graph, op, read, write)
    options = _options(op, names)
    if space is None or options["kernel_size"] is None:
        return None
    axes = len(space[0])
    kernel = _each(options["kernel_size"], axes)
    stride = _each(options["stride"], axes) if options["stride"] not in (None, (), []) else kernel
    padding = _each(options.get("padding") or 0, axes)
    dilation = _each(options.get("dilation") or 1, axes)
    matrices = [
        window(before, after, [dilation[k] * tap for tap in range(kernel[k])], stride[k], padding[k])
        for k, (before, after) in enumerate(zip(*space, strict=True))
    ]
    return _over_space(graph, read, write, {1: identity(sizes(graph, read)[1])}, matrices)


def _maximum(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    return _pooling(graph, op, read, write, ("kernel_size", "stride", "padding", "dilation"))


def _average(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    return _pooling(graph, op, read, write, ("kernel_size", "stride", "padding"))


def _power_average(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    return _pooling(graph, op, read, write, ("kernel_size", "stride")) if op.module is not None else None


def _adaptive(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    space = _shapes(graph, op, read, write)
    if space is None:
        return None
    matrices = [
        matrix_of(m, ((o, i) for o in range(m) for i in range(o * n // m, -(-(o + 1) * n // m))))
        for n, m in zip(*space, strict=True)
    ]
    return _over_space(graph, read, write, {1: identity(sizes(graph, read)[1])}, matrices)


def _resized(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """Interpolation: what each place reaches shows when the operation runs on impulses along one axis at a time.

    Both precisions are asked, since they may round a coordinate to different places.
    """
    space = _shapes(graph, op, read, write)
    if space is None or any(isinstance(leaf, Extent) for leaf in leaves((op.args, op.kwargs))):
        return None
    before, after = space
    if any(isinstance(leaf, Ref) and leaf.value != read for leaf in leaves((op.args, op.kwargs))):
        return None
    if max(before) * max(prod(before), prod(after)) > _LARGEST_CANVAS:
        return None
    matrices = []
    for axis, (n, m) in enumerate(zip(before, after, strict=True)):
        reached = torch.zeros(m, n, dtype=torch.bool, device="cpu")
        for dtype in (torch.float32, torch.float64):
            shape = [n, 1, *(n if k == axis else 1 for k in range(len(before)))]
            impulses = torch.eye(n, dtype=dtype, device="cpu").view(shape).expand(n, 1, *before).contiguous()
            response = _call_on(op, read, impulses)
            others = [d for d in range(response.dim()) if d not in (0, 2 + axis)]
            reached |= (response != 0).sum(others).T > 0
        matrices.append(matrix_of(m, ((int(o), int(i)) for o, i in reached.nonzero().tolist())))
    return _over_space(graph, read, write, {1: identity(sizes(graph, read)[1])}, matrices)


@torch.no_grad()
def _call_on(op: Operation, read: int, operand: Tensor) -> Tensor:
    args, kwargs = map_arguments(lambda leaf: operand if leaf == Ref(read) else leaf, (op.args, op.kwargs))
    result: Tensor = op.target(*args, **kwargs)
    return result


_POOLS: dict[str, Rule] = {"max_pool": _maximum, "avg_pool": _average, "adaptive_avg_pool": _adaptive}

MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _convolution
    ),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _maximum),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _average),
    **dict.fromkeys((nn.LPPool1d, nn.LPPool2d), _power_average),
    **dict.fromkeys(
        (
            nn.AdaptiveAvgPool1d,
            nn.AdaptiveAvgPool2d,
            nn.AdaptiveAvgPool3d,
            nn.AdaptiveMaxPool1d,
            nn.AdaptiveMaxPool2d,
            nn.AdaptiveMaxPool3d,
        ),
        _adaptive,
    ),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _resized),
}
FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(
        functions("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        _convolution,
    ),
    **{f: rule for name, rule in _POOLS.items() for k in (1, 2, 3) for f in functions(f"{name}{k}d")},
    **dict.fromkeys(functions("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"), _adaptive),
    **dict.fromkeys((F.interpolate, F.upsample), _resized),
}

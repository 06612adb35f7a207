"""Convolutions: stationary, so that impulses on a small canvas show the whole kernel.

An impulse in one channel of every group, at each phase of the stride, meets every tap of the kernel once. The adjoint
is PyTorch's own kernel with the measured weight. Padding other than zeros is a step of its own: the convolution is
then measured where it does not touch the padding, and the cotangent of the padded map is folded back by a map of
places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.adjoints.affine import impulse_size
from hzo.adjoints.common import Adjoint, Call, Shape, argument, is_first_operand
from hzo.tracing import Attribute, Graph, Operation


@dataclass(frozen=True)
class Geometry:
    """Everything of a convolution but its weights; one entry an axis, padding as (before, behind)."""

    channels_in: int
    channels_out: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str
    transposed: bool
    output_padding: tuple[int, ...]

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance between the first and the last tap."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def impulse(self) -> tuple[int, ...]:
        """Where the impulse of phase 0 stands on the canvas."""
        if self.transposed:
            return tuple(-(-before // s) for (before, _), s in zip(self.padding, self.stride, strict=True))
        outside = 0 if self.mode == "zeros" else 1
        return tuple(
            reach + before if outside else max(0, reach - before)
            for reach, (before, _) in zip(self.reach, self.padding, strict=True)
        )

    @property
    def canvas(self) -> tuple[int, ...]:
        """The smallest canvas on which every tap answers, and padding (if not zeros) does not."""
        axes = zip(self.impulse, self.reach, self.stride, self.padding, strict=True)
        if self.transposed:
            return tuple(p + 1 + -(-before // s) for p, _, s, (before, _) in axes)
        if self.mode == "zeros":
            return tuple(max(p + s, p + s - behind + reach) for p, reach, s, (_, behind) in axes)
        return tuple(p + s + behind + reach + 1 for p, reach, s, (_, behind) in axes)

    @property
    def phases(self) -> list[tuple[int, ...]]:
        """Shifts of the impulse; a transposed convolution shows all taps at once."""
        return [tuple(0 for _ in self.stride)] if self.transposed else list(product(*(range(s) for s in self.stride)))

    @property
    def probe(self) -> Shape:
        """Impulses for each channel of a group and phase, and one empty canvas for the bias."""
        count = self.channels_in // self.groups * len(self.phases) + 1
        return (count, self.channels_in, *self.canvas)


def geometry(op: Operation) -> Geometry | None:
    """The geometry of a call; shapes and options only."""
    found = _of_module(op.target) if isinstance(op.target, nn.Module) else _of_function(op)
    return found if found and all(k > 0 for k in found.kernel) else None


def _of_module(module: Any) -> Geometry:
    return Geometry(
        module.in_channels,
        module.out_channels,
        module.groups,
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple(module.dilation),
        _both_sides(module.padding, module.kernel_size, module.dilation),
        module.padding_mode,
        module.transposed,
        tuple(module.output_padding),
    )


def _of_function(op: Operation) -> Geometry | None:
    weight = argument(op, 1, "weight")
    if not isinstance(weight, Attribute):
        return None
    shape = weight.get().shape
    axes = len(shape) - 2
    transposed = "transpose" in op.name
    names = (
        ("stride", "padding", "output_padding", "groups", "dilation")
        if transposed
        else ("stride", "padding", "dilation", "groups")
    )
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    options = {name: argument(op, 3 + k, name, defaults[name]) for k, name in enumerate(names)}
    stride, dilation, extra = (_each(options.get(n, 0), axes) for n in ("stride", "dilation", "output_padding"))
    groups = int(options["groups"])
    channels = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    padding = _both_sides(options["padding"], shape[2:], dilation)
    return Geometry(*channels, groups, tuple(shape[2:]), stride, dilation, padding, "zeros", transposed, extra)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _both_sides(padding: Any, kernel: Any, dilation: Any) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _each(padding, len(kernel)))


def measured_weight(call: Call, value: int, shape: Geometry) -> Tensor:
    """The kernel that the layer's responses to impulses show, in the layout of ``torch`` for such a layer."""
    per_group = shape.channels_in // shape.groups
    operand = call.activity(value)
    h = impulse_size(operand.dtype)
    response = call.measure(value, impulses(shape, h, operand)).to(call.dtype)
    response = (response[:-1] - response[-1:]) / h
    size = (
        (shape.channels_in, shape.channels_out // shape.groups) if shape.transposed else (shape.channels_out, per_group)
    )
    weight = response.new_zeros(*size, *shape.kernel)
    for k, phase in enumerate(shape.phases):
        places, taps = where_taps_answer(shape, phase, tuple(response.shape[2:]))
        seen = response[k * per_group : (k + 1) * per_group][places]  # (per_group, channels_out, taps seen ...)
        if shape.transposed:  # input channel c of group q answers in the outputs of group q
            by_group = seen.view(per_group, shape.groups, -1, *seen.shape[2:])
            weight[taps] = by_group.transpose(0, 1).flatten(0, 1)
        else:
            weight[taps] = seen.transpose(0, 1)
    return weight


def impulses(shape: Geometry, height: float, like: Tensor) -> Tensor:
    """A canvas for each channel of a group and phase, with an impulse in that channel of every group; an empty one."""
    per_group = shape.channels_in // shape.groups
    probe = torch.zeros(shape.probe, dtype=like.dtype, device=like.device)
    channels = torch.arange(shape.channels_in, device=like.device)
    for k, phase in enumerate(shape.phases):
        place = tuple(p + shift for p, shift in zip(shape.impulse, phase, strict=True))
        index: Any = (k * per_group + channels % per_group, channels, *place)
        probe[index] = height
    return probe


@lru_cache(maxsize=1024)
def where_taps_answer(shape: Geometry, phase: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[Any, Any]:
    """Indices of the output places that answer to an impulse, and of the taps of the kernel that they show."""
    places, taps = [], []
    for axis, size in enumerate(outputs):
        stride, dilation = shape.stride[axis], shape.dilation[axis]
        at, before = shape.impulse[axis] + phase[axis], shape.padding[axis][0]
        found = []
        for tap in range(shape.kernel[axis]):
            if shape.transposed:
                found.append((stride * at + dilation * tap - before, tap))
            elif (at + before - dilation * tap) % stride == 0:
                found.append(((at + before - dilation * tap) // stride, tap))
        found = [(place, tap) for place, tap in found if 0 <= place < size]
        places.append(torch.tensor([place for place, _ in found], dtype=torch.long))
        taps.append(torch.tensor([tap for _, tap in found], dtype=torch.long))
    every = (slice(None), slice(None))
    return (*every, *torch.meshgrid(*places, indexing="ij")), (*every, *torch.meshgrid(*taps, indexing="ij"))


def _backward(call: Call, value: int, shape: Geometry, parameters: bool) -> tuple[Tensor, dict[str, Tensor]]:
    weight = measured_weight(call, value, shape)
    operand = call.activity(value)
    axes = len(shape.kernel)
    by_hand = pads_by_hand(shape)
    size = tuple(n + (b + a if by_hand else 0) for n, (b, a) in zip(operand.shape[2:], shape.padding, strict=True))
    if parameters:
        given = operand.to(call.dtype)
    else:  # the kernel needs the shape of the input, not its values: an expanded scalar takes no memory
        given = torch.empty((), dtype=call.dtype, device=operand.device).expand(*operand.shape[:2], *size)
    of_input, of_weight, of_bias = torch.ops.aten.convolution_backward(
        call.cotangent.contiguous(),
        given,
        weight,
        [shape.channels_out] if parameters else None,
        list(shape.stride),
        [0] * axes if by_hand else [before for before, _ in shape.padding],
        list(shape.dilation),
        shape.transposed,
        list(shape.output_padding),
        shape.groups,
        [True, parameters, parameters],
    )
    return of_input, {"weight": of_weight, "bias": of_bias}


def pads_by_hand(shape: Geometry) -> bool:
    """Whether padding is a step of its own: not zeros, or not alike on both sides."""
    return shape.mode != "zeros" or any(before != behind for before, behind in shape.padding)


def carry_back(call: Call, value: int, shape: Geometry) -> Tensor:
    """The cotangent of what went into a convolution of this geometry."""
    found, _ = _backward(call, value, shape, parameters=False)
    return _fold_padding(found, call.activity(value).shape, shape) if pads_by_hand(shape) else found


def _apply(call: Call, value: int) -> Tensor:
    shape = geometry(call.op)
    assert shape is not None
    return carry_back(call, value, shape)


def _with_parameters(call: Call, value: int) -> tuple[Tensor, dict[str, Tensor]]:
    shape = geometry(call.op)
    assert shape is not None
    return (_apply(call, value), {}) if pads_by_hand(shape) else _backward(call, value, shape, parameters=True)


def _fold_padding(cotangent: Tensor, shape: torch.Size, of: Geometry) -> Tensor:
    """The adjoint of padding: what lies on a padded place returns to the place it was copied from."""
    pads = [side for both in reversed(of.padding) for side in both]
    numbers = torch.arange(prod(shape[2:]), dtype=torch.float64, device=cotangent.device).view(1, 1, *shape[2:]) + 1
    origin = F.pad(numbers, pads, mode="constant" if of.mode == "zeros" else of.mode).long().flatten()
    folded = cotangent.new_zeros(*shape[:2], numbers.numel() + 1)
    folded.index_add_(2, origin, cotangent.flatten(2))
    return folded[..., 1:].reshape(shape)


def _accepts(graph: Graph, op: Operation, value: int) -> bool:
    shape = geometry(op)
    operand = graph.values[value]
    batched = operand.batch_dim == 0 and shape is not None and len(operand.shape) == len(shape.kernel) + 2
    # A transposed convolution may be asked for an output size, which no canvas has.
    plain = op.module is None or len(op.args) + len(op.kwargs) == 1
    return batched and plain and is_first_operand(graph, op, value)


def _probes(graph: Graph, op: Operation, value: int) -> list[Shape]:
    shape = geometry(op)
    assert shape is not None
    return [shape.probe]


_CONVOLUTION = Adjoint("stationary", _apply, _accepts, _probes, _with_parameters, reads="shapes")

MODULES: dict[type[nn.Module], Adjoint] = dict.fromkeys(
    (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _CONVOLUTION
)
FUNCTIONS: dict[Any, Adjoint] = dict.fromkeys(
    (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _CONVOLUTION
)

"""Convolutions: the kernel is measured with impulses of one pixel, and goes into PyTorch's own adjoint.

With full padding and a stride of one, a pixel in one channel of every group answers with every tap that this channel
has, once. So a kernel costs as many impulses as a group has channels, and one of zeros; a few stand in a row on one
canvas, so far apart that no answer meets another. The bias is left out, and what the operator adds for zeros is the
hardware's offset and is taken off. Where the image is a learned one and the
kernel an activation, a kernel of one pixel that hands the channels on shows the image.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, vjp
from hzo.rules.divided import in_shares
from hzo.rules.measured import ROWS, Draw, Trial, measured_once
from hzo.rules.probes import less_offset, made_once
from hzo.rules.products import may_read
from hzo.rules.schema import arguments, has, key_of, named

aten = torch.ops.aten

_PLAIN = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


def _plainly(call: Call, axes: int, replaced: dict[str, Any]) -> dict[Key, Any]:
    """Replacements for a probe: options of the plainest convolution, no bias, and what the probe replaces."""
    found = dict(_plain(call.op.target, len(call.args), axes))
    found.update((key_of(call, name), value) for name, value in replaced.items() if has(call, name))
    return found


@lru_cache(maxsize=256)
def _plain(target: Any, given: int, axes: int) -> dict[Key, Any]:
    """The options of ``_plainly`` by their places in a call with so many positional arguments."""
    options = {name: (value,) * axes for name, value in _PLAIN.items()} | {"bias": None}
    places = arguments(target)
    return {
        places[name][0] if places[name][0] < given else name: value for name, value in options.items() if name in places
    }


def _input(call: Call) -> str:
    return "input" if has(call, "input") else "self"


def _is_transposed(call: Call) -> bool:
    return bool(named(call, "transposed")) if has(call, "transposed") else "transpose" in call.op.name


def _groups(call: Call) -> int:
    if has(call, "groups"):
        return int(named(call, "groups"))
    x, kernel = named(call, _input(call)), named(call, "weight")
    return 1 if _is_transposed(call) else x.shape[1] // kernel.shape[1]


def impulses(channels: int, groups: int, axes: int, like: Tensor, device: torch.device) -> Tensor:
    """A pixel of one in each channel of a group, in all groups at once, and pixels of zero. Nobody writes to it."""
    return made_once(_impulses, channels, groups, axes, like.dtype, device)


def _impulses(channels: int, groups: int, axes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    each = channels // groups
    probe = torch.zeros(each + 1, groups, each, dtype=dtype, device=device)
    probe[:each].diagonal(dim1=0, dim2=2).fill_(1)
    return probe.view(each + 1, channels, *[1] * axes)


# Multiplications. Small probes are one image with one row of impulses, as all are that a kernel of one pixel answers;
# large ones have rows of a few, since kernels are slow on single pixels.
_SMALL, _LARGE = 1 << 22, 1 << 29
_WIDTH = 8  # pixels of such a row, about


def _rows_of_impulses(
    channels: int, groups: int, axes: int, first: int, stop: int, row: int, apart: int, dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Impulses ``first`` to ``stop`` of as many as a group has channels and one of zeros, ``row`` of them on a canvas.

    They stand along the last axis, ``apart`` pixels from one another.
    """
    each, count, length = channels // groups, stop - first, (row - 1) * apart + 1
    canvases = torch.zeros(-(-count // row), channels, length, dtype=dtype, device=device)
    whole, rest = divmod(min(stop, each) - first, row)
    of_canvas, of_channel = channels * length, length
    steps = each * of_channel, of_canvas + row * of_channel, of_channel + apart
    for full, canvas, n in ((whole, 0, row), (1, whole, rest)):
        if full * n:
            start = canvas * of_canvas + (first + canvas * row) * of_channel
            canvases.as_strided((groups, full, n), steps, start).fill_(1)
    return canvases.view(*canvases.shape[:2], *[1] * (axes - 1), length)


def _answers_to_impulses(call: Call, x: Tensor, groups: int, taps: tuple[int, ...]) -> Tensor:
    """What a convolution makes of impulses in all channels and of zeros: by output channel, impulse and place."""
    axes, channels, dtype = len(taps), x.shape[1], x.dtype
    each, out, last = channels // groups, call.grad.shape[1], taps[-1]
    padding = tuple(k - 1 for k in taps)
    products = (each + 1) * out * each * prod(taps) ** 2

    def ask(first: int, stop: int) -> Tensor:
        count = stop - first
        row = 1 if products < _LARGE else min(-(-_WIDTH // last), count)
        if products <= _SMALL or prod(taps) == 1:
            row = count
        device = call.grad.device
        canvases = made_once(_rows_of_impulses, channels, groups, axes, first, stop, row, last, dtype, device)
        replaced = _plainly(call, axes, {_input(call): canvases, "padding": padding})
        seen: Tensor = call.measure(replaced, (count, channels, *[1] * axes))
        sample, channel, *between, step = seen.stride()
        by_place = (channel, sample, last * step, *between, step)
        answers = seen.as_strided((out, len(canvases), row, *taps), by_place).flatten(1, 2)
        return answers if row in (1, count) else answers[:, :count]

    return in_shares(call, each + 1, products, ask, of_result=1)


def _measured_kernel(call: Call, kernel: Tensor) -> Tensor:
    x: Tensor = named(call, _input(call))
    axes, transposed, groups = kernel.dim() - 2, _is_transposed(call), _groups(call)
    taps = tuple(kernel.shape[2:])

    def measure() -> Tensor:
        if not transposed:
            seen = _answers_to_impulses(call, x, groups, taps)
            if prod(taps) == 1:
                return seen[:, :-1] - seen[:, -1:]
            made = torch.empty(kernel.shape, dtype=seen.dtype, device=seen.device)
            torch.sub(seen[:, :-1], seen[:, -1:], out=made)
            return made.flip(tuple(range(2, kernel.dim())))
        probe = impulses(x.shape[1], groups, axes, x, call.grad.device)

        def ask(first: int, stop: int) -> Tensor:
            rows = probe[first:stop]
            seen: Tensor = call.measure(_plainly(call, axes, {_input(call): rows}), rows)
            return seen

        seen = in_shares(call, len(probe), len(probe) * kernel.numel(), ask)
        seen = seen[:-1] - seen[-1:]
        by_group = seen.view(seen.shape[0], groups, kernel.shape[1], *seen.shape[2:])
        return by_group.transpose(0, 1).reshape(kernel.shape)

    padding = (0,) * axes if transposed else tuple(k - 1 for k in taps)

    def expect(kept: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Images of one pixel, which all taps meet, and by output channel and place the norm of what they meet."""
        pixels = draw(ROWS, x.shape[1], *[1] * axes, like=kept)
        ones, zeros = (1,) * axes, (0,) * axes
        expected = aten.convolution(pixels, kept, None, ones, padding, ones, transposed, zeros, groups)
        if transposed:
            norms = kept.view(groups, -1, *kept.shape[1:]).norm(dim=1).reshape(1, -1, *taps)
        else:
            norms = kept.norm(dim=1)[None].flip(tuple(range(2, kept.dim())))
        of_groups = pixels.view(ROWS, groups, -1).norm(dim=2).repeat_interleave(norms.shape[1] // groups, 1)
        return torch.cat([pixels, torch.zeros_like(pixels[:1])]), expected, norms * of_groups.view(ROWS, -1, *ones)

    def ask(probe: Tensor) -> Tensor:
        replaced = {_input(call): probe} if transposed else {_input(call): probe, "padding": padding}
        return less_offset(call.measure(_plainly(call, axes, replaced), probe), 0)

    # Who can skips the padding, and is so slow on single pixels that it counts all the same.
    trial = Trial(x.shape[1] // groups * kernel.numel() * prod(taps), expect, ask)
    return measured_once(call, key_of(call, "weight"), kernel, (transposed, groups), measure, trial)


def _measured_image(call: Call, x: Tensor, kernel: Tensor) -> Tensor:
    """A learned input: what a kernel that hands on the channels of every group makes of it."""
    axes, groups = kernel.dim() - 2, _groups(call)
    each = x.shape[1] // groups
    probe = torch.zeros(each + 1, each, dtype=kernel.dtype, device=call.grad.device).fill_diagonal_(1)
    probe = probe.t().repeat(groups, 1) if _is_transposed(call) else probe.repeat(groups, 1)
    probe = probe.view(*probe.shape, *[1] * axes)
    replaced: dict[str, Any] = {"weight": probe}
    if has(call, "kernel_size"):
        replaced["kernel_size"] = (1,) * axes
    seen: Tensor = call.measure(_plainly(call, axes, replaced), probe)
    seen = seen.view(x.shape[0], groups, each + 1, *x.shape[2:])
    return (seen[:, :, :-1] - seen[:, :, -1:]).reshape(x.shape)


@vjp(aten.convolution.default, measures=True, lean=True)
@vjp(
    aten._convolution.default,
    aten.convolution_overrideable.default,
    aten.mkldnn_convolution.default,
    aten.cudnn_convolution.default,
    aten.cudnn_convolution_transpose.default,
    aten.miopen_convolution.default,
    aten.miopen_convolution_transpose.default,
    aten.miopen_depthwise_convolution.default,
    aten.slow_conv_transpose2d.default,
    aten.slow_conv_transpose3d.default,
    aten._slow_conv2d_forward.default,
    aten.slow_conv3d_forward.default,
    aten.slow_conv_dilated2d.default,
    aten.slow_conv_dilated3d.default,
    aten._conv_depthwise2d.default,
    aten.conv_depthwise3d.default,
    measures=True,
)
def convolution(call: Call) -> Cotangents:
    """A convolution or a transposed one, of any number of dimensions, with any options."""
    names = (_input(call), "weight", "bias")
    keys = [key_of(call, name) if has(call, name) else None for name in names]
    mask = [key is not None and call.needs(key) for key in keys]
    x, kernel = named(call, names[0]), named(call, "weight")
    axes = kernel.dim() - 2
    found = convolution_backward(call, x, kernel, (keys[0], keys[1]), mask, axes)
    return {key: g for key, g, asked in zip(keys, found, mask, strict=True) if asked and key is not None}


def convolution_backward(
    call: Call, x: Tensor, kernel: Tensor, keys: tuple[Any, Any], mask: list[bool], axes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The three cotangents by one call of PyTorch's adjoint."""
    if mask[0] and not may_read(call, keys[1], keys[0]):
        kernel = _measured_kernel(call, kernel)
    if mask[1] and not may_read(call, keys[0], keys[1]):
        x = _measured_image(call, x, kernel)
    options = {name: tuple(named(call, name)) if has(call, name) else (value,) * axes for name, value in _PLAIN.items()}
    transposed = _is_transposed(call)
    found: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
        call.grad,
        x,
        kernel,
        [call.grad.shape[1]] if mask[2] else None,
        options["stride"],
        options["padding"],
        options["dilation"],
        transposed,
        options["output_padding"],
        _groups(call),
        mask,
    )
    return found


def _kernel_of_adjoint(call: Call, kernel: Tensor) -> Tensor:
    """The kernel that the adjoint of a convolution has: what it makes of cotangents of one pixel."""
    axes, transposed, groups = kernel.dim() - 2, bool(call.args[7]), int(call.args[9])
    g, x = call.args[:2]
    size = tuple(kernel.shape[2:])
    probe = impulses(g.shape[1], groups, axes, g, kernel.device)
    canvas = torch.zeros((), dtype=x.dtype, device=kernel.device).expand(probe.shape[0], x.shape[1], *size)
    ones, zeros = (1,) * axes, (0,) * axes
    padding = tuple(k - 1 for k in size) if transposed else zeros
    replaced: dict[Key, Any] = {
        0: probe,
        1: canvas,
        3: None,
        4: ones,
        5: padding,
        6: ones,
        8: zeros,
        10: (True, False, False),
    }
    seen: Tensor = call.measure(replaced, probe)[0]
    seen = (seen[:-1] - seen[-1:]).view(-1, groups, x.shape[1] // groups, *size)
    if not transposed:
        return seen.transpose(0, 1).reshape(kernel.shape)
    return seen.flip(tuple(range(3, seen.dim()))).movedim(0, 2).reshape(kernel.shape)


@vjp(aten.convolution_backward.default, measures=True)
def adjoint_of_convolution(call: Call) -> Cotangents:
    """A derivative that was taken inside the model; the kernel is measured on cotangents of one pixel."""
    g, x, kernel = call.args[:3]
    options = call.args[4:10]
    mask = [call.needs(key) for key in (0, 1, 2)]
    if mask[0] and call.grads[0] is not None and not may_read(call, 2, 0):
        kernel = _kernel_of_adjoint(call, kernel)
    found = aten._convolution_double_backward(*call.grads, g, kernel, x, *options, mask)
    return {key: found[key] for key in (0, 1, 2) if mask[key]}


@vjp(aten.conv_tbc.default, measures=True)
def conv_tbc(call: Call) -> Cotangents:
    """A convolution over time of tensors laid out as (time, batch, channel)."""
    x, kernel, bias = call.args[:3]
    pad = call.arg(3, "pad", 0)
    if call.needs(0) and not may_read(call, 1, 0):
        n = x.shape[2]
        probe = torch.zeros(1, n + 1, n, dtype=x.dtype, device=call.grad.device)
        probe[0].fill_diagonal_(1)
        none = torch.zeros(bias.shape, dtype=bias.dtype, device=call.grad.device)
        seen = call.measure({0: probe, 2: none, 3: kernel.shape[0] - 1}, probe[0])
        kernel = (seen[:, :-1] - seen[:, -1:]).flip(0)
    if call.needs(1) and not may_read(call, 0, 1):
        n = x.shape[2]
        probe = torch.zeros(1, n, n + 1, dtype=kernel.dtype, device=call.grad.device)
        probe[0].fill_diagonal_(1)
        none = torch.zeros(n + 1, dtype=bias.dtype, device=call.grad.device)
        seen = call.measure({1: probe, 2: none, 3: 0}, probe[0])
        x = seen[..., :-1] - seen[..., -1:]
    found = aten.conv_tbc_backward(call.grad, x, kernel, torch.zeros_like(kernel[0, 0]), pad)
    return {k: found[k] for k in (0, 1, 2) if call.needs(k)}

"""Pooling and resampling: PyTorch's own adjoints, with the places of maxima that the calls returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, Key, vjp
from hzo.rules.products import may_read
from hzo.rules.schema import has, named

aten = torch.ops.aten


def _options(call: Call, *names: str) -> list[Any]:
    return [named(call, name) for name in names]


# ---- maxima ---------------------------------------------------------------------------------------------------------


@vjp(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default, lean=True)
def max_pool(call: Call) -> Cotangents:
    """The maximum of every window, and where it was."""
    two = call.op.target is aten.max_pool2d_with_indices.default
    backward = aten.max_pool2d_with_indices_backward if two else aten.max_pool3d_with_indices_backward
    options = _options(call, "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return {0: backward(call.grad, call.args[0], *options, call.out[1])}


@vjp(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(call: Call) -> Cotangents:
    """The maxima of windows that divide the input into so many of them."""
    two = call.op.target is aten.adaptive_max_pool2d.default
    backward = aten.adaptive_max_pool2d_backward if two else aten.adaptive_max_pool3d_backward
    return {0: backward(call.grad, call.args[0], call.out[1])}


@vjp(aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default)
def fractional_max_pool(call: Call) -> Cotangents:
    """The maxima of windows whose edges were drawn at random."""
    two = call.op.target is aten.fractional_max_pool2d.default
    backward = aten.fractional_max_pool2d_backward if two else aten.fractional_max_pool3d_backward
    return {0: backward(call.grad, call.args[0], *_options(call, "kernel_size", "output_size"), call.out[1])}


@vjp(aten.max_unpool2d.default, aten.max_unpool3d.default)
def max_unpool(call: Call) -> Cotangents:
    """Values put where maxima were."""
    x, places = call.args[:2]
    dims = 2 if call.op.target is aten.max_unpool2d.default else 3
    return {0: call.grad.flatten(-dims).gather(-1, places.flatten(-dims)).view(x.shape)}


# ---- means ----------------------------------------------------------------------------------------------------------


@vjp(aten.avg_pool2d.default, aten.avg_pool3d.default, lean=True)
def avg_pool(call: Call) -> Cotangents:
    """The mean of every window."""
    backward = aten.avg_pool2d_backward if call.op.target is aten.avg_pool2d.default else aten.avg_pool3d_backward
    options = _options(call, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    return {0: backward(call.grad, call.args[0], *options)}


@vjp(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default, lean=True)
def adaptive_avg_pool(call: Call) -> Cotangents:
    """The means of windows that divide the input into so many of them."""
    two = call.op.target is aten._adaptive_avg_pool2d.default
    backward = aten._adaptive_avg_pool2d_backward if two else aten._adaptive_avg_pool3d_backward
    return {0: backward(call.grad, call.args[0])}


# ---- resampling -----------------------------------------------------------------------------------------------------

_UPSAMPLING = {
    getattr(aten, name).default: getattr(aten, f"{name}_backward").default
    for name in (
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d",
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_trilinear3d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "_upsample_lanczos2d_aa",
    )
    if hasattr(aten, name)
}


@vjp(*_UPSAMPLING)
def upsample(call: Call) -> Cotangents:
    """Interpolation on a regular grid."""
    names = ("align_corners", "scales", "scales_d", "scales_h", "scales_w")
    options = [named(call, name) for name in names if has(call, name)]
    return {0: _UPSAMPLING[call.op.target](call.grad, call.args[1], call.args[0].shape, *options)}


@vjp(
    aten.grid_sampler_2d.default,
    aten.grid_sampler_3d.default,
    aten._grid_sampler_2d_cpu_fallback.default,
    measures=True,
)
def grid_sampler(call: Call) -> Cotangents:
    """Interpolation at given places. A learned image is measured at the places of its own pixels."""
    x, grid, *options = call.args
    mask = [call.needs(0), call.needs(1)]
    if mask[1] and not may_read(call, 0, 1):
        x = _measured_image(call, x, grid)
    two = call.op.target is not aten.grid_sampler_3d.default
    backward = aten.grid_sampler_2d_backward if two else aten.grid_sampler_3d_backward
    found = backward(call.grad, x, grid, *options, mask)
    return {k: found[k] for k in (0, 1) if mask[k]}


def _measured_image(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    """What the operator returns at every pixel, less what it returns far outside (an offset of the hardware)."""
    lines = [torch.linspace(-1, 1, n, dtype=grid.dtype, device=grid.device) for n in x.shape[2:]]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], -1).expand(x.shape[0], *x.shape[2:], -1)
    nearest, zeros_outside = 1, 0
    replaced: dict[Key, Any] = {2: nearest, 3: zeros_outside, 4: True}
    seen: Tensor = call.measure({1: places, **replaced}, places)
    outside: Tensor = call.measure({1: torch.full_like(places, 3), **replaced}, places)
    return seen - outside


@vjp(aten.cudnn_grid_sampler.default)
def cudnn_grid_sampler(call: Call) -> Cotangents:
    """The same by cuDNN."""
    found = aten.cudnn_grid_sampler_backward(*call.args[:2], call.grad)
    return {k: found[k] for k in (0, 1) if call.needs(k)}


@vjp(aten.affine_grid_generator.default)
def affine_grid(call: Call) -> Cotangents:
    """Places under an affine map."""
    return {0: aten.affine_grid_generator_backward(call.grad, *call.args[1:3])}


@vjp(aten.cudnn_affine_grid_generator.default)
def cudnn_affine_grid(call: Call) -> Cotangents:
    """The same by cuDNN."""
    return {0: aten.cudnn_affine_grid_generator_backward(call.grad, *call.args[1:5])}


# ---- derivatives taken inside the model: linear in the cotangent that these were given ------------------------------


@vjp(
    aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices_backward.default,
    aten.adaptive_max_pool2d_backward.default,
    aten.adaptive_max_pool3d_backward.default,
    aten.fractional_max_pool2d_backward.default,
    aten.fractional_max_pool3d_backward.default,
)
def max_pool_backward(call: Call) -> Cotangents:
    """Cotangents put where the maxima were."""
    g, places = call.args[0], named(call, "indices")
    dims = 2 if "pool2d" in call.op.name else 3
    return {0: call.grad.flatten(-dims).gather(-1, places.flatten(-dims)).view(g.shape)}


@vjp(aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default)
def avg_pool_backward(call: Call) -> Cotangents:
    """Cotangents spread over the windows."""
    forward = aten.avg_pool2d if call.op.target is aten.avg_pool2d_backward.default else aten.avg_pool3d
    return {0: forward(call.grad, *call.args[2:])}


@vjp(aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default)
def adaptive_avg_pool_backward(call: Call) -> Cotangents:
    """Cotangents spread over the windows that divide the input."""
    two = call.op.target is aten._adaptive_avg_pool2d_backward.default
    forward = aten._adaptive_avg_pool2d if two else aten._adaptive_avg_pool3d
    return {0: forward(call.grad, call.args[0].shape[-2 if two else -3 :])}


_UPSAMPLING_BACKWARD = {backward: forward for forward, backward in _UPSAMPLING.items()}


@vjp(*_UPSAMPLING_BACKWARD)
def upsample_backward(call: Call) -> Cotangents:
    """The adjoint of an interpolation; its own adjoint is the interpolation."""
    size, _, *options = call.args[1:]
    return {0: _UPSAMPLING_BACKWARD[call.op.target](call.grad, size, *options)}

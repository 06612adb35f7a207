"""Pooling, resizing and rectifiers: selection of observed elements, or a map over space that all channels share."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.adjoints.affine import impulse_size
from hzo.adjoints.common import Adjoint, Call, Shape, argument, is_first_operand
from hzo.tracing import Graph, Operation

_LARGEST_MAP = 4096  # places of a map over space that is measured one by one


def _spatial(graph: Graph, op: Operation, value: int) -> bool:
    operand = graph.values[value]
    batched = operand.batch_dim == 0 and len(operand.shape) >= 3
    return batched and is_first_operand(graph, op, value) and prod(operand.shape[2:]) <= _LARGEST_MAP


def _map_probes(graph: Graph, op: Operation, value: int) -> list[Shape]:
    space = graph.values[value].shape[2:]
    return [(prod(space), 1, *space)]


def _shared_map(call: Call, value: int) -> Tensor:
    """A linear map over space, the same for all samples and channels: measured on one channel of one sample."""
    operand = call.activity(value)
    space = operand.shape[2:]
    places, h = space.numel(), impulse_size(operand.dtype)
    probe = torch.zeros(places, places, dtype=operand.dtype, device=operand.device)
    probe.fill_diagonal_(h)
    response = call.measure(value, probe.view(places, 1, *space)).to(call.dtype) / h
    g = call.cotangent.flatten(2)
    # Most entries are zero: pooling windows and interpolation weights are local.
    jacobian = response.reshape(places, -1).to_sparse()
    found = torch.sparse.mm(jacobian, g.reshape(-1, g.shape[-1]).T)
    carried: Tensor = found.T.reshape(operand.shape)
    return carried


def _maximum(call: Call, value: int) -> Tensor:
    """The places that the windows chose, found by choosing once more."""
    module: Any = call.op.module
    operand = call.activity(value)
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if module is not None:
        options = {name: getattr(module, name) for name in names}
    else:
        options = {name: argument(call.op, k + 1, name) for k, name in enumerate(names)}
        options = {name: option for name, option in options.items() if option is not None}
    axes = operand.dim() - 2
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[axes]
    _, places = pool(operand, return_indices=True, **options)
    found = torch.zeros(*operand.shape[:2], operand.shape[2:].numel(), dtype=call.dtype, device=operand.device)
    found.scatter_add_(2, places.flatten(2), call.cotangent.flatten(2))
    return found.view(operand.shape)


def _one_output(graph: Graph, op: Operation, value: int) -> bool:
    module: Any = op.module
    indices = module.return_indices if module is not None else argument(op, 6, "return_indices", False)
    return not indices and is_first_operand(graph, op, value) and graph.values[value].batch_dim == 0


def _rectified(call: Call, value: int) -> Tensor:
    """Where the output is positive the slope is one, elsewhere zero."""
    found: Tensor = torch.ops.aten.threshold_backward(call.cotangent, call.outputs[0].to(call.dtype), 0)
    return found


_MAP = Adjoint("affine", _shared_map, _spatial, _map_probes, reads="shapes")
_MAXIMUM = Adjoint("selection", _maximum, _one_output, reads="inputs")
_RELU = Adjoint("selection", _rectified, is_first_operand, reads="output")

MODULES: dict[type[nn.Module], Adjoint] = {
    **dict.fromkeys(
        (
            nn.AvgPool1d,
            nn.AvgPool2d,
            nn.AvgPool3d,
            nn.AdaptiveAvgPool1d,
            nn.AdaptiveAvgPool2d,
            nn.AdaptiveAvgPool3d,
            nn.Upsample,
        ),
        _MAP,
    ),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _MAXIMUM),
    nn.ReLU: _RELU,
}
FUNCTIONS: dict[Any, Adjoint] = {
    **dict.fromkeys(
        (
            F.avg_pool1d,
            F.avg_pool2d,
            F.avg_pool3d,
            F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d,
            F.adaptive_avg_pool3d,
            F.interpolate,
        ),
        _MAP,
    ),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), _MAXIMUM),
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _RELU),
}

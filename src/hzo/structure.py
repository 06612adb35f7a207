"""What is promised of an operation's Jacobian, by exact type and only where nothing is in the way.

Here: what a plan may assume, when a layer is what its type says, and the simplest promise, *elementwise* (an output
element depends on the input element of the same place alone). Locality by axis is in ``locality/``, promises that carry
a cotangent through one operation are in ``adjoints/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.errors import PlanError
from hzo.tracing import Graph, Operation, declared, untouched

Assume = Literal["nothing", "locality", "structure"]
ASSUMPTIONS = get_args(Assume)

_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
    nn.Tanhshrink, nn.Threshold, nn.Identity, nn.Dropout, nn.AlphaDropout,
)  # fmt: skip

# Unary and binary functions; a binary one is elementwise in an operand that is not broadcast.
_FUNCTIONS: frozenset[Any] = frozenset(
    function
    for name in (
        "relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "sin",
        "cos", "abs", "square", "neg", "reciprocal", "erf", "clamp", "clip", "pow", "clone", "contiguous", "float",
        "double", "half", "bfloat16", "to", "type_as", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_",
        "true_divide", "maximum", "minimum", "where", "masked_fill", "masked_fill_", "lerp", "addcmul", "dropout",
        "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "logsigmoid", "softplus", "softsign",
        "softshrink", "hardshrink", "hardtanh", "hardsigmoid", "hardswish", "tanhshrink", "threshold",
        "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__",
        "__truediv__", "__rtruediv__", "__itruediv__", "__neg__", "__abs__", "__pow__", "__rpow__",
    )
    for namespace in (torch, Tensor, F)
    if (function := getattr(namespace, name, None)) is not None
)  # fmt: skip


def check_assume(assume: str) -> Assume:
    """What a plan assumes, or an error that lists what it may."""
    if assume not in ASSUMPTIONS:
        raise PlanError(f"expected assume to be one of {ASSUMPTIONS}, got {assume!r}")
    return assume  # type: ignore[return-value]


def is_elementwise(op: Operation) -> bool:
    """Whether an operation's type promises it; shapes are for ``elementwise_slice`` to see."""
    if op.module is not None:
        return "elementwise" in (declared(op.module) or ()) or (type(op.module) in _MODULES and untouched(op.module))
    try:
        return op.target in _FUNCTIONS
    except TypeError:  # a callable without a hash
        return False


def elementwise_slice(graph: Graph, value: int, operations: Sequence[int], outputs: Sequence[int]) -> bool:
    """Whether every output depends, place by place, on ``value`` alone: elementwise operations, no shape changed."""
    shape, dim = graph.values[value].shape, graph.values[value].batch_dim
    written = [v for k in operations for v in graph.operations[k].writes]
    same = all(graph.values[v].shape == shape and graph.values[v].batch_dim == dim for v in (*written, *outputs))
    return same and all(is_elementwise(graph.operations[k]) for k in operations)

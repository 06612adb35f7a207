"""Affine layers over the last dimension: one sample tells the Jacobian of all, by an impulse for each feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.adjoints.common import Adjoint, Call, Shape, argument, is_first_operand
from hzo.tracing import Attribute, Graph, Operation, Ref, leaves


def _features(graph: Graph, op: Operation, value: int) -> int:
    return graph.values[value].shape[-1]


def _probes(graph: Graph, op: Operation, value: int) -> list[Shape]:
    n = _features(graph, op, value)
    return [(n + 1, n)]


def impulse_size(dtype: torch.dtype) -> float:
    """An affine map takes any step: a large one keeps what an offset rounds away small beside the response."""
    return 1.0 if dtype.itemsize >= 4 else 16.0


def _measure(call: Call, value: int) -> Tensor:
    """The matrix (n, m) whose rows are the responses to the unit vectors, the offset taken off."""
    operand = call.activity(value)
    n, h = operand.shape[-1], impulse_size(operand.dtype)
    probe = torch.zeros(n + 1, n, dtype=operand.dtype, device=operand.device)
    probe[:n].fill_diagonal_(h)
    response = call.measure(value, probe).to(call.dtype)
    return (response[:n] - response[n:]) / h


def _apply(call: Call, value: int) -> Tensor:
    return call.cotangent @ _measure(call, value).T


def _batched(graph: Graph, op: Operation, value: int) -> bool:
    """The last dimension must be the features, of the output too, and nothing else may belong to samples."""
    found, written = graph.values[value], graph.values[op.writes[0]]
    others = (leaf.value for leaf in leaves((op.args, op.kwargs)) if isinstance(leaf, Ref) and leaf.value != value)
    features = len(found.shape) == len(written.shape) >= 2 and found.batch_dim != len(found.shape) - 1
    return features and is_first_operand(graph, op, value) and not any(graph.values[v].batched for v in others)


def _by_matrix(graph: Graph, op: Operation, value: int) -> bool:
    """A product with a matrix that all samples share."""
    other = argument(op, 1, "other")
    dims = other.get().dim() if isinstance(other, Attribute) else 0
    dims = len(graph.values[other.value].shape) if isinstance(other, Ref) else dims
    return dims == 2 and _batched(graph, op, value)


_LINEAR = Adjoint("affine", _apply, _batched, _probes, reads="shapes")
_MATRIX = Adjoint("affine", _apply, _by_matrix, _probes, reads="shapes")

MODULES: dict[type[nn.Module], Adjoint] = {nn.Linear: _LINEAR}
FUNCTIONS = {F.linear: _LINEAR}
BY_WEIGHT = dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _MATRIX)

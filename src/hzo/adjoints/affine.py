"""Affine layers over the last dimension: one sample tells the Jacobian of all, by an impulse for each feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.adjoints.common import Adjoint, Call, Shape, argument, is_first_operand
from hzo.chain import Attribute, Graph, Operation


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
    """The last dimension must be the features, and the first the batch."""
    found = graph.values[value]
    return is_first_operand(graph, op, value) and len(found.shape) >= 2 and found.batch_dim != len(found.shape) - 1


def _by_matrix(graph: Graph, op: Operation, value: int) -> bool:
    other = argument(op, 1, "other")
    matrix = isinstance(other, Attribute) and other.get().dim() == 2
    return matrix and _batched(graph, op, value)


_LINEAR = Adjoint("affine", _apply, _batched, _probes)
_MATRIX = Adjoint("affine", _apply, _by_matrix, _probes)

MODULES: dict[type[nn.Module], Adjoint] = {nn.Linear: _LINEAR}
FUNCTIONS = {F.linear: _LINEAR}
BY_WEIGHT = {torch.matmul: _MATRIX, Tensor.matmul: _MATRIX, Tensor.__matmul__: _MATRIX}

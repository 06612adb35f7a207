"""What a plan may assume of a Jacobian, and the simplest such thing: *elementwise*, an output element depends on the
input element of the same place alone, as PyTorch's tag ``pointwise`` says of an operator, or a user of a module.

Locality by axis is in ``locality/``, how an operation carries a cotangent back in ``rules/`` and ``declared/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from hzo._options import one_of
from hzo.errors import PlanError
from hzo.tracing import Graph, GraphOperation, declared

Assume = Literal["nothing", "locality", "structure"]
ASSUMPTIONS: tuple[Assume, ...] = get_args(Assume)

aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.alias.default, aten.lift_fresh.default)


def check_assume(assume: str) -> Assume:
    """What a plan assumes, or an error that lists what it may."""
    return one_of("assume", assume, ASSUMPTIONS, PlanError)


def is_elementwise(op: GraphOperation) -> bool:
    """Whether an operation's kind promises it; shapes are for ``elementwise_slice`` to see."""
    if op.module is not None:
        return "elementwise" in (declared(op.module) or ())
    return op.pointwise or op.target in _COPIES


def elementwise_slice(graph: Graph, value: int, operations: Sequence[int], outputs: Sequence[int]) -> bool:
    """Whether every output depends, place by place, on ``value`` alone: elementwise operations, no shape changed."""
    shape, dim = graph.values[value].shape, graph.values[value].batch_dim
    written = [v for k in operations for v in graph.operations[k].writes]
    same = all(graph.values[v].shape == shape and graph.values[v].batch_dim == dim for v in (*written, *outputs))
    return same and all(is_elementwise(graph.operations[k]) for k in operations)

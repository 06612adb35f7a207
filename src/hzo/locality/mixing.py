"""Matrix products: the summed dimension is mixed, all others keep their places (tokens, heads, rows)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.adjoints.common import argument, is_first_operand, slots_of
from hzo.finite_differences import Links, either
from hzo.locality.common import Rule, along, functions, sizes
from hzo.tracing import Attribute, Graph, Operation, Ref


def _linear(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """The last dimension is mixed; every token by itself."""
    count = len(sizes(graph, read))
    if not is_first_operand(graph, op, read) or len(sizes(graph, write)) != count:
        return None
    return along(graph, read, write, [*range(count - 1), None])


def _dims(graph: Graph, leaf: Any) -> int:
    if isinstance(leaf, Ref):
        return len(graph.values[leaf.value].shape)
    return leaf.get().dim() if isinstance(leaf, Attribute) else 0


def _matmul(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """Of two operands with at least two dimensions each: rows of the left one and columns of the right one stay."""
    operands = [argument(op, 0, "input"), argument(op, 1, "mat2" if "bmm" in op.name else "other")]
    slots = slots_of(op, read)
    if not slots or len(op.args) + len(op.kwargs) != 2 or min(_dims(graph, leaf) for leaf in operands) < 2:
        return None
    reverse = op.target is Tensor.__rmatmul__
    before, after = len(sizes(graph, read)), len(sizes(graph, write))
    leading: list[int | None] = [d + after - before for d in range(before - 2)]
    found: Links | None = None
    for slot, leaf in enumerate(operands):
        if leaf != Ref(read):
            continue
        left = (slot == 0) != reverse
        links = along(graph, read, write, [*leading, *((after - 2, None) if left else (None, after - 1))])
        if links is None:
            return None
        found = links if found is None else either(found, links, sizes(graph, read))
    return found


def _einsum(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """Letters that reach the output keep their places, others are summed."""
    equation = op.args[0]
    operands = op.args[1] if len(op.args) == 2 and isinstance(op.args[1], (tuple, list)) else op.args[1:]
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    found: Links | None = None
    for letters, leaf in zip(inputs.split(","), operands, strict=True):
        if leaf != Ref(read):
            continue
        if len(set(letters)) != len(letters):
            return None
        links = along(graph, read, write, [output.index(x) if x in output else None for x in letters])
        if links is None:
            return None
        found = links if found is None else either(found, links, sizes(graph, read))
    return found


def _attention(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """Scaled dot products: a query stays at its place, keys and values are mixed; heads stay apart."""
    names = {0: "query", 1: "key", 2: "value", "query": "query", "key": "key", "value": "value"}
    roles = [names.get(slot) for slot in slots_of(op, read)]
    count = len(sizes(graph, write))
    if not roles or None in roles or len(sizes(graph, read)) != count or argument(op, 7, "enable_gqa", False):
        return None
    across = {"query": (count - 1,), "key": (count - 2, count - 1), "value": (count - 2,)}
    gone = {d for role in roles for d in across[str(role)]}
    return along(graph, read, write, [None if d in gone else d for d in range(count)])


MODULES: dict[type[nn.Module], Rule] = {nn.Linear: _linear}
FUNCTIONS: dict[Any, Rule] = {
    F.linear: _linear,
    **dict.fromkeys(functions("matmul", "bmm", "__matmul__", "__rmatmul__"), _matmul),
    torch.einsum: _einsum,
    F.scaled_dot_product_attention: _attention,
}

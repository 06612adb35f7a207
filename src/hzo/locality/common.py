"""What a locality rule is, and the few shapes that most of them have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from hzo.finite_differences import Link, Links, identity
from hzo.tape import Ref
from hzo.tape.operations import refs_in
from hzo.tracing import Graph, GraphOperation

LinkRule = Callable[[Graph, GraphOperation, int, int], "Links | None"]
"""(graph, operation, operand, result) -> a link for each dimension of the operand; None where it does not hold."""


def sizes(graph: Graph, value: int) -> tuple[int, ...]:
    """The shape of one sample, what is left of the batch dimension included."""
    return graph.values[value].sample_shape


def free(graph: Graph, value: int) -> Links:
    """Everything may depend on everything."""
    return tuple({} for _ in graph.values[value].shape)


def is_first_operand(op: GraphOperation, value: int) -> bool:
    """Whether the value is the call's first argument, and nothing else."""
    return places_of(op, value) == [0]


def places_of(op: GraphOperation, value: int) -> list[int | str]:
    """Top-level positions and keywords of the call that hold the value; −1 for one nested deeper."""
    slots: list[tuple[int | str, Any]] = [*enumerate(op.args), *op.kwargs.items()]
    found: list[int | str] = []
    for slot, given in slots:
        if type(given) is Ref and given.value == value:
            found.append(slot)
        elif type(given) is tuple and value in refs_in(given):
            found.append(-1)
    return found


def argument(op: GraphOperation, name: str) -> Any:
    """An argument by the name in the operator's schema; its default where the call left it out."""
    target = getattr(op.target, "func", op.target)
    assert isinstance(target, torch._ops.OpOverload)
    for k, about in enumerate(target._schema.arguments):
        if about.name == name:
            return op.args[k] if k < len(op.args) else op.kwargs.get(name, about.default_value)
    return None


def along(graph: Graph, read: int, write: int, targets: Sequence[int | None]) -> Links | None:
    """Dimensions that keep their indices and move to others: for each the one of the result, None for a mixed one.

    A dimension of size 1 may meet any size, as in broadcasting; None where sizes do not fit.
    """
    before, after = sizes(graph, read), sizes(graph, write)
    links: list[Link] = []
    for size, target in zip(before, targets, strict=True):
        if target is None or size == 1:
            links.append({})
        elif not 0 <= target < len(after) or after[target] != size:
            return None
        else:
            links.append({target: identity(size)})
    return tuple(links)


def mixed(graph: Graph, read: int, write: int, dims: Collection[int]) -> Links | None:
    """A result of the operand's shape that keeps places apart along all dimensions but these."""
    count = len(sizes(graph, read))
    if len(sizes(graph, write)) != count:
        return None
    across = {d % count for d in dims}
    return along(graph, read, write, [None if d in across else d for d in range(count)])


def dims_of(option: Any) -> tuple[int, ...] | None:
    """Dimensions given as a number or several; None for anything else."""
    items = option if isinstance(option, (tuple, list)) else (option,)
    if not items or not all(type(item) is int for item in items):
        return None
    return tuple(items)

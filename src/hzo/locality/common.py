"""What a locality rule is, and the few shapes that most of them have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hzo.finite_differences import Link, Links, identity
from hzo.tracing import Graph, Operation

Rule = Callable[[Graph, Operation, int, int], "Links | None"]
"""(graph, operation, operand, result) -> a link for each dimension of the operand; None where it does not hold."""


def functions(*names: str) -> list[Any]:
    """All functions of these names that torch offers."""
    spaces = (torch, Tensor, F)
    return [found for name in names for space in spaces if (found := getattr(space, name, None)) is not None]


def sizes(graph: Graph, value: int) -> tuple[int, ...]:
    """The shape of one sample, what is left of the batch dimension included."""
    return graph.values[value].sample_shape


def free(graph: Graph, value: int) -> Links:
    """Everything may depend on everything."""
    return tuple({} for _ in graph.values[value].shape)


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

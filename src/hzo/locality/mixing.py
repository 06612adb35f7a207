"""Matrix products: the summed dimension is mixed, all others keep their places (tokens, heads, rows)."""

from __future__ import annotations

from typing import Any

import torch

from hzo.finite_differences import Links, either
from hzo.locality.common import LinkRule, along, places_of, sizes
from hzo.tracing import Graph, GraphOperation

aten = torch.ops.aten


def _matrices(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """Rows of the left factor and columns of the right one stay; an addend is broadcast."""
    left = 1 if op.target in (aten.addmm.default, aten.baddbmm.default, aten.addbmm.default) else 0
    before, after = len(sizes(graph, read)), len(sizes(graph, write))
    found: Links | None = None
    for place in places_of(op, read):
        if place == left - 1:
            links = along(graph, read, write, [d + after - before for d in range(before)])
        elif place in (left, left + 1) and before == after:
            leading: list[int | None] = list(range(before - 2))
            kept = (after - 2, None) if place == left else (None, after - 1)
            links = along(graph, read, write, [*leading, *kept])
        else:
            return None
        if links is None:
            return None
        found = links if found is None else either(found, links, sizes(graph, read))
    return found


def _linear(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """The last dimension is mixed; every token by itself."""
    count = len(sizes(graph, read))
    if places_of(op, read) != [0] or len(sizes(graph, write)) != count:
        return None
    return along(graph, read, write, [*range(count - 1), None])


def _attention(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """Scaled dot products: a query stays at its place, keys and values are mixed; heads stay apart."""
    places = places_of(op, read)
    count = len(sizes(graph, write))
    if write != op.writes[0] or not places or len(sizes(graph, read)) != count or not set(places) <= {0, 1, 2}:
        return None
    across: dict[int | str, tuple[int, ...]] = {0: (count - 1,), 1: (count - 2, count - 1), 2: (count - 2,)}
    gone = {d for place in places for d in across[place]}
    return along(graph, read, write, [None if d in gone else d for d in range(count)])


RULES: dict[Any, LinkRule] = {
    **dict.fromkeys((aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default), _matrices),
    aten.linear.default: _linear,
    **dict.fromkeys(
        (
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_attention_math.default,
        ),
        _attention,
    ),
}

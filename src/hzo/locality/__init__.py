"""Which elements an output may depend on: patterns of single operations, composed along a slice.

Every rule holds for one ATen operator, and is decided from shapes and options alone; what a user declared speaks for a
module of their own.
What no rule covers depends on everything, which is always safe. Source: receptive fields, paper; axis by axis through
reshapes, skips and concatenations: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hzo.finite_differences import Link, Links, Pattern, either, follow, identity, without_full
from hzo.locality import declared, mixing, pointwise, reindexing, spatial
from hzo.locality.common import LinkRule, free
from hzo.structure import is_elementwise
from hzo.tracing import Graph, GraphOperation

__all__ = ["Locality", "operation_links", "slice_locality"]

_FILES = (mixing, pointwise, reindexing, spatial)
RULES: dict[object, LinkRule] = {target: rule for file in _FILES for target, rule in file.RULES.items()}


@dataclass(frozen=True)
class Locality:
    """How a slice depends on one value.

    Attributes:
        patterns: of every output, over the rows of value and output.
        local: axes of the value along which some operation sees a window: several places, and not all.
    """

    patterns: tuple[Pattern, ...]
    local: tuple[int, ...]


def operation_links(graph: Graph, op: GraphOperation, read: int, write: int) -> Links:
    """From one operand to one result: which indices meet, for each dimension of the operand.

    Dimensions are those of a single sample (``GraphValue.sample_shape``). Where samples influence each other, and where
    no rule covers the call, every link is free.
    """
    if op.coupled or not op.deterministic:
        return free(graph, read)
    interleaved = graph.values[read].outer > 1 or graph.values[write].outer > 1
    rule: LinkRule | None = RULES.get(getattr(op.target, "func", op.target))
    if interleaved and rule is not reindexing.by_numbers and not is_elementwise(op):
        return free(graph, read)
    if op.module is not None:
        rule = declared.links
    elif rule is None and is_elementwise(op):
        rule = pointwise.broadcast
    found = rule(graph, op, read, write) if rule is not None else None
    return free(graph, read) if found is None else found


def slice_locality(graph: Graph, value: int, operations: Sequence[int], outputs: Sequence[int]) -> Locality:
    """Compose the operations of a slice: products along paths, unions where paths meet.

    Source: ours. Cost: no query; a boolean matrix product for each operation and axis.
    """
    sizes = graph.values[value].sample_shape
    found: dict[int, Links] = {value: tuple(without_full({d: identity(n)}, n) for d, n in enumerate(sizes))}
    local: set[int] = set()
    for k in operations:
        op = graph.operations[k]
        for write in op.writes:
            for read in op.reads:
                if read not in found or read == write:
                    continue
                links = follow(found[read], operation_links(graph, op, read, write), sizes)
                found[write] = either(found[write], links, sizes) if write in found else links
            local.update(d for d, link in enumerate(found.get(write, ())) if _is_window(link))
    order = graph.values[value].row_order
    patterns = tuple(
        _over_rows(graph, value, output, found.get(output, free(graph, value)), order) for output in outputs
    )
    return Locality(patterns, tuple(axis for axis, d in enumerate(order) if d in local))


def _is_window(link: Link) -> bool:
    """Whether some index of an output depends on several places; links never allow all of them everywhere."""
    return any(any(row & (row - 1) for row in matrix) for matrix in link.values() if matrix != identity(len(matrix)))


def _over_rows(graph: Graph, value: int, output: int, links: Links, order: tuple[int, ...]) -> Pattern:
    places = graph.values[output].row_order
    moved = {d: axis for axis, d in enumerate(places)}
    return Pattern(
        graph.values[value].row_shape,
        graph.values[output].row_shape,
        tuple({moved[b]: matrix for b, matrix in links[d].items()} for d in order),
    )

"""Dependence patterns: which elements of an output may depend on which elements of a value.

A pattern is a product over the axes of the value: for every axis it links indices along that axis with indices along
axes of the output. A superset of the true dependence is always safe. Source: receptive fields, paper; as boolean
matrices axis by axis, through reshapes and skips: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

Matrix = tuple[int, ...]
"""A boolean matrix: for every row the set of its columns, as the bits of a whole number."""

Link = Mapping[int, Matrix]
"""For one axis of the value: an output ``o`` may depend on index ``i`` only if bit ``i`` of ``link[b][o[b]]`` is set,
for every axis ``b`` in the link. An empty link allows everything."""

Links = tuple[Link, ...]


def bits(row: int) -> Iterator[int]:
    """The columns in a row, in order."""
    while row:
        low = row & -row
        yield low.bit_length() - 1
        row ^= low


def everything(size: int) -> int:
    """A row with all columns."""
    return (1 << size) - 1


@lru_cache(maxsize=512)
def identity(size: int) -> Matrix:
    """Every index depends on itself."""
    return tuple(1 << i for i in range(size))


def matrix_of(rows: int, pairs: Iterable[tuple[int, int]]) -> Matrix:
    """A matrix from its (row, column) pairs."""
    found = [0] * rows
    for row, column in pairs:
        found[row] |= 1 << column
    return tuple(found)


def compose(after: Matrix, before: Matrix) -> Matrix:
    """The boolean product ``after · before``."""
    if after == identity(len(before)):
        return before
    if before == identity(len(before)):
        return after
    known: dict[int, int] = {}
    for row in set(after):
        union = 0
        for column in bits(row):
            union |= before[column]
        known[row] = union
    return tuple(known[row] for row in after)


def follow(links: Links, step: Links, sizes: Sequence[int]) -> Links:
    """Links from a value to what an operation writes, from those to what it reads and those of the operation.

    Args:
        links: from the value to the operand, one for each axis of the value, whose sizes are ``sizes``.
        step: from the operand to the result, one for each axis of the operand.
    """
    result = []
    for link, size in zip(links, sizes, strict=True):
        found: dict[int, Matrix] = {}
        for axis, before in link.items():
            for target, after in step[axis].items():
                product = compose(after, before)
                if target in found:
                    product = tuple(a & b for a, b in zip(product, found[target], strict=True))
                found[target] = product
        result.append(without_full(found, size))
    return tuple(result)


def either(one: Links, other: Links, sizes: Sequence[int]) -> Links:
    """Links that cover both: two paths to one result. What only one of them restricts is free."""
    return tuple(
        without_full(
            {axis: tuple(p | q for p, q in zip(a[axis], b[axis], strict=True)) for axis in a.keys() & b.keys()}, size
        )
        for a, b, size in zip(one, other, sizes, strict=True)
    )


def without_full(link: Link, size: int) -> Link:
    """The link without axes that restrict nothing."""
    full = everything(size)
    return {axis: matrix for axis, matrix in sorted(link.items()) if any(row != full for row in matrix)}


def columns_of(matrix: Matrix, size: int) -> list[list[int]]:
    """The transpose: for every column its rows."""
    found: list[list[int]] = [[] for _ in range(size)]
    for row, columns in enumerate(matrix):
        for column in bits(columns):
            found[column].append(row)
    return found


def dense(matrix: Matrix, size: int) -> Tensor:
    """(rows, size): the matrix in zeros and ones."""
    found = torch.zeros(len(matrix), size, device="cpu")
    for row, columns in enumerate(matrix):
        found[row, list(bits(columns))] = 1
    return found


@dataclass(frozen=True)
class Pattern:
    """Which elements of an output may depend on which elements of a value, of one sample.

    ``value`` and ``output`` are shapes whose row-major order is that of the rows of the two; ``links`` has one entry
    for each axis of the value.
    """

    value: tuple[int, ...]
    output: tuple[int, ...]
    links: Links = field(hash=False, repr=False)

    @property
    def keyed(self) -> tuple[int, ...]:
        """Axes of the output that tell elements of the value apart."""
        return tuple(sorted({axis for link in self.links for axis in link}))

    def conflicts(self, axis: int) -> list[int] | None:
        """For every index along an axis those with which it may share an output; None where all may."""
        link, size = self.links[axis], self.value[axis]
        if not link:
            return None
        found = [everything(size)] * size
        for matrix in link.values():
            shared = [0] * size
            for row in set(matrix):
                for i in bits(row):
                    shared[i] |= row
            found = [a & b for a, b in zip(found, shared, strict=True)]
        return found


def windows(pattern: Pattern) -> list[tuple[int, Matrix] | None]:
    """For every axis of the value one axis of the output and its matrix, no output axis twice: a looser pattern whose
    sums factor. None where nothing is left."""
    taken: set[int] = set()
    found: list[tuple[int, Matrix] | None] = []
    for link in pattern.links:
        free = [(axis, matrix) for axis, matrix in link.items() if axis not in taken]
        best = min(free, key=lambda item: sum(row.bit_count() for row in item[1]) / len(item[1]), default=None)
        if best is not None:
            taken.add(best[0])
        found.append(best)
    return found

"""Colorings: elements that may be perturbed at once, because no output sees two of them.

A coloring gives every index along every axis a color such that two elements of one color (the same along all axes)
share no output; its colors are then the queries of a node. Source: Curtis, Powell and Reid, "On the estimation of
sparse Jacobian matrices" (1974); the paper calls it spatial parallel perturbation; products over axes are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from hzo.finite_differences.sparsity import Pattern, columns_of


@dataclass(frozen=True)
class Coloring:
    """Colors of a value's elements: the color of an element is the tuple of the colors of its indices.

    Attributes:
        patterns: of every output.
        colors: for each axis the color of every index.
        spacing: None for an exact coloring. A number k lets elements share an output that are k apart along an axis;
            they are then perturbed with random signs, which make the estimate unbiased and no longer exact.
    """

    patterns: tuple[Pattern, ...]
    colors: tuple[tuple[int, ...], ...] = field(repr=False)
    spacing: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.colors)

    @property
    def counts(self) -> tuple[int, ...]:
        """Colors along each axis."""
        return tuple(max(axis, default=-1) + 1 for axis in self.colors)

    @property
    def directions(self) -> int:
        return prod(self.counts)

    def __str__(self) -> str:
        """Colors along the axes over the sizes of these."""
        counts = [(c, n) for c, n in zip(self.counts, self.shape, strict=True) if n > 1] or [(1, 1)]
        of = f"{'×'.join(str(c) for c, _ in counts)} of {'×'.join(str(n) for _, n in counts)}"
        return of if self.spacing is None else f"{of}, spacing {self.spacing}"

    def for_outputs(self, kept: Sequence[int]) -> Coloring:
        """The same colors, with some of the outputs."""
        return (
            self if len(kept) == len(self.patterns) else replace(self, patterns=tuple(self.patterns[k] for k in kept))
        )

    @cached_property
    def directions_of_elements(self) -> Tensor:
        """For every element the direction that perturbs it."""
        found = torch.zeros(self.shape, dtype=torch.long, device="cpu")
        for axis, (colors, count) in enumerate(zip(self.colors, self.counts, strict=True)):
            found = found * count + _along(torch.tensor(colors, device="cpu"), axis, len(self.shape))
        return found.flatten()

    @cached_property
    def _owners(self) -> tuple[tuple[Tensor, ...], ...]:
        """For each pattern and axis: (colors, ...keyed axes) -> the index of that color on which an output depends."""
        return tuple(
            tuple(_owner_table(pattern, axis, self.colors[axis], self.counts[axis]) for axis in range(len(self.colors)))
            for pattern in self.patterns
        )

    def owners(self, output: int, start: int, stop: int) -> Tensor:
        """(directions, places): the element that owns each place of an output in each of the directions [start, stop).

        Places are the elements along the keyed axes. A place that nothing of that color reaches has the number of
        elements in place of an owner. Exact colorings only.
        """
        pattern, elements = self.patterns[output], prod(self.shape)
        rest = torch.arange(start, stop, device="cpu")
        colors = []
        for count in reversed(self.counts):
            colors.append(rest % count)
            rest = rest // count
        places = [pattern.output[axis] for axis in pattern.keyed]
        found = torch.zeros(stop - start, *(1 for _ in places), dtype=torch.long, device="cpu")
        nobody = torch.zeros_like(found, dtype=torch.bool)
        for table, color, size in zip(self._owners[output], reversed(colors), self.shape, strict=True):
            index = table[color]
            found, nobody = found * size + index, nobody | (index < 0)
        found = torch.where(nobody, elements, found)
        return found.expand(stop - start, *places).flatten(1)


def _along(vector: Tensor, axis: int, axes: int) -> Tensor:
    return vector.view(*(-1 if k == axis else 1 for k in range(axes)))


def _owner_table(pattern: Pattern, axis: int, colors: Sequence[int], count: int) -> Tensor:
    """An index owns a place if all axes of its link allow it, and no other of its color does."""
    link, keyed = pattern.links[axis], pattern.keyed
    shape = [pattern.output[b] if b in link else 1 for b in keyed]
    table = torch.full((count, *shape), -1, device="cpu")
    columns = {b: columns_of(matrix, len(colors)) for b, matrix in link.items()}
    for index, color in enumerate(colors):
        reached = (columns[b][index] if b in link else [0] for b in keyed)
        places = [torch.tensor(found, dtype=torch.long, device="cpu") for found in reached]
        table[(color, *torch.meshgrid(*places, indexing="ij")) if places else color] = index  # type: ignore[index]
    return table


def color(patterns: Sequence[Pattern]) -> Coloring:
    """Color greedily, along each axis in natural order, with the first color that fits.

    Where rows of the patterns are full intervals, an axis takes no more colors than its largest row has entries.
    Source: Curtis, Powell and Reid 1974; axis by axis: ours.
    """
    shape = patterns[0].value
    return Coloring(tuple(patterns), tuple(_color_axis(patterns, axis, size) for axis, size in enumerate(shape)))


def _color_axis(patterns: Sequence[Pattern], axis: int, size: int) -> tuple[int, ...]:
    conflicts = [0] * size
    for pattern in patterns:
        found = pattern.conflicts(axis)
        if found is None:
            return tuple(range(size))
        conflicts = [a | b for a, b in zip(conflicts, found, strict=True)]
    members: list[int] = []
    colors = []
    for index, conflict in enumerate(conflicts):
        fitting = next((c for c, taken in enumerate(members) if not taken & conflict), len(members))
        if fitting == len(members):
            members.append(0)
        members[fitting] |= 1 << index
        colors.append(fitting)
    return tuple(colors)


def thin(coloring: Coloring, spacing: int, axes: Iterable[int]) -> Coloring:
    """At most ``spacing`` colors along each of these axes: elements that far apart share a color.

    The result is marked as approximate; where exact colors are no more than that, the coloring itself. Source: ours.
    """
    chosen = {axis for axis in axes if coloring.counts[axis] > spacing}
    if not chosen:
        return coloring
    colors = tuple(
        tuple(i % spacing for i in range(len(exact))) if axis in chosen else exact
        for axis, exact in enumerate(coloring.colors)
    )
    return replace(coloring, colors=colors, spacing=spacing)

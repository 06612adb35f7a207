"""Probes: which elements a query perturbs, and which outputs then belong to which element.

A probe turns a node into directions. All samples of the batch are perturbed at once, a direction moves the same
elements in each of them. Coordinate and elementwise probes are the two ends of coloring (a color for every element,
one for all) and are decoded without tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hzo.finite_differences.coloring import Coloring
from hzo.finite_differences.sparsity import Pattern, dense, windows

Kind = Literal["coordinate", "elementwise", "colored"]


@dataclass(frozen=True)
class Probe:
    """How one tensor of a boundary is perturbed.

    ``coordinate``: one element of every sample at a time, everything that changes belongs to it (nothing is assumed).
    ``elementwise``: all elements at once, an output element belongs to the input element of the same place.
    ``colored``: all elements of a color at once, an output element belongs to the one of them on which it may depend.
    With a spacing several may claim an output: random signs, and the mean of ``draws`` of them.
    """

    kind: Kind
    elements: int  # of one sample
    coloring: Coloring | None = None
    draws: int = 1

    @property
    def directions(self) -> int:
        """Perturbations that the probe needs, each of all samples."""
        if self.coloring is not None:
            return self.coloring.directions * self.draws
        return 1 if self.kind == "elementwise" else self.elements


class States:
    """The perturbed states of a node's queries, in room that is used again from chunk to chunk.

    A coordinate probe moves one element of each copy of the batch: writing those, and putting them back for the next
    chunk, takes a tenth of the time of copying every state anew.
    """

    def __init__(self, probe: Probe, base: Tensor) -> None:
        """``base``: (B, n), the unperturbed rows."""
        self.probe = probe
        self.base = base
        self._copies = base.new_empty(0, *base.shape)
        self._moved = (0, 0)  # the directions that the copies are moved by

    def moved(self, start: int, stop: int, values: Tensor) -> Tensor:
        """The states for the directions [start, stop): (directions, B, n), not to be written to, and valid until the
        next call.

        Args:
            values: (B, n), the rows with every element moved.
        """
        if self.probe.kind == "elementwise":
            return values.unsqueeze(0)
        if self.probe.coloring is not None:
            directions = torch.arange(start, stop, device=values.device).view(-1, 1, 1)
            chosen = self.probe.coloring.directions_of_elements.to(values.device) == directions
            return torch.where(chosen, values, self.base)
        if stop - start > len(self._copies):
            self._copies = self.base.repeat(stop - start, 1, 1)
        else:
            self._write(*self._moved, self.base)
        self._write(start, stop, values)
        self._moved = (start, stop)
        return self._copies[: stop - start]

    def _write(self, start: int, stop: int, values: Tensor) -> None:
        """Element start + k of copy k."""
        self._copies[: stop - start].diagonal(start, 0, 2).copy_(values[:, start:stop])


def decode(probe: Probe, start: int, stop: int, products: Sequence[tuple[Tensor, Tensor]], into: Tensor) -> None:
    """Sum differences against cotangents, for each element over the outputs that belong to it.

    Args:
        products: pairs of differences (directions, B, m) and cotangents (B, m), one for every output tensor, for the
            directions [start, stop). Differences may be overwritten.
        into: (B, n), where the sums of the elements that these directions move are written.
    """
    if probe.coloring is not None:
        by_color = _to_owners if probe.coloring.spacing is None else _over_windows
        by_color(probe.coloring, start, stop, products, into)
    elif probe.kind == "elementwise":
        into.copy_(sum((difference[0] * g for difference, g in products), start=torch.zeros((), device=into.device)))
    else:
        found, *others = [difference.mul_(g).sum(-1) for difference, g in products]  # faster than many small products
        into[:, start:stop] = sum(others, start=found).T


def _to_owners(
    coloring: Coloring, start: int, stop: int, products: Sequence[tuple[Tensor, Tensor]], into: Tensor
) -> None:
    """Each place of an output gives its product to the one element of the color that it may depend on."""
    batch, elements = into.shape
    sums = torch.zeros(batch, elements + 1, dtype=into.dtype, device=into.device)  # the last: places of nobody
    for k, (difference, cotangent) in enumerate(products):
        pattern = coloring.patterns[k]
        places = _places(pattern, pattern.keyed, difference, cotangent).flatten(2)
        owners = coloring.owners(k, start, stop).to(into.device)
        sums.scatter_add_(1, owners.flatten().expand(batch, -1), places.transpose(0, 1).flatten(1))
    into += sums[:, :elements]


def _places(pattern: Pattern, kept: Sequence[int], difference: Tensor, cotangent: Tensor) -> Tensor:
    """(directions, B, kept axes...): the products, summed over the axes that tell no elements apart."""
    product = difference.mul_(cotangent).view(*difference.shape[:2], *pattern.output)
    summed = [2 + axis for axis in range(len(pattern.output)) if axis not in kept]
    return product.sum(summed) if summed else product


def _over_windows(
    coloring: Coloring, start: int, stop: int, products: Sequence[tuple[Tensor, Tensor]], into: Tensor
) -> None:
    """Each element takes the products of all places that may depend on it, axis by axis."""
    elements = torch.arange(into.shape[1], device=into.device)
    direction = coloring.directions_of_elements.to(into.device)
    moved = elements[(direction >= start) & (direction < stop)]
    for k, (difference, cotangent) in enumerate(products):
        pattern = coloring.patterns[k]
        found = windows(pattern)
        kept = sorted(window[0] for window in found if window is not None)
        sums = _places(pattern, kept, difference, cotangent)
        for axis, window in enumerate(found):
            if window is None:
                sums = sums.unsqueeze(2 + axis)
                continue
            # Axes of the value so far stand in front, those of the output that are left stand behind in order.
            at = 2 + axis + kept.index(window[0])
            kept.remove(window[0])
            matrix = dense(window[1], coloring.shape[axis]).to(sums)
            sums = torch.tensordot(sums, matrix, ([at], [0])).movedim(-1, 2 + axis)
        sums = sums.expand(*sums.shape[:2], *coloring.shape).flatten(2)
        into[:, moved] += sums[direction[moved] - start, :, moved].T

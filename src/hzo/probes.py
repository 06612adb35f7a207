"""Probes: which elements a query perturbs, and which outputs then belong to which element.

A probe turns a node into directions. All samples of the batch are perturbed at once, a direction moves the same
elements in each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["coordinate", "elementwise", "adjoint"]


@dataclass(frozen=True)
class Probe:
    """How one tensor of a boundary is perturbed.

    ``coordinate``: one element of every sample at a time, everything that changes belongs to it (nothing is assumed).
    ``elementwise``: all elements at once, an output element belongs to the input element of the same place.
    ``adjoint``: no perturbation; the structure of a single operation, given by ``promise``, carries the cotangent.
    """

    kind: Kind
    elements: int  # of one sample
    promise: str = ""

    @property
    def directions(self) -> int:
        """Perturbations that the probe needs, each of all samples."""
        return {"coordinate": self.elements, "elementwise": 1, "adjoint": 0}[self.kind]


def select(probe: Probe, start: int, stop: int, base: Tensor, moved: Tensor) -> Tensor:
    """Perturbed states for the directions [start, stop).

    Args:
        base, moved: (B, n), the unperturbed rows and the rows with every element moved.

    Returns (directions, B, n).
    """
    if probe.kind == "elementwise":
        return moved.unsqueeze(0)
    count = stop - start
    states = base.unsqueeze(0).repeat(count, 1, 1)
    k = torch.arange(count, device=base.device)
    states[k, :, start + k] = moved[:, start:stop].T
    return states


def decode(probe: Probe, products: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum differences against cotangents, for each direction over the outputs that belong to one element.

    Args:
        products: pairs of differences (directions, B, m) and cotangents (B, m), one for every output tensor.

    Returns (B, elements moved by these directions).
    """
    if probe.kind == "elementwise":
        return sum((difference[0] * cotangent for difference, cotangent in products), start=torch.zeros(()))
    return sum(
        (torch.einsum("kbm,bm->bk", difference, cotangent) for difference, cotangent in products),
        start=torch.zeros(()),
    )

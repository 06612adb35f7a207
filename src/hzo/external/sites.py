"""What is perturbed, and how: one leaf of a call, by the cheapest way that the part's structure allows.

All elements at once where the part is elementwise, a color at a time where it is local, one sample in place of the
batch where it is affine, and else one element of every sample at a time. A leaf without samples (a parameter, a shared
tensor, all leaves of a part without a batch) is one sample of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from hzo.errors import InputError
from hzo.external.call import BoxCall
from hzo.finite_differences import (
    Coloring,
    color,
    evaluations,
)

How = Literal["coordinate", "elementwise", "colored", "symmetric", "reindexing"]


@dataclass(frozen=True)
class Site:
    """One leaf that is perturbed.

    Attributes:
        index: of the leaf. name: for messages. shape: of one sample, complex numbers as pairs. rows: samples.
        apart: whether it has the batch in front; if not, it is one sample and the outputs of the whole batch are its
            own.
        pairs: numbers for each element, 2 for complex ones.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    rows: int
    apart: bool
    pairs: int
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class SiteMethod:
    """How a site's derivatives are asked for.

    Attributes:
        directions: perturbations; evaluations: calls for each; samples: that each evaluation runs.
        alike: one sample tells the derivative of all.
    """

    how: How
    directions: int
    evaluations: int
    samples: int
    alike: bool = False
    coloring: Coloring | None = None

    @property
    def queries(self) -> int:
        return self.directions * self.evaluations * self.samples


def site_of(call: BoxCall, leaves: Sequence[Tensor], k: int, outputs: Sequence[int]) -> Site:
    """The leaf ``k`` as something to perturb, for what these outputs say."""
    leaf, layout = leaves[k], call.layout
    apart = layout.leaves[k] and all(layout.outputs[o] for o in outputs)
    shape = tuple(leaf.shape[1:] if apart else leaf.shape)
    pairs = 2 if leaf.is_complex() else 1
    dtype = leaf.dtype.to_real() if leaf.is_complex() else leaf.dtype
    where = f"{call.names[k]} of {call.guard}"
    return Site(k, where, (*shape, 2) if pairs == 2 else shape, layout.batch if apart else 1, apart, pairs, dtype)


def method_of(call: BoxCall, site: Site, outputs: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> SiteMethod:
    """The cheapest way to the derivatives that the part's structure allows.

    Args:
        outputs: that carry a cotangent. shapes: of one sample of each output, complex numbers as pairs.
    """
    settings, layout = call.settings, call.layout
    evaluated, samples = evaluations(settings.scheme), layout.batch
    plain = SiteMethod("coordinate", site.elements, evaluated, samples)
    argument = site.index < call.count or (call.state_keys and site.index >= call.count + len(call.parameters))
    if not argument or (layout.batched and not site.apart):
        return plain
    plain_shapes = [_without_pairs(shape, call, o) for o, shape in zip(outputs, shapes, strict=True)]
    fits = all(shape == sample_shape(site) for shape in plain_shapes)
    alone = call.count == 1 and not call.state_keys
    stepping = settings.mu is None and call.settings.steps.given is None
    found = [plain]
    if settings.elementwise and not fits:
        other = next(shape for shape in plain_shapes if shape != sample_shape(site))
        raise InputError(
            f"{call.guard} was said to be elementwise; expected outputs of its input's shape {sample_shape(site)} a "
            f"sample, got {other}; leave elementwise=True out, or see promises="
        )
    if settings.elementwise:
        found.append(SiteMethod("elementwise", site.pairs, evaluated, samples))
    if settings.symmetric and alone and fits and len(outputs) == 1 and stepping and site.pairs == 1:
        found.append(SiteMethod("symmetric", 2, 2, samples))  # in two groups, where sizes of the cotangent differ much
    if site.pairs == 1 and alone and not settings.elementwise:
        patterns = [settings.pattern(site.shape, shape) for shape in shapes]
        if patterns and all(p is not None for p in patterns):
            coloring = color([p for p in patterns if p is not None])
            found.append(SiteMethod("colored", coloring.directions, evaluated, samples, coloring=coloring))
    best = min(found, key=lambda m: m.queries)
    if settings.affine and alone and layout.batched and settings.mu is None and not call.draws:
        if settings.reindexing and site.pairs == 1 and len(outputs) == 1 and settings.bounds.given is None:
            best = min((best, SiteMethod("reindexing", 1, 1, 1)), key=lambda m: m.queries)
        alike = [replace(m, evaluations=1, samples=1, alike=True) for m in found if m.how != "symmetric"]
        best = min((best, *alike), key=lambda m: m.queries)
    return best


def sample_shape(site: Site) -> tuple[int, ...]:
    return site.shape[:-1] if site.pairs == 2 else site.shape


def _without_pairs(shape: tuple[int, ...], call: BoxCall, output: int) -> tuple[int, ...]:
    return shape[:-1] if call.complex[output] else shape

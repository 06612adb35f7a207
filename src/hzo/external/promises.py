"""Is a promise kept where it is used? One probe at the first use of each; ``infer_structure`` makes many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hzo.errors import HzoError, StructureError
from hzo.execution import counting
from hzo.external.call import BoxCall
from hzo.external.queries import BoxSweep
from hzo.external.sites import Site, SiteMethod
from hzo.finite_differences import Pattern, of_one_sign
from hzo.tracing import declared
from hzo.verification import properties

_AT_ONCE = 16  # elements that are tried, each in other samples
ALIKE = 1e-4  # relative: an affine part may compute its sums in another order


def check_promise(
    sweep: BoxSweep, site: Site, method: SiteMethod, rows: Tensor, step: Any, bounds: tuple[Any, Any]
) -> None:
    """Try what a method takes for granted, at the first use of it in a box; at every use where hzo inferred it.

    Elementwise, local: some elements are moved as queries move them, and outputs that do not depend on them must stay;
    of what the user promised the others then, too, as far as to the values of another sample, where the part takes
    these: what is far and weak shows there. Affine: halfway between two samples, the output is halfway. Symmetric:
    ⟨u, J v⟩ = ⟨v, J u⟩ for random u and v.

    Elements and directions are random, and others each time. What all elements of a part have in common (a mean, a sum)
    is seen down to about a thousandth of a difference in float32; a single pair of them far apart by chance, the larger
    the batch.

    Cost: ``evaluations_of_test`` of the batch.

    Raises:
        StructureError: it does not hold.
    """
    call = sweep.call
    key = ("promise", site.index, site.shape, method.how, method.alike)
    before = call.known.get(key, 0)
    if not tried(call, method) or (before and not call.settings.inferred):
        return
    generator = torch.Generator().manual_seed(site.index + (before << 16))
    with counting.doing("the test of what was promised"):
        if method.alike:
            _affine(sweep, site, rows, bounds, generator)
        if method.how in ("elementwise", "colored"):
            upper = sweep.stencil(site, rows, step, bounds).upper
            apart = _elementwise if method.how == "elementwise" else _local
            kept = apart(sweep, site, rows, upper, generator)
            if kept is not None and not call.settings.inferred:
                _far_apart(sweep, site, rows, upper, bounds, kept)
        elif method.how == "symmetric" and bounds == (None, None):  # random directions lead out of them
            _symmetric(sweep, site, rows, generator)
    call.known[key] = before + 1


def tried(call: BoxCall, method: SiteMethod) -> bool:
    """Whether a method takes anything for granted that is to be tested."""
    return call.settings.check_promises and (method.how != "coordinate" or method.alike)


def evaluations_of_test(call: BoxCall, site: Site, method: SiteMethod) -> int:
    """Evaluations of the batch, at most, that ``check_promise`` takes.

    One; two where the user promised that elements are apart, and of an affine part with one sample; symmetric five.
    """
    if not tried(call, method):
        return 0
    affine = (1 if site.rows > 1 else 2) if method.alike else 0
    apart = method.how == "colored" or (method.how == "elementwise" and site.elements > site.pairs)
    return affine + apart * (1 if call.settings.inferred else 2) + (5 if method.how == "symmetric" else 0)


def check_copies(sweep: BoxSweep, site: Site, rows: Tensor, places: Tensor) -> None:
    """Outputs that are copies of these places of the input (from 1 on, 0 for none) were so in the forward pass."""
    (base,) = sweep.base(site)
    padded = torch.cat([torch.zeros_like(rows[:, :1]), rows], 1)
    inside = bool(((places >= 0) & (places <= rows.shape[1])).all())
    if not inside or not torch.equal(padded[:, places].to(base.dtype), base):
        raise _broken(sweep, site, "reindexing", "what comes out is not made of copies of what went in")


def _base(sweep: BoxSweep, site: Site) -> list[Tensor]:
    """(rows, m) of the outputs that count, as they came."""
    return [sweep.call.base[o].reshape(site.rows, -1) for o in sweep.outputs]


def _asked(sweep: BoxSweep, site: Site, moved: Tensor) -> list[Tensor]:
    """(rows, m) of the outputs that count for one batch, as a check."""
    call, given = sweep.call, list(sweep.leaves)
    given[site.index] = sweep._leaf(site, moved)
    counting.add(check_evaluations=call.layout.batch)
    found = call.evaluate(given)
    return [found[o].reshape(site.rows, -1) for o in sweep.outputs]


@dataclass(frozen=True)
class _Apart:
    """Elements of which some are moved, and what must stay then.

    Attributes:
        promise: in words. moved: (rows, n), the elements. stay: (rows, m) for each output, where those are moved.
        others: the same where all the others are moved.
    """

    promise: str
    moved: Tensor
    stay: list[Tensor]
    others: list[Tensor]


def _elementwise(sweep: BoxSweep, site: Site, rows: Tensor, upper: Tensor, generator: torch.Generator) -> _Apart | None:
    elements = rows.shape[1] // site.pairs
    if elements == 1:
        return None
    here = torch.rand(len(rows), elements, generator=generator) < 0.5
    here[:, 0], here[:, -1] = True, False  # some of each, in every sample
    order = torch.rand(len(rows), elements, generator=generator).argsort(1)
    here = here.gather(1, order)
    base = _base(sweep, site)
    came = [here.repeat_interleave(b.shape[1] // elements, 1).to(b.device) for b in base]
    apart = _Apart("elementwise", here.repeat_interleave(site.pairs, 1).to(rows.device), [~mask for mask in came], came)
    _move_some(sweep, site, rows, upper, apart)
    return apart


def _local(sweep: BoxSweep, site: Site, rows: Tensor, upper: Tensor, generator: torch.Generator) -> _Apart:
    """A run of places along one axis, another one in each sample: what is far from it must stay."""
    call = sweep.call
    shapes = call.sample_shapes(sweep.outputs, site.apart)
    found = [call.settings.pattern(site.shape, shape) for shape in shapes]
    patterns = [pattern for pattern in found if pattern is not None]
    masks = [run_of_places(patterns, generator) for _ in range(min(_AT_ONCE, len(rows)))]

    def of_rows(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).repeat(-(-len(rows) // len(masks)), 1)[: len(rows)].to(rows.device)

    apart = _Apart(
        f"local ({', '.join(map(str, declared(call.guard) or ()))})",
        of_rows([mask for mask, _, _ in masks]),
        [of_rows([stay[k] for _, stay, _ in masks]) for k in range(len(patterns))],
        [of_rows([others[k] for _, _, others in masks]) for k in range(len(patterns))],
    )
    _move_some(sweep, site, rows, upper, apart)
    return apart


def run_of_places(patterns: Sequence[Pattern], generator: torch.Generator) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Some neighbours along an axis as a mask (n,), and for each output those (m,) that may not depend on them, and on
    all others."""
    value = patterns[0].value
    axes = [axis for axis, link in enumerate(patterns[0].links) if link and value[axis] > 1]
    axis = axes[int(torch.randint(len(axes), (), generator=generator))]
    size = value[axis]
    first, length = (int(torch.randint(k, (), generator=generator)) for k in (size, size - 1))
    chosen = {(first + k) % size for k in range(length + 1)}
    bits = sum(1 << k for k in chosen)
    index = torch.zeros(size, dtype=torch.bool)
    index[list(chosen)] = True
    mask = index.view(*(-1 if k == axis else 1 for k in range(len(value)))).expand(tuple(value)).flatten()
    every = (1 << size) - 1
    stay, others = ([~properties.reached_by(p, axis, b) for p in patterns] for b in (bits, every ^ bits))
    return mask, stay, others


def _move_some(sweep: BoxSweep, site: Site, rows: Tensor, upper: Tensor, apart: _Apart) -> None:
    moved = torch.where(apart.moved, upper, rows)
    for base, found, stays in zip(_base(sweep, site), _asked(sweep, site, moved), apart.stay, strict=True):
        _must_stay(sweep, site, apart.promise, base, found, stays.to(base.device))


def _far_apart(
    sweep: BoxSweep, site: Site, rows: Tensor, upper: Tensor, bounds: tuple[Any, Any], apart: _Apart
) -> None:
    """All that was not moved before, as far as other samples are: a weak dependence does not drown in rounding."""
    other = rows.roll(1, 0)
    if torch.equal(other, rows):  # one sample: half of each number, which keeps its sign and what it stands for
        other = torch.where(rows == 0, upper, rows / 2)
    low, high = (None if b is None else sweep.expanded(site, b, rows).to(rows.dtype) for b in bounds)
    other = other if low is None else torch.maximum(other, low)
    other = other if high is None else torch.minimum(other, high)
    try:
        found = _asked(sweep, site, torch.where(apart.moved, rows, other))
    except HzoError:  # it does not run there
        return
    for base, result, stays in zip(_base(sweep, site), found, apart.others, strict=True):
        _must_stay(sweep, site, apart.promise, base, result, stays.to(base.device))


def _must_stay(sweep: BoxSweep, site: Site, promise: str, base: Tensor, found: Tensor, stays: Tensor) -> None:
    worked = (found.isfinite() & base.isfinite()).all(1, keepdim=True)  # of a sample that failed nothing is said
    change = properties.difference(base, found) * (stays & worked)
    if change.numel() and float(change.max()) > _slack(sweep, base, site):
        sample, element = divmod(int(change.argmax()), change.shape[1])
        raise _broken(
            sweep,
            site,
            promise,
            f"output {element} of sample {sample} changed by {float(change.max()):.3g} when elements were moved that "
            "it cannot depend on then",
        )


def _slack(sweep: BoxSweep, base: Tensor, site: Site) -> float:
    """What a value may change where nothing that it depends on did: by other kernels, or as two equal calls do."""
    return max(properties.slack([base], sweep.rows(site)), 4 * _unlike(sweep))


def _unlike(sweep: BoxSweep) -> float:
    unlike = sweep.call.unlike
    return max((float(unlike[o].max()) for o in sweep.outputs if unlike[o].numel()), default=0.0) if unlike else 0.0


def off_halfway(
    ask: Callable[[Tensor], list[Tensor]],
    rows: Tensor,
    base: Sequence[Tensor],
    generator: torch.Generator,
    bounds: tuple[Tensor | None, Tensor | None] = (None, None),
) -> list[tuple[Tensor, float]]:
    """Of an affine function halfway between two samples: for each output, how far it is from halfway between theirs.

    Args:
        ask: from rows to outputs. base: those at ``rows``. bounds: within which a sample alone is moved.

    Returns, for each output, distances (rows, m), NaN where a sample failed, and what the order of its sums may make.
    Cost: one run; of one sample, or of equal ones, two.
    """
    other, theirs = rows.roll(1, 0), [b.roll(1, 0) for b in base]
    if torch.equal(other, rows):
        low, high = bounds
        # Through zero to the other side, where kinks are; not for a part of positive numbers, say.
        other = properties.moved(rows, generator) if of_one_sign(rows) else -rows
        other = other if high is None else torch.minimum(other, high.to(other))
        other = other if low is None else torch.maximum(other, low.to(other))
        theirs = ask(other)
    found = []
    for b, t, m in zip(base, theirs, ask(rows + (other - rows) / 2), strict=True):
        wide = torch.promote_types(m.dtype, torch.float32)
        expected, got = (b.to(wide) + t.to(wide)) / 2, m.to(wide)
        scale = float(torch.stack([b.to(wide).abs(), t.to(wide).abs()]).nan_to_num(0, 0, 0).max())
        gaps = properties.difference(expected, got)
        found.append((gaps.where(expected.isfinite() & got.isfinite(), torch.nan), ALIKE * scale))
    return found


def _affine(sweep: BoxSweep, site: Site, rows: Tensor, bounds: tuple[Any, Any], generator: torch.Generator) -> None:
    low, high = (None if b is None else sweep.expanded(site, b, rows) for b in bounds)
    found = off_halfway(lambda moved: _asked(sweep, site, moved), rows, _base(sweep, site), generator, (low, high))
    for gaps, allowed in found:
        seen = gaps[gaps.isfinite()]
        if seen.numel() and float(seen.max()) > max(allowed, 4 * _unlike(sweep)):
            raise _broken(
                sweep,
                site,
                "affine, with one matrix for all samples",
                f"halfway between two inputs the output is off halfway by {float(seen.max()):.3g}",
            )


def _symmetric(sweep: BoxSweep, site: Site, rows: Tensor, generator: torch.Generator) -> None:
    try:
        found = properties.symmetric(lambda moved: _asked(sweep, site, moved), rows, generator, pairs=1)
    except HzoError:  # it is not defined there
        return
    if not found.holds:
        raise _broken(sweep, site, "symmetric", found.where)


def _broken(sweep: BoxSweep, site: Site, promise: str, what: str) -> StructureError:
    if sweep.call.settings.inferred:
        return StructureError(
            f"{sweep.call.guard} seemed to be {promise} at the first input, from which its promises were inferred, and "
            f"is not in {site.name} now: {what}. Leave promises='inferred' out, which asks element by element, or "
            "promise what always holds (hzo.infer_structure(module, x) proposes at other inputs); check_promises=False "
            "takes it on trust"
        )
    return StructureError(
        f"{sweep.call.guard} was promised to be {promise}, and is not in {site.name}: {what}. Promise less "
        "(hzo.infer_structure(module, x) proposes what holds), or nothing; check_promises=False takes it on trust"
    )

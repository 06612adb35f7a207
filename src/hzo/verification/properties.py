"""Numerical tests of promises, each on a function between matrices with one row per sample.

Slow and obviously right: every test runs the function at moved inputs and looks at what follows. A test returns the
worst that it saw, and the tolerance that the dtype and the test's own steps leave for a promise that holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hzo.execution import coarsest_product
from hzo.finite_differences import Pattern, accumulation_dtype

Evaluate = Callable[[Tensor], list[Tensor]]
"""(B, n) -> results (B, m), each; runs with fewer or more rows are not asked for."""

_PLACES = 64  # places along one axis that are moved one by one


@dataclass(frozen=True)
class PropertyResult:
    """The worst of a test.

    Attributes:
        error: the largest violation seen. tolerance: what rounding and the steps explain.
        tests: runs that were compared. where: positions of the worst, in words.
        expected, got: there, what the promise leads to expect and what came.
    """

    error: float
    tolerance: float
    tests: int
    where: str = ""
    expected: float = 0.0
    got: float = 0.0

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def resolution(*tensors: Tensor) -> float:
    """The relative rounding of the coarsest tensor; matrix products on CUDA may round to TF32."""
    units = [float(torch.finfo(t.dtype).eps) for t in tensors if t.is_floating_point()]
    if any(t.is_cuda and t.dtype == torch.float32 for t in tensors):
        units.append(coarsest_product())
    return max(units, default=0.0)


def deviation_of(tensor: Tensor) -> float:
    """Root mean square about the mean, 1 where nothing varies."""
    wide = tensor.to(accumulation_dtype(tensor.dtype))
    return float(wide.std(correction=0)) or 1.0


def moved(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Every element moved by half to one and a half times the scale, up or down."""
    up = torch.rand(rows.shape, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, rows.shape, generator=generator) * 2 - 1
    return rows + (deviation_of(rows) * (0.5 + up) * sign).to(rows)


def separating(count: int) -> Iterator[Tensor]:
    """Masks such that of any two places each is, in some mask, in while the other is out: by the bits of numbers."""
    numbers = torch.arange(count)
    for bit in range(max(count - 1, 0).bit_length()):
        mask = (numbers >> bit) % 2 == 1
        yield mask
        yield ~mask


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|, zero where both are the same infinity or NaN."""
    wide = accumulation_dtype(a.dtype) if a.is_floating_point() else torch.float64
    size = (a.to(wide) - b.to(wide)).abs()
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, size).nan_to_num(nan=float("inf"))


def slack(base: Sequence[Tensor], rows: Tensor) -> float:
    """What a value may change when another kernel or order of sums computes it."""
    finite = [t[t.isfinite()].abs().max() for t in base if bool(t.isfinite().any())]
    return 16 * resolution(rows, *base) * max((float(m) for m in finite), default=1.0)


def place(index: int, shape: Sequence[int]) -> str:
    """A place among the elements of one sample, in words."""
    found = [int(k) for k in torch.unravel_index(torch.tensor(index), tuple(shape))] if shape else []
    found = found[1:] if len(found) > 1 and shape[0] == 1 else found
    return f"({', '.join(map(str, found))})"


def deterministic(run: Evaluate, rows: Tensor) -> PropertyResult:
    """The same input gives the same result."""
    base = run(rows)
    worst = max((float(difference(a, b).max()) for a, b in zip(base, run(rows), strict=True) if a.numel()), default=0.0)
    return PropertyResult(worst, slack(base, rows), 1, "the same input, twice", 0.0, worst)


def samples_apart(run: Evaluate, rows: Tensor, generator: torch.Generator) -> PropertyResult:
    """A sample's result does not change when others are moved."""
    if len(rows) == 1:
        return PropertyResult(0.0, 0.0, 0, "one sample alone")
    base, other = run(rows), moved(rows, generator)
    tolerance, worst, tests = slack(base, rows), PropertyResult(0.0, 0.0, 0), 0
    for mask in separating(rows.shape[0]):
        here = mask.to(rows.device)
        results = run(torch.where(here[:, None], other, rows))
        tests += 1
        for a, b in zip(base, results, strict=True):
            change = difference(a, b)[~here].amax(1) if a.shape[1] else torch.zeros(1)
            if float(change.max()) > worst.error:
                sample = int((~here).nonzero()[int(change.argmax())])
                where = f"moving samples {here.nonzero().flatten().tolist()[:8]} changes sample {sample}"
                worst = PropertyResult(float(change.max()), 0.0, 0, where, 0.0, float(change.max()))
    return PropertyResult(worst.error, tolerance, tests, worst.where, 0.0, worst.got)


def elementwise(run: Evaluate, rows: Tensor, shape: Sequence[int], generator: torch.Generator) -> PropertyResult:
    """Elements that are not moved keep their results. About 2·log₂(n) runs separate all pairs of places."""
    (base,), other = run(rows), moved(rows, generator)
    tolerance, tests = slack([base], rows), 0
    if base.shape != rows.shape:
        return PropertyResult(
            float("inf"), tolerance, 0, f"{rows.shape[1]} elements go in and {base.shape[1]} come out"
        )
    worst = 0.0
    for mask in separating(rows.shape[1]):
        here = mask.to(rows.device)
        change = difference(base, run(torch.where(here, other, rows))[0]) * ~here
        tests += 1
        worst = max(worst, float(change.max()))
        if worst > tolerance:
            sample, element = divmod(int(change.argmax()), rows.shape[1])
            cause = _culprit(run, rows, other, here, lambda t, s=sample, e=element: difference(base, t)[s, e])  # type: ignore[misc]
            where = f"moving element {place(cause, shape)} of sample {sample} changes {place(element, shape)}"
            return PropertyResult(worst, tolerance, tests, where, 0.0, worst)
    return PropertyResult(worst, tolerance, tests, "" if tests else "one element alone")


def _culprit(run: Evaluate, rows: Tensor, other: Tensor, here: Tensor, change: Callable[[Tensor], Tensor]) -> int:
    """Halve a set of moved elements until one is left that makes a change."""
    candidates = here.nonzero().flatten()
    while len(candidates) > 1:
        half = candidates[: len(candidates) // 2]
        mask = torch.zeros_like(here)
        mask[half] = True
        hit = float(change(run(torch.where(mask, other, rows))[0])) > 0
        candidates = half if hit else candidates[len(candidates) // 2 :]
    return int(candidates[0])


def local(run: Evaluate, rows: Tensor, pattern: Pattern, output: int, generator: torch.Generator) -> PropertyResult:
    """What a dependence pattern excludes does not change: the places along every axis moved one after the other."""
    base, other = run(rows), moved(rows, generator)
    target = base[output]
    worst, tests = PropertyResult(0.0, 0.0, 0), 0
    for axis, link in enumerate(pattern.links):
        size = pattern.value[axis]
        if not link:
            continue
        chosen = range(size) if size <= _PLACES else torch.randperm(size, generator=generator)[:_PLACES].tolist()
        for i in chosen:
            here = _slab(pattern.value, axis, i).to(rows.device)
            stays = ~reached(pattern, axis, i).to(rows.device)
            change = difference(target, run(torch.where(here, other, rows))[output]) * stays
            tests += 1
            if change.numel() and float(change.max()) > worst.error:
                sample, element = divmod(int(change.argmax()), target.shape[1])
                along = f"all that has index {i} along axis {_named(axis, pattern.value)}"
                where = f"moving {along} of sample {sample} changes output {place(element, pattern.output)}"
                worst = PropertyResult(float(change.max()), 0.0, 0, where, 0.0, float(change.max()))
    return PropertyResult(worst.error, slack([target], rows), tests, worst.where, 0.0, worst.got)


def _named(axis: int, shape: Sequence[int]) -> int:
    """Axes of a sample are counted with the batch as axis 0, whose place in the rows has size 1."""
    return axis if shape[0] == 1 else axis + 1


def _slab(shape: Sequence[int], axis: int, index: int) -> Tensor:
    """Elements of a sample that have this index along an axis, as a mask (n,)."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    mask.select(axis, index).fill_(True)
    return mask.flatten()


def reached(pattern: Pattern, axis: int, index: int) -> Tensor:
    """Outputs that may depend on what has this index along an axis, as a mask (m,)."""
    return reached_by(pattern, axis, 1 << index)


def reached_by(pattern: Pattern, axis: int, places: int) -> Tensor:
    """Outputs that may depend on what has one of several indices along an axis, the bits of a number, as (m,)."""
    mask = torch.ones(pattern.output, dtype=torch.bool)
    for b, matrix in pattern.links[axis].items():
        allowed = torch.tensor([bool(row & places) for row in matrix])
        mask &= allowed.view(*(-1 if k == b else 1 for k in range(len(pattern.output))))
    return mask.flatten()


def affine(run: Evaluate, rows: Tensor, generator: torch.Generator) -> PropertyResult:
    """f(p + q) − f(p) − f(q) + f(0) = 0, and every row is treated alike."""
    error, tolerance, tests, where = 0.0, 0.0, 0, ""
    zero = run(torch.zeros_like(rows))
    for size in (1.0, 4.0):
        p, q = (torch.randn(rows.shape, generator=generator).to(rows) * deviation_of(rows) * size for _ in range(2))
        parts = [run(p + q), run(p), run(q), zero, run(p[:1].expand_as(p).contiguous())]
        tests += 4
        for together, first, second, offset, same in zip(*parts, strict=True):
            wide = accumulation_dtype(first.dtype)
            defect = difference(together.to(wide) + offset.to(wide), first.to(wide) + second.to(wide))
            alike = difference(same, first[:1].expand_as(first))
            tolerance = max(tolerance, slack([together, first, second, offset], rows))
            for found, words in (
                (defect, "f(p + q) − f(p) − f(q) + f(0)"),
                (alike, "equal samples give unequal results"),
            ):
                if found.numel() and float(found.max()) > error:
                    error = float(found.max())
                    sample, element = divmod(int(found.argmax()), found.shape[1])
                    where = f"{words} at element {element} of the output of sample {sample}"
    return PropertyResult(error, tolerance, tests, where, 0.0, error)


def symmetric(run: Evaluate, rows: Tensor, generator: torch.Generator, pairs: int = 4) -> PropertyResult:
    """⟨u, J v⟩ = ⟨v, J u⟩ for random u and v, relative to their lengths; for as many results as there are inputs."""
    wide, unit = accumulation_dtype(rows.dtype), resolution(rows)
    h = deviation_of(rows) * unit ** (1 / 3)
    (base,) = run(rows)
    rounding = 10 * unit * base.to(wide).norm(dim=1) / h

    def along(v: Tensor) -> Tensor:
        (up,), (down,) = run(rows + h * v), run(rows - h * v)
        found: Tensor = (up.to(wide) - down.to(wide)) / (2 * h)
        return found

    error, where = 0.0, ""
    for _ in range(pairs):
        u, v = (torch.randn(rows.shape, generator=generator).to(rows) for _ in range(2))
        of_u, of_v = along(u), along(v)
        size = (of_u.norm(dim=1) * v.norm(dim=1)).clamp(min=torch.finfo(wide).tiny)
        defect = ((u * of_v).sum(1) - (v * of_u).sum(1)).abs() - rounding * (u.norm(dim=1) + v.norm(dim=1)).to(wide)
        defect = defect.clamp(min=0) / size
        if float(defect.max()) > error:
            error, where = float(defect.max()), f"⟨u, J v⟩ is not ⟨v, J u⟩ for sample {int(defect.argmax())}"
    return PropertyResult(error, 100 * unit ** (2 / 3), 4 * pairs + 1, where, 0.0, error)


def alike(run: Evaluate, rows: Tensor, vectors: int, generator: torch.Generator) -> PropertyResult:
    """The last dimension's vectors, ``vectors`` in a sample, change places: so do their results, and nothing else."""
    (base,) = run(rows)
    ring = torch.randperm(vectors, generator=generator)
    order = torch.empty_like(ring)
    order[ring] = ring.roll(1)  # none stays where it is: a change of places that moves nothing would show nothing
    order = order.to(rows.device)
    shuffled = rows.view(len(rows), vectors, -1)[:, order].reshape(rows.shape)
    change = difference(
        base.reshape(len(base), vectors, -1)[:, order], run(shuffled)[0].reshape(len(base), vectors, -1)
    )
    error = float(change.max()) if change.numel() else 0.0
    sample, vector = divmod(int(change.amax(2).argmax()), vectors) if change.numel() else (0, 0)
    where = f"vector {int(order[vector])} of sample {sample} gives another result at place {vector}"
    return PropertyResult(error, slack([base], rows), 1, where, 0.0, error)

"""Promises of the parts of a box that is planned as a whole: one test of each, beside its noise where it has any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hzo.errors import HzoError, StructureError
from hzo.execution import Activations, counting, query
from hzo.external.guard import Guarded
from hzo.external.promises import off_halfway, run_of_places
from hzo.locality import slice_locality
from hzo.tracing import Graph, GraphOperation, Promise, declared
from hzo.verification import properties

_T = TypeVar("_T")
_LOUDER = 4.0  # mean square over that of noise, which may change with what is moved


@dataclass(frozen=True)
class _PartTest:
    """One part at one operand.

    Attributes:
        ask: from rows of the operand to rows of each result. rows, base: as they were. outputs: the results' values.
        noise: what each result's second reading differed from its first, if it is noisy.
    """

    graph: Graph
    operation: GraphOperation
    value: int
    outputs: list[int]
    ask: Callable[[Tensor], list[Tensor]]
    rows: Tensor
    base: list[Tensor]
    noise: list[Tensor] | None
    generator: torch.Generator
    inferred: bool


@torch.no_grad()
def check_parts(graph: Graph, activations: Activations, *, noisy: bool, inferred: bool, seed: int) -> None:
    """Test at the activations of a forward pass what was promised of each part, of which a plan takes advantage.

    Elements are moved as far as to the values of another sample: what does not depend on them must stay, which is seen
    down to rounding, or to about twice the noise, of which a second reading tells how loud it is. A promise that cannot
    be told from noise, or at points that the part refuses, passes: symmetric and reindexing of noisy parts do.

    Cost: one run of each part for each promise (affine, a sample alone: two; symmetric: five), and one more for its
    noise; as checks.

    Raises:
        StructureError: a promise does not hold.
    """
    generator = torch.Generator().manual_seed(seed)
    for op in graph.operations:
        promises = declared(op.module) or ()
        if not isinstance(op.module, Guarded) or not promises or not op.batched:
            continue
        outputs = [v for v in op.writes if graph.values[v].batched and graph.values[v].floating]
        for value in dict.fromkeys(op.reads):
            found = graph.values[value]
            if not (found.batched and found.floating and outputs):
                continue

            def ask(moved: Tensor, op: GraphOperation = op, value: int = value) -> list[Tensor]:
                state = {value: graph.values[value].rows_to_copies(moved, activations.batch)}
                written = query(graph, op, activations, state, 1)
                counting.add(check_evaluations=activations.batch)
                return [graph.values[v].copies_to_rows(written[v], activations.batch) for v in outputs]  # noqa: B023

            rows = found.rows(activations.tensor(value), activations.batch)
            base = [graph.values[v].rows(activations.tensor(v), activations.batch) for v in outputs]
            with counting.doing("the test of what was promised"):
                noise = [a - b for a, b in zip(ask(rows), base, strict=True)] if noisy else None
                _check(
                    _PartTest(graph, op, value, outputs, ask, rows, base, noise, generator, inferred), tuple(promises)
                )


def _check(test: _PartTest, promises: tuple[Promise, ...]) -> None:
    said = ", ".join(map(str, promises))
    shapes = [test.graph.values[v].sample_shape for v in test.outputs]
    if "elementwise" in promises and all(b.shape == test.rows.shape for b in test.base):
        _apart(test, "elementwise", *_some_elements(test))
    elif any(p not in ("affine", "symmetric", "reindexing", "stationary", "elementwise") for p in promises):
        patterns = slice_locality(test.graph, test.value, [test.operation.index], test.outputs).patterns
        if len(patterns) == len(shapes) and all(any(p.links) for p in patterns):
            places = [run_of_places(patterns, test.generator) for _ in range(min(16, len(test.rows)))]
            order = [k % len(places) for k in range(len(test.rows))]
            moved = torch.stack([places[k][0] for k in order])
            stay = [torch.stack([places[k][1][o] for k in order]) for o in range(len(patterns))]
            _apart(test, f"local ({said})", moved, stay)
    if "affine" in promises:
        _affine(test)
    if test.noise is None and "reindexing" in promises:
        there = torch.cat([torch.zeros_like(test.rows[:, :1]), test.rows], 1)
        for base in test.base:
            copied = all(bool(torch.isin(b.to(r.dtype), r).all()) for b, r in zip(base, there, strict=True))
            if not copied:
                raise _broken(test, "reindexing", "what comes out is not made of copies of what went in")
    if test.noise is None and "symmetric" in promises and len(test.base) == 1 and test.base[0].shape == test.rows.shape:
        found = _or_none(lambda: properties.symmetric(test.ask, test.rows, test.generator, pairs=1))
        if found is not None and not found.holds:
            raise _broken(test, "symmetric", found.where)


def _or_none(ask: Callable[[], _T]) -> _T | None:
    """What is found, or None where the part does not run there."""
    try:
        return ask()
    except HzoError:
        return None


def _other(test: _PartTest) -> Tensor:
    """Other values that the part knows: those of another sample; of one alone, half of each number."""
    other = test.rows.roll(1, 0)
    return test.rows / 2 if torch.equal(other, test.rows) else other


def _some_elements(test: _PartTest) -> tuple[Tensor, list[Tensor]]:
    moved = torch.rand(test.rows.shape, generator=test.generator) < 0.5
    return moved, [~moved for _ in test.base]


def _apart(test: _PartTest, promise: str, moved: Tensor, stay: Sequence[Tensor]) -> None:
    found = _or_none(lambda: test.ask(torch.where(moved.to(test.rows.device), _other(test), test.rows)))
    if found is None:
        return
    for k, (base, result, stays) in enumerate(zip(test.base, found, stay, strict=True)):
        if size := _more_than_noise(test, k, properties.difference(base, result), stays.to(base.device)):
            raise _broken(
                test, promise, f"what cannot depend on elements that were moved changed by up to {size:.3g} then"
            )


def _more_than_noise(test: _PartTest, k: int, change: Tensor, where: Tensor, scale: float = 0.0) -> float:
    """The largest change where none is to be expected; 0 where rounding and noise explain it.

    Args:
        k: which result. scale: of an allowance beside rounding.
    """
    counts = where & change.isfinite()
    seen = change[counts].double()
    if not seen.numel():
        return 0.0
    allowed = max(properties.slack([test.base[k]], test.rows), scale)
    if test.noise is not None:
        noise = test.noise[k][test.noise[k].isfinite()].double()
        loud = float(noise.square().mean()) if noise.numel() else 0.0
        chance = _LOUDER + 6 * (2 / seen.numel() + 2 / max(1, noise.numel())) ** 0.5
        few = 10.0 if min(seen.numel(), noise.numel()) < 8 else 1.0
        if float(seen.square().mean()) <= few * chance * loud + allowed**2:
            return 0.0
        return float(seen.max())
    return float(seen.max()) if float(seen.max()) > allowed else 0.0


def _affine(test: _PartTest) -> None:
    found = _or_none(lambda: off_halfway(test.ask, test.rows, test.base, test.generator))
    for k, (gaps, allowed) in enumerate(found or ()):
        everywhere = torch.ones_like(gaps, dtype=torch.bool)
        if size := _more_than_noise(test, k, gaps, everywhere, allowed):
            raise _broken(
                test,
                "affine, with one matrix for all samples",
                f"halfway between two inputs the output is off halfway by up to {size:.3g}",
            )


def _broken(test: _PartTest, promise: str, what: str) -> StructureError:
    part = test.operation.module
    if test.inferred:
        return StructureError(
            f"{part} seemed to be {promise} at the first input, from which its promises were inferred, and is not now: "
            f"{what}. Leave promises='inferred' out, or promise what always holds: hzo.declare(part, …); "
            "check_promises=False takes it on trust"
        )
    return StructureError(
        f"{part} was promised to be {promise}, and is not: {what}. Promise less "
        "(hzo.infer_structure(module, x) proposes what holds), or nothing; check_promises=False takes it on trust"
    )

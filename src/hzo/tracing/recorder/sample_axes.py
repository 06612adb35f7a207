"""Along which dimension a value holds its samples, and which operations keep them apart: seen by moving one sample.

Every operation runs again with the content of some samples replaced, and what changes of its results tells where those
samples stand there. Nothing is concluded from names or from sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hzo.errors import QueryTimeoutError
from hzo.tape import Operation, Tape
from hzo.tape.operations import Ref, refs_in
from hzo.tracing import split_samples


class Axis(NamedTuple):
    """The dimension that holds the samples, and how often it runs through all of them."""

    dim: int
    outer: int = 1


FIRST = Axis(0)
Axes = dict[int, Axis | None]
"""By value, of those that depend on the inputs; None where samples are mixed."""


_SHUFFLED = 2**16  # elements up to which content is put into a random order
_PIECE = 2**20  # elements that are compared at once


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding that a change of kernel or summation order may cause."""
    if a.shape != b.shape:
        return False
    return not bool(_changed(a, b).any())


def _changed(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point():
        return a != b
    slack = torch.finfo(a.dtype).eps ** 0.5
    wide = torch.promote_types(a.dtype, torch.float32)
    one, other = a.to(wide), b.to(wide)
    scale = _largest(one)
    if not (math.isfinite(scale) and finite(other)):
        numbers = one[one.isfinite()]
        return ~torch.isclose(one, other, rtol=slack, atol=slack * _largest(numbers), equal_nan=True)
    if one.numel() <= _PIECE:
        return _further_apart(one, other, slack, scale)
    # In pieces: the system hands out memory for large temporaries page by page, which takes longer than the arithmetic.
    moved = torch.empty(one.shape, dtype=torch.bool, device=one.device)
    dim = max(range(one.dim()), key=lambda d: one.shape[d])
    size = max(1, one.shape[dim] * _PIECE // one.numel())
    for start in range(0, one.shape[dim], size):
        result, x, y = (t.narrow(dim, start, min(size, one.shape[dim] - start)) for t in (moved, one, other))
        result.copy_(_further_apart(x, y, slack, scale))
    return moved


def _further_apart(one: Tensor, other: Tensor, slack: float, scale: float) -> Tensor:
    moved: Tensor = (one - other).abs_() > other.abs().add_(scale).mul_(slack)
    return moved


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN where there is one, and 1 of nothing."""
    if not tensor.numel():
        return 1.0
    low, high = tensor.aminmax()
    return float(torch.maximum(-low, high))


def finite(tensor: Tensor) -> bool:
    """Whether all are numbers. A finite sum has finite terms, and takes less memory than a look at each."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def guess(shape: Sequence[int], batch: int) -> Axis | None:
    """The first dimension that may hold the samples."""
    return next((Axis(d) for d, size in enumerate(shape) if size and size % batch == 0), None)


def find_axes(
    tape: Tape, op: Operation, axes: Axes, batch: int, run: Callable[[tuple[Any, ...], dict[str, Any]], list[Any]]
) -> tuple[Axes, bool]:
    """The sample dimensions of an operation's results, and whether it couples samples.

    Args:
        axes: of all values so far that depend on the inputs; those of its operands are among them.
        run: the operation on other arguments.
    """
    results = [(k, v) for k, v in enumerate(op.writes) if v is not None]
    moved = [v for v in dict.fromkeys(op.reads()) if v in axes]
    made = [v for v in moved if tape.values[v].producer >= 0 or tape.values[v].requires] or moved
    guessed = {v: guess(tape.values[v].shape, batch) for _, v in results}
    if any(axes[v] is None for v in made):  # what is mixed already stays mixed
        return dict.fromkeys((v for _, v in results), None), True
    if batch == 1:
        return {v: (FIRST if tape.values[v].shape else None) for _, v in results}, not all(
            tape.values[v].shape for _, v in results
        )
    seen = dict(results)
    found: Axes = {}
    coupled = False
    unseen = dict(results)
    for kind in ("shuffled", "ramp"):  # nothing shows in zeros: then all of the operands is replaced first
        whole = _moved_results(tape, op, axes, made, batch, slice(0, 0), kind, run) if kind == "ramp" else None
        first = _moved_results(tape, op, axes, made, batch, slice(0, 1), kind, run)
        rest = _moved_results(tape, op, axes, made, batch, slice(1, None), kind, run)
        for k, v in list(unseen.items()):
            reference: Tensor | None = tape.tensors[seen[k]] if kind == "shuffled" else whole[k] if whole else None
            if reference is None or first is None or rest is None:
                continue
            if any(t is None or t.shape != reference.shape for t in (first[k], rest[k])):
                found[v], coupled = None, True  # a shape that depends on values
                unseen.pop(k)
                continue
            one, others = _changed(reference, first[k]), _changed(reference, rest[k])
            if not bool(one.any()) or not bool(others.any()):
                continue
            found[v] = _axis(one, others, batch)
            if found[v] is None:
                coupled = True
                found[v] = _equivariant(tape, op, axes, made, batch, k, run)
            unseen.pop(k)
        if not unseen:
            break
    for v in unseen.values():  # nothing moves it: a dead unit, or rounding
        found[v] = guessed[v]
    return found, coupled or any(found[v] is None and tape.values[v].shape.numel() for _, v in results)


def _equivariant(
    tape: Tape,
    op: Operation,
    axes: Axes,
    made: Sequence[int],
    batch: int,
    result: int,
    run: Callable[[tuple[Any, ...], dict[str, Any]], list[Any]],
) -> Axis | None:
    """Where the samples of a result stand that influence each other: it changes places with the operands' samples."""
    shuffled, turned = (
        _moved_results(tape, op, axes, made, batch, slice(None), kind, run) for kind in ("ramp", "turned")
    )
    if shuffled is None or turned is None:
        return None
    a, b = shuffled[result], turned[result]
    for d, size in enumerate(a.shape):
        if size and size % batch == 0:
            for outer in dict.fromkeys((1, size // batch)):
                rolled = split_samples(a, d, outer, batch).roll(1, d + 1).flatten(d, d + 2)
                if close(rolled, b):
                    return Axis(d, outer)
    return None


def _axis(one: Tensor, others: Tensor, batch: int) -> Axis | None:
    """Where the first sample stands such that it holds all that moving it changes, and nothing that the others do."""
    for d, size in enumerate(one.shape):
        if size % batch or not size:
            continue
        share = size // batch
        for outer in dict.fromkeys((1, share, *(k for k in range(2, share) if share % k == 0))):
            first, rest = (split_samples(t, d, outer, batch) for t in (one, others))
            if not bool(first.narrow(d + 1, 1, batch - 1).any()) and not bool(rest.select(d + 1, 0).any()):
                return Axis(d, outer)
    return None


def _moved_results(
    tape: Tape,
    op: Operation,
    axes: Axes,
    moved: Sequence[int],
    batch: int,
    samples: slice,
    kind: str,
    run: Callable[[tuple[Any, ...], dict[str, Any]], list[Any]],
) -> list[Any] | None:
    """The results with other content in some samples of the operands; None where the operation refuses it."""
    content = {v: _other(tape.tensors[v], axes[v], batch, samples, kind) for v in moved}
    try:
        kwargs = {k: _filled(tape, content, v) for k, v in op.kwargs.items()}
        return run(_filled(tape, content, op.args), kwargs)
    except QueryTimeoutError:  # what hangs would be waited for again, with other content and by other operations
        raise
    except Exception:  # content that it does not take: what it was given tells nothing
        return None


def _filled(tape: Tape, content: Mapping[int, Tensor], argument: Any) -> Any:
    """An argument with its tensors, some of them with other content."""
    if type(argument) is Ref:
        return content[argument.value] if argument.value in content else tape.resolve(argument)
    return tuple([_filled(tape, content, a) for a in argument]) if type(argument) is tuple else argument


def _other(tensor: Tensor | None, axis: Axis | None, batch: int, samples: slice, kind: str) -> Tensor:
    assert tensor is not None
    assert axis is not None
    tensor = tensor.detach()
    back = torch.empty_like(tensor).copy_(tensor)
    moved, target = (split_samples(t, axis.dim, axis.outer, batch).movedim(axis.dim + 1, 0) for t in (tensor, back))
    if not tensor.is_floating_point() or tensor.numel() == 0:
        new = moved.roll(1, 0)
    elif kind == "shuffled":
        flat = moved.reshape(-1)
        if tensor.numel() > _SHUFFLED:  # of many elements another order takes seconds, and a turn tells as much
            flat = flat.roll(int(0.381966 * tensor.numel()))
        else:
            flat = flat[_order(tensor.numel()).to(tensor.device)]
        new = flat.view(moved.shape)
    else:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand((2, batch, moved.numel() // batch), generator=generator, dtype=torch.float64)
        rows, new = drawn.to(tensor) + 0.1
        target.copy_(rows.view(moved.shape))
        new = (new.roll(1, 0) if kind == "turned" else new).view(moved.shape)
    target[samples] = new[samples]
    return back


@lru_cache(maxsize=16)
def _order(elements: int) -> Tensor:
    """A random order, the same whenever as many elements ask for one."""
    return torch.randperm(elements, generator=torch.Generator().manual_seed(0), device="cpu")


def batched_values(tape: Tape, inputs: Sequence[int], batch: int) -> Axes:
    """The leaves that depend on the inputs, with where their samples stand; to be filled with those of results."""
    axes: Axes = dict.fromkeys(inputs, FIRST)
    for v in tape.tainted:
        axes.setdefault(v, guess(tape.values[v].shape, batch))
    return axes


def depends(op: Operation, axes: Axes) -> bool:
    """Whether an operation reads something that depends on the inputs."""
    return any(v in axes for v in (*refs_in(op.args), *refs_in(tuple(op.kwargs.values()))))

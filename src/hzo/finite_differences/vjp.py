"""One node: the cotangent of one tensor from those of the outputs, by finite differences.

``vjp_rows`` is the only estimator; ``estimate_vjp`` offers it for any callable, the gradient engine for slices of a
graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hzo._options import function, positive
from hzo.distributed import shares
from hzo.errors import InputError, NonFiniteError, PrecisionError
from hzo.execution import RandomState, contained, counting, devices_of, full_float32, random_state, set_random_state
from hzo.finite_differences.probes import Probe, States, decode
from hzo.finite_differences.steps import (
    Scheme,
    accumulation_dtype,
    check_scheme,
    check_step,
    default_step,
    evaluations,
    narrowest,
    relative_step,
    scaled_step,
    stepped,
)
from hzo.tracing import tensors_in

RunCopies = Callable[[Tensor, int], list[Tensor]]
"""Rows (copies × B, n) and the number of copies -> rows (copies × B, m) of every output."""

# Smaller chunks wait for the interpreter, larger ones for memory (see benchmarks/gradient_time.py).
_LARGEST_ON_CPU = 32 * 2**20


def default_memory(device: torch.device) -> int:
    """Bytes for the perturbed copies of a chunk: a quarter of what is free, on a CPU at most 32 MiB."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            free = 2**30
    share = free // 4
    return min(share, _LARGEST_ON_CPU) if device.type == "cpu" else share


def directions_per_chunk(bytes_per_direction: int, memory: int | None, device: torch.device) -> int:
    """How many directions fit into the budget; at least one.

    Room for one more is left to what a node needs once: the moved rows, their gap, the result.
    """
    if memory is not None:
        positive("memory budget in bytes", memory, "None takes a share of what is free")
    return max(1, int(memory or default_memory(device)) // max(bytes_per_direction, 1) - 1)


def vjp_rows(
    run: RunCopies,
    rows: Tensor,
    cotangents: Sequence[Tensor],
    *,
    probe: Probe,
    scheme: Scheme,
    step: float | Tensor | None = None,
    chunk: int = 1,
    base: Sequence[Tensor] | None = None,
    where: str = "the perturbed tensor",
    precision: torch.dtype | None = None,
    noisy: bool = False,
    together: bool = False,
) -> Tensor:
    """Estimate ``Σ Jᵀ g`` over the outputs, sample by sample.

    Args:
        run: evaluates perturbed rows.
        rows: (B, n), the state.
        cotangents: (B, m) for every output.
        base: the unperturbed outputs (B, m), for the forward scheme.
        chunk: directions evaluated at once.
        precision: narrowest dtype on the way, where that is not the state's; the default step grows with it.
        noisy: what queries return differs by more than rounding, and whoever asks reckons with it.
        together: ``run`` is asked for what is moved up and down in one call, of twice as many copies as ``chunk``:
            nobody among several workers waits for the first half.

    Returns (B, n) in the accumulation dtype. Cost: probe.directions × B queries, twice that for central differences.
    Source: paper, the estimate of a node; the true gap between the rounded states as divisor: ours.

    Raises:
        NonFiniteError: the state, or what a query returned, is NaN or infinite.
        StepError: the step is lost in rounding. PrecisionError: so are the differences of what queries returned.
    """
    wide = accumulation_dtype(rows.dtype)
    unit = torch.finfo(narrowest([rows.dtype, *([precision] if precision else [])])).eps
    rounding = _Rounding(unit)
    # Half precision rounds everywhere, and forward differences are taken of another run, whose sums may be in another
    # order: there, elements that should not move do.
    watched = not noisy and scheme == "central" and unit < 1e-4
    cotangents = [g.to(wide) for g in cotangents]
    if step is None and noisy:  # small steps would have larger noise
        step = scaled_step(rows, relative_step(scheme, precision or rows.dtype), where, precision)
    elif step is None:
        step = default_step(rows, scheme, where, precision)
    upper, lower, gap = stepped(rows, step, scheme, where)
    result = torch.zeros(rows.shape, dtype=wide, device=rows.device)
    states = [States(probe, rows) for _ in range(evaluations(scheme))]  # what is above may be a view of its states
    # Processes that share the queries of a node each sum up some of its directions, or none where there are few.
    among = shares()
    among = None if probe.directions < 2 else among
    start, end = (0, probe.directions) if among is None else among.part(probe.directions)
    while start < end:
        stop = min(start + chunk, end)
        asked = f"queries {start + 1} to {stop} of {probe.directions} that move {where}"
        try:
            moved = [partial(s.moved, start, stop, to) for s, to in zip(states, (upper, lower), strict=False)]
            above, *others = _asked(run, moved, stop - start, asked, together)
            if others:
                (below,) = others
            else:
                assert base is not None
                below = [b.unsqueeze(0) for b in base]
            products = [
                (_difference(a, b, g, stop - start), g) for a, b, g in zip(above, below, cotangents, strict=True)
            ]
            if watched:
                rounding.note(above, products)  # first: decoding may write over the differences
            decode(probe, start, stop, products, result)
        except RuntimeError as error:
            if (stop - start == 1 and not together) or not _out_of_memory(error):
                raise
            together, chunk = False, max(1, (stop - start) // 2)  # the work of this chunk is done again in halves
            states = [States(probe, rows) for _ in states]
            continue
        start = stop
    if among is not None:
        among.sum_(result, where)
    result /= gap
    if not bool(result.isfinite().all()):
        raise NonFiniteError(
            f"a query that perturbed {where} returned NaN or infinity; check the model at this input, or give a "
            "smaller step, where this one leaves the domain of a function"
        )
    rounding.check(where)
    return result


def _asked(
    run: RunCopies, moved: Sequence[Callable[[], Tensor]], copies: int, asked: str, together: bool
) -> list[list[Tensor]]:
    """What queries return, (copies × B, m) of every output, of states moved up and, where there are such, down."""
    if together and len(moved) == 2:
        with counting.doing(f"{asked} up and down"):
            results = run(torch.cat([states().flatten(0, 1) for states in moved]), 2 * copies)
        return [list(parts) for parts in zip(*(t.chunk(2) for t in results), strict=True)]
    found = []
    for way, states in zip(("up", "down"), moved, strict=False):
        with counting.doing(f"{asked} {way}"):
            found.append(run(states().flatten(0, 1), copies))
    return found


_TOLERATED: ContextVar[bool] = ContextVar("rounding tolerated", default=False)


@contextmanager
def tolerate_rounding() -> Iterator[None]:
    """Inside the ``with`` block, return gradients that are mostly rounding error instead of raising ``PrecisionError``.

    For experiments on how good such estimates are; a network is not trained by them. Source: ours.
    """
    token = _TOLERATED.set(True)
    try:
        yield
    finally:
        _TOLERATED.reset(token)


# So many elements of what the queries of a chunk returned are looked at.
_LOOKED_AT = 2**16
# What moves at all moves by a unit, so that rounding is never seen as more than two fifths of it. At a twentieth the
# estimate is about a tenth off, and soon nothing but rounding.
_DROWNED = 0.05
# Two roundings, each uniform within half a unit of the last place, differ by 1/√6 of a unit. A unit is between a half
# and the whole of ``eps`` times the number; half of it is taken.
_SPREAD = 6**-0.5 / 2


@dataclass
class _Rounding:
    """How large differences are beside the rounding of what they are differences of, both times the cotangents."""

    unit: float
    signal: float | Tensor = 0.0
    noise: float | Tensor = 0.0

    def note(self, above: Sequence[Tensor], products: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Look at some of the results of a chunk. Elements that did not move at all were not rounded either."""
        for returned, (difference, g) in zip(above, products, strict=True):
            few = max(1, _LOOKED_AT // max(1, g.numel()))
            some = slice(None, None, -(-len(difference) // few))
            moved = difference[some]
            size = returned.view(difference.shape)[some].to(moved.dtype)
            self.signal = self.signal + (moved * g).square().sum()
            self.noise = self.noise + torch.where(moved != 0, size * g, 0).square().sum()

    def check(self, where: str) -> None:
        """Raise where rounding is more than a share of what was seen."""
        noise = float(self.noise) ** 0.5 * self.unit * _SPREAD
        seen = float(self.signal) ** 0.5
        if noise > _DROWNED * seen > 0 and not _TOLERATED.get():
            raise PrecisionError(
                f"differences of queries that perturbed {where} drown in rounding (about {noise / seen:.0%} of them): "
                "what is returned hardly depends on it, as behind a saturated sigmoid. Compute this part in a wider "
                "dtype, give a larger step, or let structure carry the cotangent (assume='structure'); to have the "
                "estimate all the same: with hzo.tolerate_rounding()"
            )


def _difference(above: Tensor, below: Tensor, g: Tensor, copies: int) -> Tensor:
    """(copies, B, m) from rows above (copies × B, m) and rows below, perturbed alike or one batch (1, B, m).

    What is infinite and of no influence on the loss, as a mask, is taken for at rest; NaN is not.
    """
    outputs, wide = above.shape[-1], g.dtype
    above, below = above.to(wide).view(copies, -1, outputs), below.to(wide).view(-1, above.shape[0] // copies, outputs)
    difference = above - below  # never in place: a query may hand through memory that is not its own
    if not bool(difference.sum().isfinite()):
        difference = difference.masked_fill_((g == 0) & (difference.isinf() | (above == below)), 0)
    return difference


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@torch.no_grad()
def estimate_vjp(
    f: Callable[..., Any],
    a: Tensor | tuple[Tensor, ...],
    cotangent: Tensor | tuple[Tensor, ...],
    *,
    scheme: Scheme = "central",
    step: float | None = None,
    elementwise: bool = False,
    batched: bool = True,
    memory: int | None = None,
    precision: torch.dtype | None = None,
) -> Any:
    """Estimate ``Jᵀ g`` of any callable at ``a`` by finite differences, one sample independent of the other.

    Args:
        f: from tensor(s) with the batch in dimension 0 to tensor(s) alike. It must not mix samples. One that draws
            random numbers draws the same for every query, those that it would draw next.
        a: the input, or a tuple of inputs (``f(*a)``).
        cotangent: g, shaped like the output (a tuple where f returns one).
        step: length h of the perturbation; None takes one from dtype and scale of each input.
        elementwise: promise that an output element depends on the input element of the same place alone.
        batched: False where ``f`` cannot take more samples than ``a`` has; directions then run one by one.
        memory: bytes that the perturbed copies of one call may take; None takes a share of what is free.
        precision: dtype in which ``f`` computes, where narrower than input and g; the default step grows with it.

    Returns the cotangent of ``a``: shaped like it, float32 for narrower dtypes; None for an integer input of several.
    Buffers of ``f``, the random state and all arguments are as before.

    Cost: for n floating elements a sample (1 if elementwise) 2 n B queries (central) or n B and one base evaluation
    (forward). Peak memory: the budget plus what ``f`` itself allocates.
    Source: paper, the estimate of a node; chunks and the measured gap: ours.

    Raises:
        InputError: shapes that do not fit, an integer input alone, a changed output shape.
        NonFiniteError: NaN or infinity in ``a``, g or a query. StepError: the step is lost in rounding.
    """
    check_scheme(scheme)
    step = check_step(step)
    function("f", f)
    inputs = a if isinstance(a, tuple) else (a,)
    cotangents = cotangent if isinstance(cotangent, tuple) else (cotangent,)
    batch = _check_vjp_arguments(inputs, cotangents, elementwise)
    evaluate = _Repeatable(f, cotangents, batch, random_state(devices_of(inputs)))
    rows_of_g = [g.reshape(batch, -1) for g in cotangents]
    # States above, below and as f is given them; results above and below, as returned and as kept, and differences.
    size = sum(count * t.numel() * t.element_size() for count, ts in ((3, inputs), (5, cotangents)) for t in ts)
    chunk = directions_per_chunk(size, memory, inputs[0].device) if batched else 1
    narrow = [precision] if precision else [g.dtype for g in cotangents]
    found: list[Tensor | None] = []
    with contained([f] if isinstance(f, nn.Module) else []), full_float32():
        base = evaluate([t.clone() for t in inputs], 1, perturbed=False) if scheme == "forward" else None
        for k, tensor in enumerate(inputs):
            if not tensor.is_floating_point():
                found.append(None)
                continue

            def run(rows: Tensor, copies: int, k: int = k, shape: torch.Size = tensor.shape[1:]) -> list[Tensor]:
                state = [t.repeat(copies, *[1] * (t.dim() - 1)) for t in inputs]  # copies, also of one
                state[k] = rows.clone().reshape(batch * copies, *shape)  # f may keep or change what it is given
                return evaluate(state, copies, perturbed=True)

            probe = Probe("elementwise" if elementwise else "coordinate", tensor.numel() // batch)
            rows = vjp_rows(
                run,
                tensor.reshape(batch, -1),
                rows_of_g,
                probe=probe,
                scheme=scheme,
                step=step,
                chunk=chunk,
                base=base,
                where=f"input {k} of {getattr(f, '__name__', type(f).__name__)}",
                precision=narrowest([tensor.dtype, *narrow]),
            )
            found.append(rows.reshape(tensor.shape))
        set_random_state(evaluate.random_state)
    return tuple(found) if isinstance(a, tuple) else found[0]


@dataclass
class _Repeatable:
    """A callable that gives the same for the same: from one random state, into memory of our own."""

    f: Callable[..., Any]
    cotangents: tuple[Tensor, ...]
    batch: int
    random_state: RandomState
    random: bool = False  # it was seen to draw random numbers

    def __call__(self, state: Sequence[Tensor], copies: int, perturbed: bool) -> list[Tensor]:
        outputs = None if self.random else self.once(state, self.batch * copies)
        if outputs is None or self.random:  # the numbers of a larger batch are others: copy by copy, then
            parts = [
                self.once([t.narrow(0, k * self.batch, self.batch) for t in state], self.batch) for k in range(copies)
            ]
            outputs = [torch.cat(part) for part in zip(*parts, strict=True)]
        if perturbed:
            count = self.batch * copies
            counting.add(queries=count, stage_evaluations=count, forward_equivalents=copies)
        else:
            counting.add(base_evaluations=self.batch)
        return outputs

    def once(self, state: Sequence[Tensor], samples: int) -> list[Tensor]:
        set_random_state(self.random_state)
        outputs = tensors_in(self.f(*state))
        after = random_state(devices_of(state))
        self.random = any(not torch.equal(after[k], before) for k, before in self.random_state.items())
        _check_outputs(outputs, self.cotangents, samples)
        # A copy: a simulator may use its memory again for the next result.
        return [output.detach().clone().reshape(samples, -1) for output in outputs]


def _check_vjp_arguments(inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...], elementwise: bool) -> int:
    if not any(t.is_floating_point() for t in inputs):
        kinds = ", ".join(str(t.dtype) for t in inputs)
        raise InputError(f"expected a floating input to perturb, got {kinds}; embed integers first, in their own stage")
    sizes = {tuple(t.shape[:1]) for t in (*inputs, *cotangents)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        shapes = [tuple(t.shape) for t in (*inputs, *cotangents)]
        raise InputError(f"expected inputs and cotangents with one batch size ≥ 1 in dimension 0, got shapes {shapes}")
    if elementwise and len({tuple(t.shape) for t in (*inputs, *cotangents)}) != 1:
        shapes = [tuple(t.shape) for t in (*inputs, *cotangents)]
        raise InputError(f"elementwise=True expects inputs and cotangents of one shape, got {shapes}; leave it out")
    if any(t.is_floating_point() and bool(t.isnan().any()) for t in inputs):
        raise NonFiniteError("an input holds NaN")
    if not all(bool(g.isfinite().all()) for g in cotangents):
        raise NonFiniteError("g holds NaN or infinity")
    return int(inputs[0].shape[0])


def _check_outputs(outputs: list[Tensor], cotangents: tuple[Tensor, ...], batch: int) -> None:
    expected = [(batch, *g.shape[1:]) for g in cotangents]
    got = [tuple(output.shape) for output in outputs]
    if expected != got:
        raise InputError(
            f"expected outputs of shape {expected} for {batch} samples (the cotangents' shapes), got {got}; a callable "
            "that cannot take a larger batch says batched=False"
        )

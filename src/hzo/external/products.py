"""Products with the Jacobian of one call of a part: from the left (VJP) and from the right (JVP)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from hzo.errors import (
    FailedSamplesWarning,
    InaccurateGradientWarning,
    InputError,
    NonFiniteError,
    QueryError,
    StepError,
)
from hzo.execution import counting
from hzo.external.call import BoxCall, named_samples
from hzo.external.granularity import measured_step
from hzo.external.promises import check_copies, check_promise
from hzo.external.queries import BoxSweep
from hzo.external.sites import Site, SiteMethod, method_of, site_of
from hzo.external.steps import MEASURED
from hzo.finite_differences import (
    Probe,
    Stencil,
    accumulation_dtype,
    coarse_steps,
    decode,
    element_scale,
    evaluations,
    of_one_sign,
    stencil,
)

SUSPECT = 0.1  # error estimate above which a gradient is said to be inaccurate


def box_vjp(
    call: BoxCall, leaves: Sequence[Tensor], many: Sequence[Sequence[Tensor | None]], wanted: Sequence[bool]
) -> list[list[Tensor | None]]:
    """For several lists of cotangents (one for each output, None for zero) the cotangents of the leaves that are
    wanted.

    Cost: that of ``call``'s plan for each leaf; several lists cost as much as one. Source: as ``vjp_rows``.
    """
    rows_of = [[None if g is None else _cotangent(call, o, g) for o, g in enumerate(given)] for given in many]
    outputs = [o for o in range(len(call.base)) if any(_moves(g[o]) for g in rows_of)]
    nothing: list[list[Tensor | None]] = [[None for _ in leaves] for _ in many]
    if not outputs:
        return nothing
    sweep = BoxSweep(call, leaves, outputs)
    cotangents = [[_filled(call, g[o], o) for o in outputs] for g in rows_of]
    _leave_out(call, sweep, cotangents, outputs)
    counted = [k for k, flag in enumerate(wanted) if flag and leaves[k].numel()]
    with call.queries(leaves):
        if not call.guard.noisy:
            call.check_repeats(leaves)
        remembered = {k: _that_read(call, sweep, k) for k in counted if k >= call.count + len(call.parameters)}
        counted = [k for k in counted if remembered.get(k, True)]
        steps, bounds = settings_of(call, leaves)
        _measure(call, sweep, counted, steps, bounds)
        found: list[list[Tensor | None]] = [[None for _ in leaves] for _ in many]
        moving = that_move(call, sweep, steps, bounds) if any(not sweep._apart(o) for o in outputs) else outputs
        for k in counted:
            sweep.outputs = remembered.get(k, moving if k < call.count else outputs)
            if not sweep.outputs:
                continue
            given = [[g for g, o in zip(c, outputs, strict=True) if o in sweep.outputs] for c in cotangents]
            site = site_of(call, leaves, k, sweep.outputs)
            for v, gradient in enumerate(_without_the_dead(sweep, site, given, steps[k], bounds[k])):
                found[v][k] = _finished(sweep, site, gradient, leaves[k])
    _judge(call, sweep)
    if bool(sweep.dead.any()):
        _drop(call, sweep, found)
    return found


def _moves(g: Tensor | None) -> bool:
    return g is not None and bool(g.any())


def settings_of(call: BoxCall, leaves: Sequence[Tensor]) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """Steps and bounds of the leaves; those of parameters and of state are found, unless one step is for all."""
    count = call.count
    shapes = [
        tuple(t.shape[1:] if flag and call.layout.batched else t.shape)
        for t, flag in zip(leaves, call.layout.leaves, strict=True)
    ]
    names = [name.removeprefix("input ") for name in call.names[:count]]
    moving = [k for k in range(count) if leaves[k].is_floating_point() or leaves[k].is_complex()]
    steps: list[Any] = [None] * len(leaves)
    bounds: list[tuple[Any, Any]] = [(None, None)] * len(leaves)
    found = call.settings.steps.of([names[k] for k in moving], [shapes[k] for k in moving])
    pairs = call.settings.bounds.of([names[k] for k in moving], [shapes[k] for k in moving])
    for k, step, pair in zip(moving, found, pairs, strict=True):
        steps[k], bounds[k] = step, pair
    one = call.settings.steps.given
    if isinstance(one, (int, float, str)):
        steps[count:] = [one] * (len(leaves) - count)
    return steps, bounds


def _cotangent(call: BoxCall, output: int, g: Tensor) -> Tensor:
    """(rows, m), real."""
    if call.complex[output] and not g.is_complex():
        g = g.to(torch.complex128 if g.dtype == torch.float64 else torch.complex64)
    real = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
    return real.reshape(call.base[output].shape)


def _filled(call: BoxCall, g: Tensor | None, output: int) -> Tensor:
    base = call.base[output]
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    if g is None:
        return torch.zeros(base.shape, dtype=wide, device=base.device)
    return g.to(accumulation_dtype(g.dtype) if g.dtype == torch.float64 else wide)


def _leave_out(call: BoxCall, sweep: BoxSweep, cotangents: list[list[Tensor]], outputs: Sequence[int]) -> None:
    """What failed in the forward pass carries nothing back; else that is an error."""
    failed, leaves_out = call.failed, call.settings.on_failure == "zero"
    lost = torch.zeros(call.layout.batch, dtype=torch.bool, device="cpu")
    used = torch.zeros_like(lost)
    for k, o in enumerate(outputs):
        base, apart = call.base[o], sweep._apart(o)
        if leaves_out and failed is not None and apart:
            for given in cotangents:
                given[k] = torch.where(failed[:, None].to(given[k].device), torch.zeros_like(given[k]), given[k])
        matters = torch.stack([given[k] != 0 for given in cotangents]).any(0)
        wrong = (matters & ~base.isfinite()).any(1).cpu()
        lost |= wrong if apart else wrong.any()
        used |= matters.any(1).cpu() if apart else matters.any().cpu()
        sweep.matters[o] = matters
    if bool(lost.any()) and not (leaves_out and not call.layout.batched):
        which = f" for {named_samples(lost)}" if call.layout.batched else ""
        raise NonFiniteError(
            f"{call.guard} returned NaN or infinity{which} in the forward pass, and the loss depends on it; leave it "
            "out of the loss (torch.where, a mask), or out of gradient and output: hzo.blackbox(f, on_failure='zero')"
        )
    if failed is not None:
        sweep.without(failed.cpu() & ~used if len(failed) == len(used) else failed)


def _without_the_dead(
    sweep: BoxSweep, site: Site, cotangents: Sequence[Sequence[Tensor]], step: Any, bounds: tuple[Any, Any]
) -> list[Tensor]:
    """As ``_along``. What all samples share is asked again where one of them diverged on the way: its part in the sum
    is known by no other means.
    """
    while True:
        before = sweep.dead.clone()
        if not site.apart and bool(before.any()):
            dead = before[:, None]
            cotangents = [
                [
                    torch.where(dead.to(g.device), torch.zeros_like(g), g) if sweep._apart(o) else g
                    for g, o in zip(given, sweep.outputs, strict=True)
                ]
                for given in cotangents
            ]
        found = _along(sweep, site, cotangents, step, bounds)
        if site.apart or not sweep.call.layout.batched or torch.equal(before, sweep.dead):
            return found


def _along(
    sweep: BoxSweep, site: Site, cotangents: Sequence[Sequence[Tensor]], step: Any, bounds: tuple[Any, Any]
) -> list[Tensor]:
    """(rows, n) for each list of cotangents."""
    call, settings = sweep.call, sweep.call.settings
    rows = sweep.rows(site)
    shaped = [[g.reshape(site.rows if site.apart else 1, -1) for g in given] for given in cotangents]
    method = method_of(call, site, sweep.outputs, call.sample_shapes(sweep.outputs, site.apart))
    check_promise(sweep, site, method, rows, step, bounds)
    if method.how == "reindexing":
        return _copied(sweep, site, rows, shaped)
    if method.how == "symmetric":
        return [_directional(sweep, site, rows, given[0], step, bounds)[0] for given in shaped]
    if settings.mu is None:
        sweep.watching = (step is None or settings.max_error is not None) and not method.alike
        return _vjp_at(sweep, site, method, rows, shaped, step, bounds, None)
    generator = torch.Generator("cpu").manual_seed(call.seed + site.index)
    total: list[Tensor] | None = None
    for _ in range(settings.draws):
        u = torch.randn(rows.shape, generator=generator, dtype=torch.float64, device="cpu").to(rows)
        at = rows + settings.mu * u
        base = None
        if settings.scheme == "forward":
            with counting.doing(f"a query at a random point of {site.name}"):
                base = [t[0] for t in sweep.run(site, at.unsqueeze(0))]
        found = _vjp_at(sweep, site, method, at, shaped, step, bounds, base or [])
        total = found if total is None else [t + f for t, f in zip(total, found, strict=True)]
    assert total is not None
    return [t / settings.draws for t in total]


def _vjp_at(
    sweep: BoxSweep,
    site: Site,
    method: SiteMethod,
    rows: Tensor,
    cotangents: Sequence[Sequence[Tensor]],
    step: Any,
    bounds: tuple[Any, Any],
    moved_base: list[Tensor] | None,
) -> list[Tensor]:
    places = _far(sweep, site, rows, bounds) if method.alike else sweep.stencil(site, rows, step, bounds)
    cautious = None
    own = step is None and sweep.call.settings.mu is None and not method.alike
    if own:
        _check_unit(sweep, site, rows, places)
    if own and method.how in ("coordinate", "elementwise"):
        coarse = coarse_steps(rows, sweep.call.settings.scheme, sweep.precision(site))
        cautious = (places.upper - places.lower).abs() * 2 < coarse.to(rows.dtype)
    if cautious is None or not bool(cautious.any()):
        return _weighted(sweep, site, method, rows, cotangents, places, moved_base)[0]
    found, moved = _weighted(sweep, site, method, rows, cotangents, places, moved_base, resolved=True)
    still = cautious & ~moved
    if not bool(still.any()):
        return found
    # Small beside others for whatever reason, and the part does not see so small a step: take a longer one.
    low, high = bounds
    if of_one_sign(rows):
        low, high = (
            (0.0 if low is None else low, high) if bool((rows > 0).all()) else (low, 0.0 if high is None else high)
        )
    again = sweep.stencil(site, rows, None, (low, high), torch.where(still, coarse, torch.zeros_like(coarse)))
    ranges = None if method.how == "elementwise" else _ranges(still.any(0))
    longer, _ = _weighted(sweep, site, method, rows, cotangents, again, moved_base, ranges=ranges)
    return [torch.where(still, b, a) for a, b in zip(found, longer, strict=True)]


_SHORTER = 8.0  # than the step of queries


def _check_unit(sweep: BoxSweep, site: Site, rows: Tensor, places: Stencil) -> None:
    """Zeros say nothing of the unit in which an element is counted: do they stand where the part moves by their step?

    All elements that are zero in every sample go up and down by their steps, then by an eighth of these. Of a part that
    is smooth on the scale of a step differences shrink as steps do; where they shrink less, the slope is that of a
    place far away. Tried the first time that an input has such elements; costs four evaluations, as checks.

    Raises:
        StepError: the error exceeds ``max_error``; else it is warned of.
    """
    call = sweep.call
    key = ("unit", call.names[site.index], site.shape)
    p, q = places.upper - rows, rows - places.lower
    zero = ((rows == 0) & ((p - q).abs() <= 1e-3 * p.abs())).all(0)  # beside a bound there is one side only
    if not bool(zero.any()) or key in call.known or sweep.call.settings.scheme == "forward":
        return
    call.known[key] = True
    sign = torch.randint(0, 2, rows.shape, generator=torch.Generator().manual_seed(site.index)) * 2 - 1
    moved = torch.where(zero, p * sign.to(p), torch.zeros_like(p))

    def gap(share: float) -> list[Tensor]:
        above, below = (sweep.run(site, (rows + way * share * moved).unsqueeze(0)) for way in (1, -1))
        return [a[0].double() - b[0].double() for a, b in zip(above, below, strict=True)]

    with counting.as_checks(), counting.doing(f"the test whether a step suits the zeros of {site.name}"):
        long, short = gap(1), gap(1 / _SHORTER)
    rounding = sum(
        float((8 * torch.finfo(b.dtype).eps * b.double().nan_to_num(0, 0, 0)).square().sum()) for b in sweep.base(site)
    )
    one, two = (sum(float(t.square().sum()) for t in parts) ** 0.5 for parts in (long, short))
    error = 1 - one / (_SHORTER * (two - rounding**0.5)) if two > rounding**0.5 else 0.0
    limit = call.settings.max_error
    if error <= (SUSPECT if limit is None else limit):
        return
    text = (
        f"the gradient of {call.guard} is inaccurate: {site.name} has {int(zero.sum())} elements that are zero, which "
        f"says nothing of their unit, and within the steps of {float(p[:, zero].max()):.3g} that were taken the "
        f"derivative changes by about {error:.0%}. Say how far to step: step= (a number, or one for each element)"
    )
    if limit is not None:
        raise StepError(f"{text}; max_error={limit:g} does not allow it")
    warnings.warn(text, InaccurateGradientWarning, stacklevel=2)


def _ranges(chosen: Tensor) -> list[tuple[int, int]]:
    """Runs of chosen places."""
    places = chosen.nonzero().flatten().tolist()
    found: list[tuple[int, int]] = []
    for k in places:
        if found and found[-1][1] == k:
            found[-1] = (found[-1][0], k + 1)
        else:
            found.append((k, k + 1))
    return found


def _weighted(
    sweep: BoxSweep,
    site: Site,
    method: SiteMethod,
    rows: Tensor,
    cotangents: Sequence[Sequence[Tensor]],
    places: Stencil,
    moved_base: list[Tensor] | None,
    *,
    resolved: bool = False,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """(rows, n) for each list of cotangents, and whether the part moved by more than its rounding with each element."""
    one_place = sweep.call.settings.scheme == "forward" or method.alike
    base = sweep.base(site)
    double = any(t.dtype == torch.float64 for t in (rows, *base, *(g for given in cotangents for g in given)))
    sums = [torch.zeros(rows.shape, dtype=torch.float64 if double else torch.float32, device=rows.device)
            for _ in cotangents]  # fmt: skip
    others = [torch.zeros_like(s) for s in sums]
    moved = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    for start, stop, one, _, two, _ in sweep.differences(site, method, rows, places, moved_base, ranges):
        if sweep.call.unlike is not None and not method.alike:
            sweep.note_unlike(one, cotangents[0])
        if resolved:
            _note_moved(site, method, start, stop, one, base, moved)
        _decode(site, method, start, stop, one, cotangents, sums)
        if two is not None:
            _decode(site, method, start, stop, two, cotangents, others)
    weight = places.weight
    if one_place:
        weight = 1 / (places.upper.to(weight.dtype) - rows.to(weight.dtype))
    if method.alike:
        weight = weight[:1]
    if one_place or places.paired:
        return [s * weight for s in sums], moved
    return [s * weight + o * places.other for s, o in zip(sums, others, strict=True)], moved


def _note_moved(
    site: Site,
    method: SiteMethod,
    start: int,
    stop: int,
    differences: Sequence[Tensor],
    base: Sequence[Tensor],
    moved: Tensor,
) -> None:
    """Mark elements for which some output moved by a hundred roundings of itself."""
    for d, b in zip(differences, base, strict=True):
        seen = d.abs() > 100 * torch.finfo(b.dtype).eps * b.abs().to(d.dtype)
        if method.how == "elementwise":
            for k in range(start, stop):
                moved[:, k :: site.pairs] |= (
                    seen[k - start].reshape(len(moved), moved.shape[1] // site.pairs, -1).any(-1)
                )
        else:
            moved[:, start:stop] |= seen.any(-1).T


def _decode(
    site: Site,
    method: SiteMethod,
    start: int,
    stop: int,
    differences: Sequence[Tensor],
    cotangents: Sequence[Sequence[Tensor]],
    into: Sequence[Tensor],
) -> None:
    for given, total in zip(cotangents, into, strict=True):
        products = [(d.expand(-1, len(g), -1).to(total.dtype, copy=True), g.to(total.dtype))
                    for d, g in zip(differences, given, strict=True)]  # fmt: skip
        if method.how == "elementwise":
            for k in range(start, stop):
                summed = None
                for d, g in products:
                    product = (d[k - start] * g).reshape(len(g), total.shape[1] // site.pairs, -1).sum(-1)
                    summed = product if summed is None else summed + product
                assert summed is not None
                total[:, k :: site.pairs] = summed
            continue
        coordinate = Probe("coordinate", site.elements)
        probe = coordinate if method.coloring is None else Probe("colored", site.elements, coloring=method.coloring)
        decode(probe, start, stop, products, total)


def _far(sweep: BoxSweep, site: Site, rows: Tensor, bounds: tuple[Any, Any]) -> Stencil:
    """Of an affine part a step is as good as it is long."""
    scale = element_scale(rows)
    low, high = (None if b is None else sweep.expanded(site, b, rows).to(rows.dtype) for b in bounds)
    return stencil(rows, scale, "forward", site.name, low=low, high=high)


def _copied(sweep: BoxSweep, site: Site, rows: Tensor, cotangents: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What copies places tells where from, when it is given their numbers."""
    count = site.elements
    if count >= 2 / torch.finfo(rows.dtype).eps:
        raise InputError(f"{site.name} has more elements than {rows.dtype} can count; promise less than 'reindexing'")
    numbers = torch.arange(1, count + 1, dtype=rows.dtype, device=rows.device).view(1, 1, -1)
    with counting.doing(f"the query for the places of {site.name}"):
        (origin,) = sweep.run(site, numbers, 0)
    places = origin.flatten().round().long()
    check_copies(sweep, site, rows, places)
    found = []
    for (g,) in cotangents:
        sums = torch.zeros(len(g), count + 1, dtype=g.dtype, device=g.device)
        found.append(sums.index_add_(1, places, g)[:, 1:])
    return found


def _finished(sweep: BoxSweep, site: Site, gradient: Tensor, leaf: Tensor) -> Tensor:
    if not bool(gradient.isfinite().all()):
        raise NonFiniteError(f"the gradient of {site.name} is NaN or infinite; the cotangent that came in may be, too")
    shaped = gradient.reshape(site.rows, *site.shape) if site.apart else gradient.reshape(site.shape)
    if leaf.is_complex():
        return torch.view_as_complex(shaped.contiguous()).to(leaf.dtype)
    if site.apart and sweep.failed is not None:
        shaped = shaped.clone()
        shaped[sweep.failed.to(shaped.device)] = 0
    return shaped.to(leaf.dtype)


def _warn_of_dead(call: BoxCall, dead: Tensor) -> None:
    which = f"{named_samples(dead)} of {len(dead)}" if call.layout.batched else "a call"
    warnings.warn(
        f"{call.guard}: {which} came out as NaN or infinity in a query, and is left out of the gradient",
        FailedSamplesWarning,
        stacklevel=2,
    )


def _drop(call: BoxCall, sweep: BoxSweep, found: list[list[Tensor | None]]) -> None:
    """Samples that diverged in a query have no gradient."""
    dead = sweep.dead
    _warn_of_dead(call, dead)
    for gradients in found:
        for k, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if call.layout.leaves[k] and call.layout.batched:
                gradient[dead.to(gradient.device)] = 0
            elif not call.layout.batched:
                gradient.zero_()


def _that_read(call: BoxCall, sweep: BoxSweep, k: int) -> list[int]:
    """Of the outputs that count those that may depend on a number of the state: many remember what they never read.

    None do where nothing at all changes with it, the state that is left behind included.
    """
    leaf = sweep.leaves[k]
    scale = float(leaf.abs().max()) if leaf.numel() else 0.0
    generator = torch.Generator("cpu").manual_seed(0)
    counting.add(check_evaluations=call.layout.batch)
    noise = torch.rand(leaf.shape, generator=generator, dtype=torch.float64, device="cpu").to(leaf)
    given = list(sweep.leaves)
    given[k] = leaf + (scale or 1.0) * (0.5 + noise) / 2
    try:
        with counting.doing(f"the test whether it depends on its {call.names[k]}"):
            moved = call.evaluate(given)
    except QueryError:  # far from where it was, it may not run
        return list(sweep.outputs)
    same = [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(moved, call.base, strict=True)]
    return [] if all(same) else [o for o in sweep.outputs if sweep._apart(o) or not same[o]]


def that_move(call: BoxCall, sweep: BoxSweep, steps: Sequence[Any], bounds: Sequence[tuple[Any, Any]]) -> list[int]:
    """Outputs without those that belong to all samples and do not depend on the arguments: a clock, a counter of steps.

    Else every element of every sample would have to be moved by itself to learn that nothing comes of it.
    """
    if not call.layout.batched:
        return list(sweep.outputs)
    given = list(sweep.leaves)
    for k in range(call.count):
        if not (given[k].is_floating_point() or given[k].is_complex()):
            continue
        site = site_of(call, sweep.leaves, k, [])
        step = None if isinstance(steps[k], str) else steps[k]
        rows = sweep.rows(site)
        moved = sweep.stencil(site, rows, step, bounds[k]).upper
        given[k] = sweep._leaf(site, moved)
    counting.add(check_evaluations=call.layout.batch)
    with counting.doing("the test what depends on its arguments"):
        found = call.evaluate(given)
    return [o for o in sweep.outputs if sweep._apart(o) or not torch.equal(found[o], call.base[o])]


# ---- is it accurate --------------------------------------------------------------------------------------------------


def _judge(call: BoxCall, sweep: BoxSweep) -> None:
    """Say by name that a gradient is not to be trusted, or refuse it."""
    error = max(sweep.error, sweep.measured_error)
    limit = call.settings.max_error
    if sweep.unlike > (SUSPECT if limit is None else limit):
        _say_noisy(call, sweep.unlike)
        return
    if limit is not None and error > limit:
        raise StepError(f"{_doubt(call, error)} max_error={limit:g} does not allow it")
    if limit is None and error > SUSPECT and not call.known.get("warned"):
        call.known["warned"] = True
        warnings.warn(_doubt(call, error), InaccurateGradientWarning, stacklevel=2)


def _say_noisy(call: BoxCall, share: float) -> None:
    text = (
        f"the gradient of {call.guard} is inaccurate: two calls at the same input differed, by {share:.0%} of "
        "what its queries showed. If that is the noise of a measurement, say so, and steps and repeats are planned for "
        "it: noise='measured'. If it is a solver's tolerance, go further: step='measured'"
    )
    if call.settings.max_error is not None:
        raise StepError(f"{text}; max_error={call.settings.max_error:g} does not allow it")
    if not call.known.get("warned of noise"):
        call.known["warned of noise"] = True
        warnings.warn(text, InaccurateGradientWarning, stacklevel=3)


def _doubt(call: BoxCall, error: float) -> str:
    much = f"its error is about {error:.0%} within the steps that were taken"
    if error == inf:
        much = "nothing of what it returned moved with its input, or differences agreed at no two lengths of step"
    return (
        f"the gradient of {call.guard} is inaccurate: {much}. Is it piecewise "
        "constant, computed in a narrower dtype inside, or solved to a tolerance? step='measured' measures how far to "
        "go; step=quantum / 2 is right for a converter, mu= for a threshold;"
    )


def _measure(
    call: BoxCall,
    sweep: BoxSweep,
    counted: Sequence[int],
    steps: Sequence[Any],
    bounds: Sequence[tuple[Any, Any]],
) -> None:
    """Steps from what the part does at many lengths of them, once for each input."""
    for k in counted:
        if isinstance(steps[k], str) and steps[k] == MEASURED:
            known = call.known.setdefault("steps", {})
            if call.names[k] not in known:
                known[call.names[k]] = measured_step(sweep, site_of(call, sweep.leaves, k, sweep.outputs), bounds[k])
            sweep.measured_error = max(sweep.measured_error, known[call.names[k]].error)


# ---- JVP -------------------------------------------------------------------------------------------------------------


def jvp(call: BoxCall, leaves: Sequence[Tensor], many: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor]]:
    """For several changes of the leaves the change of every output, real, (rows, m).

    Cost: two evaluations of the batch for each leaf, four where its tangent is of very different sizes; where steps
    were given, as many as a VJP, so that the two agree.
    """
    outputs = list(range(len(call.base)))
    sweep = BoxSweep(call, leaves, outputs)
    found = []
    steps, bounds = settings_of(call, leaves)
    with call.queries(leaves):
        if not call.guard.noisy:
            call.check_repeats(leaves)
        _measure(call, sweep, [k for k in range(len(leaves)) if any(t[k] is not None for t in many)], steps, bounds)
        for tangents in many:
            total = [
                torch.zeros(
                    b.shape, dtype=torch.float64 if b.dtype == torch.float64 else torch.float32, device=b.device
                )
                for b in call.base
            ]
            for k, tangent in enumerate(tangents):
                if tangent is None or not bool(tangent.any()):
                    continue
                site = site_of(call, leaves, k, outputs)
                rows = sweep.rows(site)
                v = torch.view_as_real(tangent.resolve_conj()) if tangent.is_complex() else tangent
                own = call.settings.mu is None and steps[k] is None
                along = _directional if own else _columns
                parts = along(sweep, site, rows, v.reshape(site.rows, -1), steps[k], bounds[k])
                total = [t + p.reshape(t.shape) for t, p in zip(total, parts, strict=True)]
            found.append(total)
    if call.settings.on_failure == "zero":
        _still(call, sweep, found)
    return found


def _still(call: BoxCall, sweep: BoxSweep, found: Sequence[Sequence[Tensor]]) -> None:
    """Samples that failed are zero whatever the tangent."""
    gone = sweep.dead if call.failed is None or len(call.failed) != len(sweep.dead) else sweep.dead | call.failed.cpu()
    if bool(sweep.dead.any()):
        _warn_of_dead(call, sweep.dead)
    for changes in found:
        for o, change in enumerate(changes):
            if sweep._apart(o) and call.layout.batched:
                change[gone.to(change.device)] = 0
            elif not call.layout.batched and bool(gone.any()):
                change.zero_()


def _columns(sweep: BoxSweep, site: Site, rows: Tensor, v: Tensor, step: Any, bounds: tuple[Any, Any]) -> list[Tensor]:
    """Column by column, as a VJP takes them."""
    call, settings = sweep.call, sweep.call.settings
    method = method_of(call, site, sweep.outputs, call.sample_shapes(sweep.outputs, site.apart))
    if method.how != "elementwise" or method.alike:
        method = SiteMethod("coordinate", site.elements, evaluations(settings.scheme), call.layout.batch)
    draws = settings.draws if settings.mu is not None else 1
    generator = torch.Generator("cpu").manual_seed(call.seed + site.index)
    total: list[Tensor] | None = None
    for _ in range(draws):
        at, base = rows, None
        if settings.mu is not None:
            at = rows + settings.mu * torch.randn(
                rows.shape, generator=generator, dtype=torch.float64, device="cpu"
            ).to(rows)
            base = [t[0] for t in sweep.run(site, at.unsqueeze(0))] if settings.scheme == "forward" else []
        places = sweep.stencil(site, at, step, bounds)
        weight = places.weight
        if settings.scheme == "forward":
            weight = 1 / (places.upper.to(weight.dtype) - at.to(weight.dtype))
        for start, stop, one, _, two, _ in sweep.differences(site, method, at, places, base):
            sums = []
            for j, d in enumerate(one):
                if method.how == "elementwise":
                    part = sum(
                        d[k - start].reshape(len(d[0]), v.shape[1] // site.pairs, -1)
                        * (v * weight)[:, k :: site.pairs].unsqueeze(-1)
                        for k in range(start, stop)
                    )
                    assert isinstance(part, Tensor)
                    sums.append(part.reshape(d.shape[1], -1))
                    continue
                factor = (v * weight)[:, start:stop].T.unsqueeze(-1).to(d.dtype)
                made = (d * factor).sum(0)
                if two is not None:
                    made = made + (two[j] * (v * places.other)[:, start:stop].T.unsqueeze(-1).to(d.dtype)).sum(0)
                sums.append(made)
            total = sums if total is None else [t + s for t, s in zip(total, sums, strict=True)]
    assert total is not None
    return [t / draws for t in total]


def _directional(
    sweep: BoxSweep, site: Site, rows: Tensor, v: Tensor, step: Any, bounds: tuple[Any, Any]
) -> list[Tensor]:
    """Along the direction itself, each element moved by at most its own step; in two groups where sizes differ much."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in (rows, *sweep.base(site))) else torch.float32
    places = sweep.stencil(site, rows, step, bounds)
    p, q = (t.to(wide) - rows.to(wide) for t in (places.upper, places.lower))
    v = v.to(wide)
    length = torch.minimum(p.abs(), torch.where(q == 0, p, q).abs())
    sided = (p > 0) == (q > 0)
    sided &= q != 0
    forward = sweep.call.settings.scheme == "forward"
    if forward and bounds != (None, None):
        sided[:] = True
    ratio = torch.where(v != 0, v.abs() / length, torch.zeros_like(v))
    largest = ratio.amax(1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    apart = 4.0 if torch.finfo(rows.dtype).eps < 1e-10 else 2.0  # decades that rounding lets stand in one group
    smaller = (largest / ratio.clamp(min=torch.finfo(wide).tiny)).log10()
    decades = torch.where(v != 0, (smaller / apart).floor().clamp(0, 1), -1.0)
    # Beside a bound an element may move one way only; those that the tangent moves that way go together.
    way = torch.where(sided, torch.sign(p) * torch.sign(v), torch.zeros_like(v))
    base = sweep.base(site)
    total = [torch.zeros((site.rows if site.apart else 1, w), dtype=wide, device=rows.device)
             for w in sweep.widths(site)]  # fmt: skip
    for decade in set(decades.flatten().tolist()):
        for direction in (0.0, 1.0, -1.0):
            chosen = (decades == decade) & (way == direction) & (v != 0)
            if not bool(chosen.any()):
                continue
            part = torch.where(chosen, v, torch.zeros_like(v))
            h = 1 / torch.where(chosen, ratio, torch.zeros_like(v)).amax(1, keepdim=True).clamp(
                min=torch.finfo(wide).tiny
            )
            h = torch.where(chosen.any(1, keepdim=True), h, torch.zeros_like(h))
            first, second = (direction or 1.0) * h, (2 * direction if direction else -1.0) * h
            with counting.doing(f"queries along a direction of {site.name}, first"):
                one = sweep.run(site, (rows + first * part).to(rows.dtype).unsqueeze(0))
            if forward:
                two, w1, w2 = None, 1 / first, None
            else:
                with counting.doing(f"queries along a direction of {site.name}, second"):
                    two = sweep.run(site, (rows + second * part).to(rows.dtype).unsqueeze(0))
                w1, w2 = -second / (first * (first - second)), -first / (second * (second - first))
            for k, b in enumerate(base):
                change = w1 * (one[k][0].to(wide) - b.to(wide))
                if two is not None:
                    assert w2 is not None
                    change = change + w2 * (two[k][0].to(wide) - b.to(wide))
                total[k] += torch.where(h > 0, change, torch.zeros_like(change))
    return total

"""The queries of one backward pass through a part: perturbed inputs in, differences of its results out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from hzo.distributed import shares
from hzo.errors import NonFiniteError
from hzo.execution import counting
from hzo.external.call import BoxCall, named_samples
from hzo.external.sites import Site, SiteMethod, sample_shape
from hzo.finite_differences import (
    Probe,
    States,
    Stencil,
    accumulation_dtype,
    directions_per_chunk,
    element_scale,
    element_steps,
    narrowest,
    stencil,
)


class BoxSweep:
    """The queries of one backward pass: what they have in common, and what they found out on the way."""

    def __init__(self, call: BoxCall, leaves: Sequence[Tensor], outputs: Sequence[int]) -> None:
        self.call = call
        self.leaves = [t.detach() for t in leaves]
        self.outputs = list(outputs)
        # For each output the numbers that have a cotangent; others may be NaN or infinite, as masks are.
        self.matters = {o: call.base[o].isfinite() for o in self.outputs}
        self.failed: Tensor | None = None
        self.dead = torch.zeros(call.layout.batch, dtype=torch.bool, device="cpu")  # samples that diverged in a query
        self.second = self.first = 0.0  # sums of squares: of second and of first differences
        self.watching = False  # steps of this site are hzo's own choice, and so is their error
        self.noted = False
        self.measured_error = 0.0
        self.unlike = 0.0  # what two equal calls differed by, beside the differences of queries; the worst of all sites

    def rows(self, site: Site) -> Tensor:
        leaf = self.leaves[site.index]
        return (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).reshape(site.rows, -1)

    def widths(self, site: Site) -> list[int]:
        bases = self._bases()
        rows = self.call.layout.batch
        return [bases[o].shape[1] * (rows if self._apart(o) and not site.apart else 1) for o in self.outputs]

    def _bases(self) -> list[Tensor]:
        return self.call.base

    def _apart(self, output: int) -> bool:
        return self.call.layout.outputs[output]

    def base(self, site: Site) -> list[Tensor]:
        """(rows, m) of the outputs that count, as the forward pass left them."""
        found = [self._bases()[o].reshape(site.rows, -1) for o in self.outputs]
        # What is NaN or infinite here has no cotangent, and is zero in queries, too.
        return [t if bool(t.sum().isfinite()) else t.nan_to_num(0.0, 0.0, 0.0) for t in found]

    def run(self, site: Site, moved: Tensor, sample: int | None = None) -> list[Tensor]:
        """(copies, rows, m) of the outputs that count, for copies (copies, rows, n) of a site's rows.

        Args:
            sample: one of the batch, of which alone the copies are.
        """
        among = shares()
        if among is None or len(moved) < among.size("query"):
            results = self._answers(site, moved, sample)
        else:  # processes that share the queries ask some each, and tell each other
            first, stop = among.part(len(moved))
            own = self._answers(site, moved[first:stop], sample)
            results = among.joined(own, len(moved), f"{self.call.guard}, {site.name}")
        self.check(results)
        return results

    def _answers(self, site: Site, moved: Tensor, sample: int | None) -> list[Tensor]:
        call, copies = self.call, len(moved)
        counting_rows = copies * (1 if sample is not None else call.layout.batch)
        with counting.under_way(counting_rows):
            counting.add(
                queries=counting_rows,
                stage_evaluations=counting_rows,
                forward_equivalents=copies if sample is None else 0,
                boxes=[call.guard.name],
            )
            return self._run_copies(site, moved) if sample is None else self._run_rows(site, moved, sample)

    def _run_copies(self, site: Site, moved: Tensor) -> list[Tensor]:
        """The whole batch many times, in one call where the part takes any number of samples."""
        call, copies = self.call, len(moved)
        if site.apart and call.folds and call.guard.pool is None:
            given = [
                self._leaf(site, moved.flatten(0, 1)) if k == site.index
                else t.repeat(copies, *[1] * (t.dim() - 1)) if call.layout.leaves[k] else t
                for k, t in enumerate(self.leaves)
            ]  # fmt: skip
            found = call.evaluate(given, copies)
            return [found[o].reshape(copies, site.rows, -1) for o in self.outputs]
        many = [
            [self._leaf(site, moved[c]) if k == site.index else t for k, t in enumerate(self.leaves)]
            for c in range(copies)
        ]
        several = call.evaluate_all(many)
        return [torch.cat([r[o].reshape(1, site.rows, -1) for r in several]) for o in self.outputs]

    def _run_rows(self, site: Site, moved: Tensor, sample: int) -> list[Tensor]:
        """One sample many times, packed into calls as the part takes them."""
        call, rows = self.call, moved.flatten(0, 1)
        batch, fixed = call.layout.batch, not call.folds
        size = batch if fixed else len(rows)
        found: list[list[Tensor]] = []
        for start in range(0, len(rows), size):
            cut = rows[start : start + size]
            count = len(cut)
            if fixed and count < batch:
                cut = torch.cat([cut, cut[-1:].expand(batch - count, -1)])
            given = [
                self._leaf(site, cut, len(cut)) if k == site.index
                else t[sample : sample + 1].expand(len(cut), *t.shape[1:]) if call.layout.leaves[k] else t
                for k, t in enumerate(self.leaves)
            ]  # fmt: skip
            results = call.evaluate_all([given], len(cut))[0]
            found.append([results[o][:count].reshape(count, 1, -1) for o in self.outputs])
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _leaf(self, site: Site, rows: Tensor, count: int | None = None) -> Tensor:
        """Rows as the part is given them."""
        leaf = self.leaves[site.index]
        shape = site.shape if not site.apart else (count if count is not None else rows.shape[0], *site.shape)
        made = rows.reshape(shape).clone()
        return torch.view_as_complex(made) if leaf.is_complex() else made

    def without(self, failed: Tensor) -> None:
        """Leave samples out: they carry nothing back, and what diverges takes long and need not be asked."""
        self.failed = failed.cpu()
        if not self.call.layout.batched or bool(self.failed.all()) or not bool(self.failed.any()):
            return
        good = int((~self.failed).nonzero()[0])
        for k, flag in enumerate(self.call.layout.leaves):
            if flag:
                self.leaves[k] = self.leaves[k].clone()
                self.leaves[k][failed.to(self.leaves[k].device)] = self.leaves[k][good].clone()

    def check(self, results: list[Tensor]) -> None:
        """NaN and infinity: an error, or a sample that is left out, or nobody's affair."""
        layout, bad = self.call.layout, torch.zeros(self.call.layout.batch, dtype=torch.bool, device="cpu")
        found = False
        for tensor, o in zip(results, self.outputs, strict=True):
            if bool(tensor.sum().isfinite()):  # then all of them are
                continue
            found = True
            wrong = ~tensor.isfinite() & self.matters[o].reshape(1, tensor.shape[1], -1)
            by_sample = wrong.reshape(len(tensor), layout.batch, -1) if self._apart(o) else wrong.reshape(1, 1, -1)
            bad |= by_sample.any(-1).any(0).cpu()
        if not found:
            return
        if self.failed is not None and self.failed.shape == bad.shape:
            bad &= ~self.failed
        if self.call.settings.on_failure == "zero":
            self.dead |= bad
        elif bool(bad.any()):
            which = f" for {named_samples(bad)}" if layout.batched else ""
            raise NonFiniteError(
                f"{self.call.guard}, in {counting.being_done()}, returned NaN or infinity{which}; check the part at "
                "this input, keep its steps inside where it is defined (bounds=), or leave such samples out "
                "(on_failure='zero')"
            )
        for tensor in results:
            tensor.nan_to_num_(0.0, 0.0, 0.0)

    # -- steps ---

    def stencil(
        self, site: Site, rows: Tensor, step: Any, bounds: tuple[Any, Any], least: Tensor | None = None
    ) -> Stencil:
        """The places of a site's differences around ``rows``; ``least``: what its own steps are raised to."""
        call, settings = self.call, self.call.settings
        where = site.name
        window = settings.mu is not None
        steps: Tensor | float
        if isinstance(step, str):
            window = True
            steps = call.known["steps"][call.names[site.index]].of(rows)
        elif step is None and settings.mu is not None:
            steps = settings.mu
        elif step is None:
            steps = element_steps(rows, settings.scheme, where, self.precision(site))
            steps = steps if least is None else torch.maximum(steps, least)
        else:
            window = True
            steps = self.expanded(site, step, rows)
            if settings.steps.relative:
                steps = steps * element_scale(rows)
        low, high = (None if b is None else self.expanded(site, b, rows).to(rows.dtype) for b in bounds)
        return stencil(rows, steps, settings.scheme, where, low=low, high=high, window=window)

    def precision(self, site: Site) -> torch.dtype:
        found = [site.dtype, *(self._bases()[o].dtype for o in self.outputs)]
        if self.call.autocast[1] is not None:
            found.append(self.call.autocast[1])
        return narrowest(found)

    def expanded(self, site: Site, value: Any, rows: Tensor) -> Tensor:
        """(1 or rows, n): a number or a tensor of a sample's shape, for every number of a site."""
        tensor = torch.as_tensor(value, dtype=torch.float64).to(rows.device)
        shape = sample_shape(site)
        whole = torch.broadcast_to(tensor, shape) if tensor.dim() <= len(shape) else tensor
        if site.pairs == 2:
            whole = whole.unsqueeze(-1).expand(*shape, 2)
        return whole.reshape(1, -1).to(accumulation_dtype(rows.dtype))

    # -- differences ---

    def differences(
        self,
        site: Site,
        method: SiteMethod,
        rows: Tensor,
        places: Stencil,
        moved_base: list[Tensor] | None,
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> Iterator[tuple[int, int, list[Tensor], Tensor | None, list[Tensor] | None, Tensor | None]]:
        """For chunks of directions: (start, stop, differences, weights, other differences, other weights).

        Differences are (directions, rows, m) for each output that counts; weights (rows, n) belong to elements.

        Args:
            ranges: of directions; None for all.
        """
        call, settings = self.call, self.call.settings
        sample = 0 if method.alike else None
        base = [b[:1] for b in self.base(site)] if method.alike else moved_base or self.base(site)
        wide = torch.float64 if any(t.dtype == torch.float64 for t in (rows, *base)) else torch.float32
        base = [b.to(wide) for b in base]
        upper, lower = places.upper, places.lower
        if method.alike:
            rows, upper, lower = rows[:1], upper[:1], lower[:1]
        up, down = (_states(site, method, t) for t in (rows, rows))
        width = sum(self.widths(site)) // (site.rows if method.alike else 1)
        size = (3 * rows.numel() * rows.element_size()) + 5 * max(1, width) * len(rows) * 8
        chunk = directions_per_chunk(size, settings.memory, rows.device)
        if call.most_copies is not None and not method.alike:
            chunk = min(chunk, call.most_copies)
        among = shares()
        chunk = chunk if among is None else among.least(chunk, f"{call.guard}, {site.name}")
        one_place = settings.scheme == "forward" or method.alike
        left = list(ranges or [(0, method.directions)])[::-1]
        while left:
            start, end = left.pop()
            stop = min(start + chunk, end)
            if stop < end:
                left.append((stop, end))
            asked = f"queries {start + 1} to {stop} of {method.directions} that move {site.name}"
            try:
                ways = [("up", partial(up, start, stop, upper))]
                ways += [] if one_place else [("down", partial(down, start, stop, lower))]
                above, below = self._asked(site, asked, ways, sample, wide)
            except RuntimeError as error:
                out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                if stop - start == 1 or not out_of_memory:
                    raise
                chunk = (stop - start) // 2  # the work of this chunk is done again in halves
                up, down = (_states(site, method, t) for t in (rows, rows))
                left.append((start, stop))
                continue
            if below is None:
                yield start, stop, [a - b for a, b in zip(above, base, strict=True)], None, None, None
            elif places.paired:
                if moved_base is None:
                    self._note(above, below, base)
                yield start, stop, [a - b for a, b in zip(above, below, strict=True)], places.weight, None, None
            else:
                yield (
                    start,
                    stop,
                    [a - b for a, b in zip(above, base, strict=True)],
                    places.weight,
                    [a - b for a, b in zip(below, base, strict=True)],
                    places.other,
                )

    def _asked(
        self, site: Site, asked: str, ways: Sequence[tuple[str, Callable[[], Tensor]]], sample: int | None, wide: Any
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Results above and below, of states by the names of the ways that they are moved; None where there is one."""
        if self.call.guard.pool is not None and len(ways) == 2:  # nobody there waits for the first half
            with counting.doing(f"{asked} up and down"):
                both = torch.cat([moved() for _, moved in ways])
                found = [t.to(wide) for t in self.run(site, both, sample)]
            return [t[: len(both) // 2] for t in found], [t[len(both) // 2 :] for t in found]
        results = []
        for way, moved in ways:
            with counting.doing(f"{asked} {way}"):
                results.append([t.to(wide) for t in self.run(site, moved(), sample)])
        return results[0], results[1] if len(results) == 2 else None

    def _note(self, above: Sequence[Tensor], below: Sequence[Tensor], base: Sequence[Tensor]) -> None:
        """Second differences beside first ones: of a smooth part they are smaller by a step, of noise as large."""
        if not self.watching:
            return
        self.noted = True
        for a, b, c, o in zip(above, below, base, self.outputs, strict=True):
            kept = slice(None, None, max(1, a.numel() // 2**18))  # some of many directions tell as much
            counts = self._counting(o, a.shape[1])
            first = (a[kept] - b[kept]) * counts
            second = (a[kept] + b[kept] - 2 * c) * counts
            self.first += float(first.square().sum())
            self.second += float(second.square().sum())

    def note_unlike(self, differences: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
        """How much of these differences is noise: both as the cotangents weigh them, the mean over directions."""
        assert self.call.unlike is not None
        noise = seen = 0.0
        for d, g, o in zip(differences, cotangents, self.outputs, strict=True):
            weight = g.double().reshape(1, d.shape[1], -1) if d.shape[1] * d.shape[2] == g.numel() else g.double()
            noise += float((self.call.unlike[o].reshape(weight.shape[1:]) * weight).square().sum())
            seen += float((d.double() * weight).square().sum()) / len(d)
        if noise:
            self.unlike = max(self.unlike, (noise / seen) ** 0.5 if seen else inf)

    def _counting(self, output: int, rows: int) -> Tensor:
        """(rows, m): the numbers of an output that have a cotangent, without those of samples that failed.

        Where every element of every sample is moved by itself (parameters, shared tensors) one row holds all samples.
        """
        matters = self.matters[output]
        if self._apart(output):
            dead = self.dead
            if self.failed is not None and self.failed.shape == dead.shape:
                dead = dead | self.failed
            if bool(dead.any()):
                matters = matters & ~dead.to(matters.device).unsqueeze(1)
        return matters.reshape(rows, -1)

    @property
    def error(self) -> float:
        """Estimate of the relative error: granularity (rounding, a quantum, a tolerance) or curvature within a step."""
        if not self.noted:
            return 0.0
        return (self.second / self.first) ** 0.5 if self.first else inf


def _states(site: Site, method: SiteMethod, rows: Tensor) -> Any:
    """A function (start, stop, moved rows) -> (directions, rows, n)."""
    if method.how == "elementwise":

        def moved(start: int, stop: int, values: Tensor) -> Tensor:
            if site.pairs == 1:
                return values.unsqueeze(0)
            found = rows.repeat(stop - start, 1, 1)
            for k in range(start, stop):
                found[k - start, :, k::2] = values[:, k::2]
            return found

        return moved
    coordinate = Probe("coordinate", site.elements)
    probe = coordinate if method.coloring is None else Probe("colored", site.elements, coloring=method.coloring)
    return States(probe, rows).moved

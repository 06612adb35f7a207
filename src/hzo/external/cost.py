"""What a backward pass through a box will ask, before it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from time import perf_counter
from typing import Any

from torch import Tensor

from hzo._options import whole
from hzo.errors import InputError
from hzo.execution import counting
from hzo.external.call import BoxCall
from hzo.external.guard import divided
from hzo.external.products import settings_of, that_move
from hzo.external.promises import evaluations_of_test
from hzo.external.queries import BoxSweep
from hzo.external.sites import Site, SiteMethod, method_of, site_of
from hzo.planner import as_mesh, with_mesh
from hzo.plans import MeshCost, Plan
from hzo.tracing import Graph


@dataclass(frozen=True)
class SitePlan:
    """One input of a box: how it is perturbed, and what that costs.

    Attributes:
        name: of the input. elements: of one sample, or of the whole where it has none. how: in words.
        directions: perturbations. queries: evaluations of one sample. alike: one sample is moved for all, since the
            part is affine. apart: it has the batch in front; elements are those of one sample.
    """

    name: str
    elements: int
    how: str
    directions: int
    queries: int
    alike: bool = False
    apart: bool = True


@dataclass(frozen=True)
class BoxShare:
    """What each process of a mesh asks of a box in one backward pass, ``hzo.backward(mesh=)``; ``print`` it.

    Attributes:
        mesh: processes along ``sample`` and along ``query``. samples: of the forward pass of a process, at most.
        queries: evaluations of one sample that it asks, at most.
        words, exchanges: numbers that are sent for the box, and how often processes wait for each other; those of the
            gradient as a whole are not among them, but for the gradient of the box's own parameters.
        seconds: of its forward pass and its queries, from the time of one call here; of exchanges, too, where a link is
            known.
        best: the mesh of as many processes that takes least: seconds where a link is known, else queries; of several
            that take as little the one with most along ``sample``, where less is sent.
    """

    mesh: tuple[int, int]
    samples: int
    queries: int
    words: int
    exchanges: int
    seconds: float
    best: tuple[int, int]

    def __str__(self) -> str:
        sample, query = self.mesh
        advice = "" if self.mesh == self.best else f"; better {self.best[0]} × {self.best[1]}"
        return (
            f"sample × query {sample} × {query}: {self.queries:,} queries of each process, {self.samples:,} samples, "
            f"{self.words:,} words in {self.exchanges:,} exchanges, about {self.seconds:.3g} s{advice}"
        )


@dataclass(frozen=True)
class BoxPlan:
    """What one backward pass through a box asks, without the checks of a first pass; ``print`` it.

    Attributes:
        name: of the box. batch: samples of the forward pass; 1 for a part without a batch.
        sites: the inputs. calls: of the callable, the test of determinism included, and those of what was inferred.
        seconds: for all of it, from the time of one call here. seconds_of_sample: of one evaluation of one sample.
        outputs: numbers that one sample makes, or the whole where there is no batch.
        operation: it is called with tensors alone: one operation of a network that hzo differentiates, whose
            cotangents processes add up. Else they tell each other what queries returned.
    """

    name: str
    batch: int
    sites: tuple[SitePlan, ...]
    calls: int
    seconds: float
    seconds_of_sample: float = 0.0
    outputs: int = 0
    operation: bool = True

    @property
    def queries(self) -> int:
        """Evaluations of one sample at perturbed inputs."""
        return sum(site.queries for site in self.sites)

    @property
    def coordinate_queries(self) -> int:
        """What differences element by element would ask."""
        return sum(2 * site.elements * self.batch for site in self.sites)

    def on_mesh(self, sample: int, query: int, *, link: tuple[float, float] | None = None) -> BoxShare:
        """What each process asks where the batch is divided among ``sample`` and its queries among ``query`` processes.

        Args:
            link: seconds that an exchange takes, and words sent in a second.

        Raises:
            InputError: numbers that are none; more processes along ``sample`` than there are samples.
        """
        sample, query = whole("sample", sample), whole("query", query)
        mesh = as_mesh((sample, query), link, 0)
        assert mesh is not None
        _check_samples(sample, self.batch)
        processes = sample * query

        def price(ways: int) -> tuple[float, int]:
            queries, words, exchanges = self._of_each(ways, processes // ways)
            return queries if mesh.link is None else self._seconds(ways, queries, words, exchanges, mesh.link), -ways

        best = min((s for s in range(1, min(processes, self.batch) + 1) if processes % s == 0), key=price)
        queries, words, exchanges = self._of_each(sample, query)
        seconds = self._seconds(sample, queries, words, exchanges, mesh.link)
        rows = ceil(self.batch / sample)
        return BoxShare((sample, query), rows, queries, words, exchanges, seconds, (best, processes // best))

    def _of_each(self, sample: int, query: int) -> tuple[int, int, int]:
        """Queries, words and exchanges of a process."""
        queries = words = exchanges = 0
        rows = ceil(self.batch / sample)
        for site in self.sites:
            if not site.directions:
                continue
            # One direction is asked by all. So are fewer than there are processes, where results are exchanged.
            divided = site.directions > 1 if self.operation else query <= site.directions
            own = ceil(site.directions / query) if divided else site.directions
            asked = site.queries * (1 if site.alike else rows / self.batch)
            queries += ceil(asked * own / site.directions)
            if divided and query > 1:
                words += site.elements * (rows if site.apart else 1) if self.operation else ceil(asked) * self.outputs
                exchanges += 2
            if sample > 1 and site.name.startswith("parameter "):
                words += site.elements
        return queries, words, exchanges

    def _seconds(
        self, sample: int, queries: int, words: int, exchanges: int, link: tuple[float, float] | None
    ) -> float:
        passes = ceil(self.batch / sample) * (1 if self.operation else 2)  # forward, and the test that it repeats
        between = 0.0 if link is None else exchanges * link[0] + words / link[1]
        return (queries + passes) * self.seconds_of_sample + between

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.queries} queries in {self.calls} calls, about {self.seconds:.3g} s a backward pass "
            f"({self.batch} samples; element by element {self.coordinate_queries})"
        ]
        lines += [
            f"  {site.name}: {site.elements} elements, {site.how}, {site.directions} directions, {site.queries} queries"
            for site in self.sites
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class ChainPlan:
    """What one backward pass through a chain of parts asks; ``print`` it. What ``plan`` has is here by its name, too.

    Attributes:
        name: of its parts. plan: the tree that is followed, as of ``hzo.plan``. elements: of a sample of the inputs.
        parts: operations of the chain. seconds: of queries and the test of determinism, from the time of each part.
        graph: of the chain.
    """

    name: str
    plan: Plan
    elements: int
    parts: int
    seconds: float
    graph: Graph = field(repr=False, compare=False)

    def on_mesh(self, sample: int, query: int, *, link: tuple[float, float] | None = None) -> MeshCost:
        """What each process asks and sends, ``hzo.plan(mesh=)``, without seconds; arguments as of ``BoxPlan.on_mesh``.

        Raises:
            InputError: numbers that are none; more processes along ``sample`` than there are samples.
        """
        mesh = as_mesh((whole("sample", sample), whole("query", query)), link, 0)
        assert mesh is not None
        _check_samples(sample, self.plan.batch)
        found = with_mesh(self.graph, self.plan, mesh).mesh
        assert found is not None
        return found

    @property
    def coordinate_equivalents(self) -> float:
        """Passes of the chain that differences element by element of its inputs would take, without its parameters."""
        return float((1 if self.plan.scheme == "forward" else 2) * self.elements)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "plan":
            raise AttributeError(name)
        return getattr(self.plan, name)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.plan.queries:,} queries of some of {self.parts} parts, "
            f"{self.plan.forward_equivalents:,.2f} passes of all, about {self.seconds:.3g} s a backward pass "
            f"({self.plan.batch} samples; element by element {self.coordinate_equivalents:,.0f} passes)\n{self.plan}"
        )


def _check_samples(sample: int, batch: int) -> None:
    if sample > batch:
        raise InputError(
            f"expected at most as many processes along sample as there are samples, {batch}, got {sample}; put more "
            "along query"
        )


def plan_of_call(call: BoxCall, leaves: Sequence[Tensor], wanted: Sequence[bool]) -> BoxPlan:
    """Run the part once, as a check, and say what its backward pass would ask for the leaves that are wanted.

    All that comes out and can carry a cotangent has one. Runs the part once more where something comes out that belongs
    to the batch as a whole, as the backward pass does, to see whether it depends on the arguments at all.
    """
    guard = call.guard
    now = guard.state.save()
    with counting.as_checks():
        call.forward(leaves)
        began = perf_counter()
        with call.queries(leaves):
            call.evaluate(leaves)
        seconds = perf_counter() - began
    guard.state.load(now, counters=False)
    outputs = [o for o in range(len(call.result_positions)) if call.made[o].is_floating_point or call.complex[o]]
    fixed = guard.batched if type(guard.batched) is int else call.layout.batch
    once = -(-call.layout.batch // fixed) * _pieces(call, 1)
    moving, tests = outputs, 0 if guard.noisy else 1  # that it repeats
    if call.layout.batched and not all(call.layout.outputs[o] for o in outputs):
        sweep = BoxSweep(call, leaves, outputs)
        with counting.as_checks(), call.queries(leaves):
            moving = that_move(call, sweep, *settings_of(call, leaves))
        tests += 1
    sites, calls = [], 0
    for k, flag in enumerate(wanted):
        read = moving if k < call.count else outputs
        if not flag or not leaves[k].numel() or not read:
            continue
        site = site_of(call, leaves, k, read)
        method = method_of(call, site, read, call.sample_shapes(read, site.apart))
        draws = call.settings.draws if call.settings.mu is not None else 1
        sites.append(
            SitePlan(
                call.names[k],
                site.elements,
                _words(method),
                method.directions * draws,
                method.queries * draws,
                method.alike,
                site.apart,
            )
        )
        calls += draws * _calls(call, site, method)
        tests += evaluations_of_test(call, site, method) if call.settings.inferred else 0
    samples = sum(site.queries for site in sites) + tests * call.layout.batch
    per_sample = seconds / call.layout.batch
    # What is folded into one call takes less than that where the part computes samples at once.
    numbers = sum(prod(shape) for shape in call.sample_shapes(outputs, apart=True))
    return BoxPlan(
        guard.name, call.layout.batch, tuple(sites), calls + tests * once, per_sample * samples, per_sample, numbers,
        call.tensors_alone,
    )  # fmt: skip


def _words(method: SiteMethod) -> str:
    words = {
        "coordinate": "element by element",
        "colored": f"by colors ({method.coloring})",
        "symmetric": "symmetric (at most)",
    }
    how = words.get(method.how, method.how)
    return f"{how}, affine: one sample for all" if method.alike else how


def _calls(call: BoxCall, site: Site, method: SiteMethod) -> int:
    fixed = call.guard.batched
    if type(fixed) is int:
        folded = site.apart and call.folds
        rows = method.samples * (method.directions if folded else 1)
        return method.evaluations * -(-rows // fixed) * (1 if folded else method.directions)
    if site.apart and call.folds and call.guard.pool is None:
        copies = min(method.directions, call.most_copies or method.directions)
        return method.evaluations * -(-method.directions // max(1, copies))
    if method.alike:
        return -(-method.directions // call.layout.batch)
    asked = method.evaluations * method.directions
    return asked * _pieces(call, asked if site.apart else method.evaluations)


def _pieces(call: BoxCall, together: int) -> int:
    """Into how many calls each of so many that are asked together is divided, among workers."""
    pool, layout = call.guard.pool, call.layout
    if pool is None or pool.divides is None or call.guard.batched is not True or not all(layout.outputs):
        return 1
    return -(-layout.batch // divided(layout.batch, together, pool.divides)) if layout.batched else 1

"""Plans: what will be estimated from what, how, and at what cost. Decisions only; planner.py makes them.

Nothing here knows the values of a network: a plan can be printed, compared and kept.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from fractions import Fraction

from hzo.differences import Scheme, evaluations
from hzo.noise import Noise
from hzo.probes import Probe
from hzo.storage import Storage
from hzo.structure import Assume
from hzo.trees import Tree


@dataclass(frozen=True)
class Node:
    """One estimate: the cotangent of ``value`` at position ``target`` from those at position ``source``.

    ``operations`` are what a query runs, ``outputs`` the values at ``source`` that they change; ``carried`` says that
    the value itself is alive at ``source`` too, so that its cotangent there is carried over. A node without
    operations costs nothing. The estimate is the mean of ``repeats`` measurements, whose price ``cost``
    includes; ``step`` is the distance h of its differences in units of the activity's root mean square, None for that
    of the plan.
    """

    value: int
    target: int
    source: int
    operations: tuple[int, ...]
    outputs: tuple[int, ...]
    carried: bool
    probe: Probe
    cost: Cost
    repeats: int = 1
    step: float | None = None


@dataclass(frozen=True)
class ParameterProbe:
    """A parameter that no closed rule covers: operation and position among its parameters, perturbed by itself."""

    operation: int
    use: int
    elements: int
    cost: Cost


@dataclass(frozen=True)
class Cost:
    """What queries cost: those that every sample needs, and those that measure an operation once for the batch.

    Attributes:
        queries, stage_evaluations: of one sample.
        forward_equivalents: of the batch by those queries, the same for any batch size.
        measurements: queries (and stage evaluations) that measure an operation, whatever the batch size.
        measured: what they cost, in forward passes of one sample.
        adjoints: applications of an adjoint to the batch.
    """

    queries: int = 0
    stage_evaluations: int = 0
    forward_equivalents: Fraction = Fraction(0)
    measurements: int = 0
    measured: Fraction = Fraction(0)
    adjoints: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(times * a for a in astuple(self)))

    def forward_equivalents_of(self, batch: int) -> Fraction:
        """Operations of all queries over those of one forward pass of a batch."""
        return self.forward_equivalents + self.measured / batch


@dataclass(frozen=True)
class Expected:
    """What the error model expects of a plan.

    Attributes:
        errors: squared relative error of every estimated cotangent, by position and value.
        parameters: of every parameter's gradient, by name.
        seconds: of one gradient; None where no time was measured.
    """

    errors: dict[tuple[int, int], float] = field(hash=False)
    parameters: dict[str, float] = field(hash=False)
    seconds: float | None = None

    @property
    def cosine(self) -> float:
        """The lowest cosine of an estimated cotangent."""
        return float((1 + max(self.errors.values(), default=0.0)) ** -0.5)


@dataclass(frozen=True)
class Plan:
    """How one gradient is estimated. Made by ``hzo.plan``; valid for any batch size of the traced chain.

    Attributes:
        fingerprint: of the chain that it was made for.
        nodes: in the order in which they run, from the output to the input.
        perturbed: parameters without a closed rule.
        trainable: names of the parameters that get a gradient.
        batch: batch size that the totals below refer to, that of the trace.
        storage: of activities: those of the whole base pass, or of a path, from which stages are run again.
        activity_bytes: the most that activities and pending cotangents take at once, in one gradient of the batch
            traced. recomputed: stages run again in it, on one sample each; counted with the base evaluations.
        expected: errors and time, where a noise, a calibration or a target was given.
    """

    fingerprint: str
    tree: Tree
    assume: Assume
    scheme: Scheme
    step: float | None
    noise: Noise | None
    nodes: tuple[Node, ...]
    perturbed: tuple[ParameterProbe, ...]
    trainable: tuple[str, ...]
    batch: int
    labels: tuple[str, ...]  # of the positions, for printing
    storage: Storage = "all"
    activity_bytes: int = 0
    recomputed: int = 0
    expected: Expected | None = None

    @property
    def cost(self) -> Cost:
        """The cost of one gradient for one sample."""
        nodes = sum((node.cost for node in self.nodes), start=Cost())
        return sum((probe.cost for probe in self.perturbed), start=nodes)

    @property
    def approximate(self) -> bool:
        """Whether some node is estimated from an approximate coloring."""
        return any(node.probe.coloring is not None and node.probe.coloring.spacing is not None for node in self.nodes)

    @property
    def queries(self) -> int:
        """Queries of one gradient of the batch traced."""
        return self.cost.queries * self.batch + self.cost.measurements

    @property
    def stage_evaluations(self) -> int:
        """Stage evaluations of one gradient of the batch traced."""
        return self.cost.stage_evaluations * self.batch + self.cost.measurements

    @property
    def forward_equivalents(self) -> float:
        """Operations of all queries of one gradient over those of one forward pass."""
        return float(self.cost.forward_equivalents_of(self.batch))

    @property
    def adjoints(self) -> int:
        """Adjoints of single operations that one gradient applies to the batch."""
        return self.cost.adjoints

    def __str__(self) -> str:
        return describe(self)


def describe(plan: Plan, rows: int = 40) -> str:
    """The plan as text: totals, what each kind of probe costs, then the costly nodes, the first ``rows`` of them."""
    step = "from dtype and scale" if plan.step is None else f"{plan.step:g}"
    whole = plan.cost.forward_equivalents_of(plan.batch) or Fraction(1)

    def price(cost: Cost) -> str:
        fe = cost.forward_equivalents_of(plan.batch)
        return f"{float(fe):.2f} forward equivalents ({float(fe / whole):.1%})"

    def colors(probe: Probe) -> str:
        if probe.coloring is None:
            return ""
        return f" (colors {probe.coloring}" + (f", {probe.draws} draws)" if probe.draws > 1 else ")")

    lines = [
        f"tree {plan.tree}, assume {plan.assume}, {plan.scheme} differences, step {step}",
        f"one gradient of {plan.batch} samples: {plan.queries:,} queries, {plan.stage_evaluations:,} stage "
        f"evaluations, {plan.adjoints:,} adjoints, {plan.forward_equivalents:,.2f} forward equivalents",
        f"activities: {plan.storage} stored, at most {plan.activity_bytes:,} bytes at once, {plan.recomputed:,} stages "
        "run again",
    ]
    by_probe: dict[str, Cost] = {}
    for node in plan.nodes:
        if node.operations:
            name = f"{node.probe.kind} ({node.probe.promise})" if node.probe.promise else node.probe.kind
            by_probe[name] = by_probe.get(name, Cost()) + node.cost
    lines += [f"  {name} probes: {price(cost)}" for name, cost in by_probe.items()]
    costly = [node for node in plan.nodes if node.probe.kind != "adjoint" and node.operations]
    for node in costly[:rows]:
        lines.append(
            f"  {plan.labels[node.target]} from {plan.labels[node.source]}: {node.probe.kind} probe, "
            f"{node.probe.directions} directions{colors(node.probe)} × {evaluations(plan.scheme)}, {price(node.cost)}"
        )
    if len(costly) > rows:
        rest = sum((node.cost for node in costly[rows:]), start=Cost())
        lines.append(f"  … and {len(costly) - rows} more nodes, {price(rest)}")
    for probe in plan.perturbed:
        lines.append(
            f"  parameters of {plan.labels[probe.operation]}: perturbed, {probe.elements} elements × "
            f"{evaluations(plan.scheme)}, {price(probe.cost)}"
        )
    return "\n".join(lines)

"""Plans: what will be estimated from what, how, and at what cost. Decisions only; planner/ makes them.

Nothing here knows the values of a network: a plan can be printed, compared and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from hzo.finite_differences import Probe, evaluations
from hzo.plans.options import PlanOptions
from hzo.plans.picture import tree_as_html
from hzo.plans.storage import Storage


@dataclass(frozen=True)
class PlannedEdge:
    """An edge of a tree with what was decided about it: ``target`` takes its cotangents from ``source``.

    ``relative_step`` in units of the activation's root mean square; None for the step of the plan.
    """

    target: int
    source: int
    repeats: int = 1
    relative_step: float | None = None


@dataclass(frozen=True)
class ByRule:
    """The VJP rule of a single operation: it carries the cotangent, and nothing is perturbed.

    ``name`` says which: "closed", "decomposition", "slope", or what ``hzo.declare`` was told of a module.
    """

    name: str

    def __str__(self) -> str:
        return f"adjoint ({self.name})" if self.name else "adjoint"


Estimator = Probe | ByRule
"""How a node's cotangent is found: by finite differences of a slice, or by the rule of one operation."""


@dataclass(frozen=True)
class Node:
    """One estimate: the cotangent of ``value`` at position ``target`` from those at position ``source``.

    ``operations`` are what a query runs, ``outputs`` the values at ``source`` that they change; ``carried`` says that
    the value itself is alive at ``source`` too, so that its cotangent there is carried over. A node without
    operations costs nothing. The estimate is the mean of ``repeats`` measurements, whose price ``cost``
    includes. ``relative_step`` is the step h of its differences in units of the activation's root mean square, None for
    the plan's; ``declared_step`` the one that the user declared of what it perturbs, which goes before both.
    """

    value: int
    target: int
    source: int
    operations: tuple[int, ...]
    outputs: tuple[int, ...]
    carried: bool
    estimator: Estimator
    cost: Cost
    repeats: int = 1
    relative_step: float | None = None
    declared_step: float | None = None

    @property
    def probe(self) -> Probe | None:
        """What its queries perturb; None where it asks none: a rule carries the cotangent, or nothing lies between."""
        return self.estimator if self.operations and isinstance(self.estimator, Probe) else None

    @property
    def directions(self) -> int:
        """Directions that its queries perturb, each in all samples."""
        return 0 if self.probe is None else self.probe.directions


@dataclass(frozen=True)
class ParameterProbe:
    """A parameter that no closed rule covers: operation and position among its parameters, perturbed by itself."""

    operation: int
    use: int
    elements: int
    cost: Cost


@dataclass(frozen=True)
class Cost:
    """What a gradient costs in forward passes: queries of every sample, and those that measure a layer once a batch.

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
        return Cost(
            self.queries + other.queries,
            self.stage_evaluations + other.stage_evaluations,
            self.forward_equivalents + other.forward_equivalents,
            self.measurements + other.measurements,
            self.measured + other.measured,
            self.adjoints + other.adjoints,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(
            times * self.queries,
            times * self.stage_evaluations,
            times * self.forward_equivalents,
            times * self.measurements,
            times * self.measured,
            times * self.adjoints,
        )

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
        return self.cosine_of(*self.errors) if self.errors else 1.0

    def cosine_of(self, *estimates: tuple[int, int]) -> float:
        """The lowest cosine of these estimates, each given by its position and value."""
        return float((1 + max(self.errors[estimate] for estimate in estimates)) ** -0.5)


@dataclass(frozen=True)
class RankCost:
    """What the busiest process of a mesh does in one gradient.

    Attributes:
        along_sample, along_query: processes of the mesh. batch: samples of this one.
        queries: that it asks. forward_equivalents: their operations, over those of a forward pass of the whole batch.
        words: numbers that it sends. exchanges: how often it waits for others.
        seconds: of a gradient; None where no time was measured. Without those of exchanges where no link is known.
    """

    along_sample: int
    along_query: int
    batch: int
    queries: int
    forward_equivalents: float
    words: int
    exchanges: int
    seconds: float | None = None

    def __str__(self) -> str:
        text = (
            f"{self.batch:,} samples, {self.queries:,} queries, {self.forward_equivalents:,.3g} forward equivalents, "
            f"{self.words:,} words in {self.exchanges:,} exchanges"
        )
        return text if self.seconds is None else f"{text}, {self.seconds:.3g} seconds"


@dataclass(frozen=True)
class MeshCost:
    """What a gradient costs on a mesh, and on the best one of as many processes.

    Attributes:
        here, best: of the mesh asked for, and of the one that takes the least.
        coupled: samples influence each other (BatchNorm), along ``sample`` those of each process.
    """

    here: RankCost
    best: RankCost
    coupled: bool = False

    def __str__(self) -> str:
        here, best = self.here, self.best
        lines = [f"on {here.along_sample} × {here.along_query} processes (sample × query), each at most {here}"]
        ways = (best.along_sample, best.along_query)
        if ways != (here.along_sample, here.along_query):
            take = '"sample" alone' if ways[1] == 1 else '"query" alone' if ways[0] == 1 else "both dimensions"
            lines.append(f"  better: {take}, {ways[0]} × {ways[1]}, each at most {best}")
        if self.coupled and max(here.along_sample, best.along_sample) > 1:
            lines.append('  along "sample" each process has statistics of its own (BatchNorm)')
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Plan(PlanOptions):
    """How one gradient will be estimated: what is perturbed, how often, and what that costs; ``print`` shows it.

    Made by ``hzo.plan``; valid for any batch size of the traced chain.

    Attributes:
        fingerprint, calls: of the chain that it was made for; its calls in words.
        edges: the tree's edges, from the output to the input, with what was decided about each.
        nodes: what follows from the edges, in the order in which they run.
        perturbed: parameters without a closed rule.
        trainable: names of the parameters that get a gradient.
        batch: batch size that the totals below refer to, that of the trace.
        storage: of activations: those of the whole base pass, or of a path, from which stages are run again.
        activation_bytes: the most that activations and pending cotangents take at once, in one gradient of the batch
            traced. recomputed: stages run again in it, on one sample each; counted with the base evaluations.
        expected: errors and time, where a noise, a calibration or a target was given.
        tree, assume, scheme, step, noise, boundaries, spacing, mu, draws: as ``hzo.plan`` took them.
        mesh: what it costs on the mesh that ``hzo.plan`` was given; no decision, and in no file.
    """

    fingerprint: str
    nodes: tuple[Node, ...]
    perturbed: tuple[ParameterProbe, ...]
    trainable: tuple[str, ...]
    batch: int
    labels: tuple[str, ...]  # of the positions, for printing
    storage: Storage = "all"
    activation_bytes: int = 0
    recomputed: int = 0
    expected: Expected | None = None
    edges: tuple[PlannedEdge, ...] = ()
    calls: tuple[str, ...] = field(default=(), repr=False, compare=False)
    mesh: MeshCost | None = field(default=None, compare=False)

    @property
    def cost(self) -> Cost:
        """The cost of one gradient for one sample."""
        nodes = sum((node.cost for node in self.nodes), start=Cost())
        return sum((probe.cost for probe in self.perturbed), start=nodes)

    @property
    def random(self) -> bool:
        """Whether a gradient draws random numbers of its own: for smoothing, or for approximate colorings."""
        return self.mu is not None or any(
            node.probe is not None and node.probe.coloring is not None and node.probe.coloring.spacing is not None
            for node in self.nodes
        )

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

    def __repr__(self) -> str:
        return (
            f"<Plan: tree {self.tree}, assume {self.assume}, {self.queries:,} queries, {self.adjoints:,} adjoints, "
            f"{self.forward_equivalents:,.2f} forward equivalents for {self.batch} samples; print() shows its nodes>"
        )

    def _repr_html_(self) -> str:
        repeats = {node.target: node.repeats for node in self.nodes if node.operations}
        arcs = [(edge.target, edge.source, repeats.get(edge.target, 1)) for edge in self.edges]
        return tree_as_html(arcs, self.labels, describe(self, rows=12))


def describe(plan: Plan, rows: int = 40, width: int = 120) -> str:
    """The plan as text: totals, what is expected, what each kind of probe costs, then the nodes that perturb something,
    the first ``rows`` of them. Labels are cut so that lines keep to ``width`` columns."""
    step = "from dtype and scale" if plan.step is None else f"{plan.step:g}"
    if plan.mu is not None:
        step = f"{plan.step or plan.mu:g}, smoothed over {plan.mu:g} by {plan.draws} draws"
    if plan.step is None and plan.expected is not None:
        step = "of each node, in units of its activation"
    whole = plan.cost.forward_equivalents_of(plan.batch) or Fraction(1)

    def price(cost: Cost, unit: str = "") -> str:
        fe = cost.forward_equivalents_of(plan.batch)
        return f"{float(fe):,.2f}{unit} ({float(fe / whole):.1%})"

    lines = [
        f"tree {plan.tree}, assume {plan.assume}, {plan.scheme} differences, step {step}",
        f"one gradient of {plan.batch} samples: {plan.queries:,} queries, {plan.stage_evaluations:,} stage "
        f"evaluations, {plan.adjoints:,} adjoints, {plan.forward_equivalents:,.2f} forward equivalents",
        f"activations: {plan.storage} stored, at most {plan.activation_bytes:,} bytes at once, {plan.recomputed:,} "
        "stages run again",
    ]
    if plan.expected is not None:
        lines.append(expectation(plan))
    if plan.mesh is not None:
        lines += str(plan.mesh).splitlines()
    by_estimator: dict[str, Cost] = {}
    for node in plan.nodes:
        if node.operations:
            name = str(node.estimator) if node.probe is None else f"{node.probe.kind} probes"
            by_estimator[name] = by_estimator.get(name, Cost()) + node.cost
    lines += [f"  {name}: {price(cost, ' forward equivalents')}" for name, cost in by_estimator.items()]
    lines += measuring(plan)
    costly = costly_nodes(plan)
    if costly or plan.perturbed:
        lines.append("what is perturbed, with forward equivalents and their share:")
    for node, probe in costly[:rows]:
        parts = []
        if plan.expected is not None:
            parts.append(f"{node.repeats:,} repeat" + ("s" if node.repeats != 1 else ""))
            parts += [] if node.relative_step is None else [f"step {node.relative_step:.3g}"]
            parts.append(f"cosine {plan.expected.cosine_of((node.target, node.value)):.4f}")
        rest = ", ".join((f" × {evaluations(plan.scheme)}", *parts, price(node.cost)))
        lines.append(_row(plan, node, probe, rest, width))
    if len(costly) > rows:
        others = sum((node.cost for node, _ in costly[rows:]), start=Cost())
        lines.append(f"  … and {len(costly) - rows} more nodes, {price(others)}")
    for parameter in plan.perturbed:
        lines.append(
            f"  parameters of {plan.labels[parameter.operation]}: {parameter.elements} elements × "
            f"{evaluations(plan.scheme)}, {price(parameter.cost)}"
        )
    return "\n".join(lines)


def measuring(plan: Plan, rows: int = 3) -> list[str]:
    """What rules measure of weights, as a law of the batch size B, and the layers that cost most; empty for nothing.

    As many queries as the layer has inputs (for a convolution, channels of a group), and one, whatever the batch.
    """
    cost = plan.cost
    if not cost.measurements:
        return []
    share = float(cost.measured / plan.batch)
    lines = [
        f"weights are measured by {cost.measurements:,} queries whatever the batch B: {float(cost.measured):,.3g} / B "
        f"forward passes, {share:,.2g} here",
    ]
    measured = sorted((n for n in plan.nodes if n.cost.measured), key=lambda n: -n.cost.measured)
    for node in measured[:rows]:
        layer = _cut(plan.labels[node.target], 60)
        lines.append(f"  {layer}: {node.cost.measurements:,} queries, {float(node.cost.measured):,.3g} / B")
    if len(measured) > rows:
        rest = float(sum((n.cost.measured for n in measured[rows:]), start=Fraction(0)))
        lines.append(f"  … and {len(measured) - rows} more, {rest:,.3g} / B")
    return lines


def _row(plan: Plan, node: Node, probe: Probe, rest: str, width: int) -> str:
    """A node's line; where it would be too long, first without its coloring, then with labels cut."""
    target, source = plan.labels[node.target], plan.labels[node.source]
    text = f"{probe.kind} probe, {directions_in_words(probe)}{rest}"
    if len(f"  {target} from {source}: {text}") > width and plan.expected is not None:
        text = f"{probe.kind} probe, {probe.directions} directions{rest}"
    room = width - len(f"   from : {text}")
    target = _cut(target, max(room - len(source), room // 2))
    return f"  {target} from {_cut(source, room - len(target))}: {text}"


def _cut(label: str, width: int) -> str:
    width = max(width, 10)  # less says nothing; such a line is longer
    return label if len(label) <= width else label[: width - 1] + "…"


def costly_nodes(plan: Plan) -> list[tuple[Node, Probe]]:
    """The nodes that perturb something, each with its probe."""
    return [(node, node.probe) for node in plan.nodes if node.probe is not None]


def directions_in_words(probe: Probe) -> str:
    """How many directions a probe perturbs, and from what coloring, in words."""
    if probe.coloring is None:
        return f"{probe.directions} directions"
    draws = f", {probe.draws} draws" if probe.draws > 1 else ""
    return f"{probe.directions} directions (colors {probe.coloring}{draws})"


def expectation(plan: Plan) -> str:
    """What is expected of a plan, in a line."""
    if plan.expected is None:
        return "expected: nothing is known of errors; plan with a noise, a calibration or a target"
    repeats = [node.repeats for node in plan.nodes if node.operations]
    fewest, most = min(repeats, default=1), max(repeats, default=1)
    text = f"expected: lowest cosine {plan.expected.cosine:.4f}"
    if plan.expected.errors:
        (position, _), _ = max(plan.expected.errors.items(), key=lambda item: item[1])
        text += f" at {plan.labels[position]}"
    if plan.expected.seconds is not None:
        text += f", {plan.expected.seconds:.3g} seconds"
    if most == 1:
        return text + "; every node is asked once"
    return text + f"; {fewest:,}" + (f" to {most:,}" if most > fewest else "") + " repeats of each node"

"""Plans: what will be estimated from what, how, and at what cost. Decisions only; planner.py makes them.

Nothing here knows the values of a network: a plan can be printed, compared and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from hzo.differences import Scheme, evaluations
from hzo.probes import Probe
from hzo.structure import Assume
from hzo.trees import Tree


@dataclass(frozen=True)
class Node:
    """One estimate: the cotangent of ``value`` at position ``target`` from those at position ``source``.

    ``operations`` are what a query runs, ``outputs`` the values at ``source`` that they change; ``carried`` says that
    the value itself is alive at ``source`` too, so that its cotangent there is carried over. A node without
    operations costs nothing.
    """

    value: int
    target: int
    source: int
    operations: tuple[int, ...]
    outputs: tuple[int, ...]
    carried: bool
    probe: Probe
    cost: Cost


@dataclass(frozen=True)
class ParameterProbe:
    """A parameter that no closed rule covers: operation and position among its parameters, perturbed by itself."""

    operation: int
    use: int
    elements: int
    cost: Cost


@dataclass(frozen=True)
class Cost:
    """What queries cost: of one sample, but for ``forward_equivalents``, which is the same for any batch size."""

    queries: int = 0
    stage_evaluations: int = 0
    forward_equivalents: Fraction = Fraction(0)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.queries + other.queries,
            self.stage_evaluations + other.stage_evaluations,
            self.forward_equivalents + other.forward_equivalents,
        )


@dataclass(frozen=True)
class Plan:
    """How one gradient is estimated. Made by ``hzo.plan``; valid for any batch size of the traced chain.

    Attributes:
        fingerprint: of the chain that it was made for.
        nodes: in the order in which they run, from the output to the input.
        perturbed: parameters without a closed rule.
        trainable: names of the parameters that get a gradient.
        batch: batch size that the totals below refer to, that of the trace.
    """

    fingerprint: str
    tree: Tree
    assume: Assume
    scheme: Scheme
    step: float | None
    noise: float | None
    nodes: tuple[Node, ...]
    perturbed: tuple[ParameterProbe, ...]
    trainable: tuple[str, ...]
    batch: int
    labels: tuple[str, ...]  # of the positions, for printing

    @property
    def cost(self) -> Cost:
        """The cost of one gradient for one sample."""
        nodes = sum((node.cost for node in self.nodes), start=Cost())
        return sum((probe.cost for probe in self.perturbed), start=nodes)

    @property
    def queries(self) -> int:
        """Queries of one gradient of the batch traced."""
        return self.cost.queries * self.batch

    @property
    def stage_evaluations(self) -> int:
        """Stage evaluations of one gradient of the batch traced."""
        return self.cost.stage_evaluations * self.batch

    @property
    def forward_equivalents(self) -> float:
        """Operations of all queries of one gradient over those of one forward pass."""
        return float(self.cost.forward_equivalents)

    def __str__(self) -> str:
        return describe(self)


def describe(plan: Plan, rows: int = 40) -> str:
    """The plan as text: totals, then one line for each node that costs something, the first ``rows`` of them."""
    total = plan.cost
    step = "from dtype and scale" if plan.step is None else f"{plan.step:g}"
    lines = [
        f"tree {plan.tree}, assume {plan.assume}, {plan.scheme} differences, step {step}",
        f"one gradient of {plan.batch} samples: {plan.queries:,} queries, "
        f"{plan.stage_evaluations:,} stage evaluations, {plan.forward_equivalents:,.1f} forward equivalents",
    ]
    costly = [node for node in plan.nodes if node.cost.queries]
    whole = total.forward_equivalents or Fraction(1)
    for node in costly[:rows]:
        share = float(node.cost.forward_equivalents / whole)
        lines.append(
            f"  {plan.labels[node.target]} from {plan.labels[node.source]}: {node.probe.kind} probe, "
            f"{node.probe.directions} directions × {evaluations(plan.scheme)}, "
            f"{float(node.cost.forward_equivalents):.2f} forward equivalents ({share:.1%})"
        )
    if len(costly) > rows:
        rest = sum((node.cost for node in costly[rows:]), start=Cost())
        lines.append(
            f"  … and {len(costly) - rows} more nodes, {float(rest.forward_equivalents):.2f} forward equivalents"
        )
    for probe in plan.perturbed:
        share = float(probe.cost.forward_equivalents / whole)
        lines.append(
            f"  parameters of {plan.labels[probe.operation]}: perturbed, {probe.elements} elements × "
            f"{evaluations(plan.scheme)}, {float(probe.cost.forward_equivalents):.2f} forward equivalents ({share:.1%})"
        )
    return "\n".join(lines)

"""How long one gradient takes, from the measured seconds of operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hzo.planner.calibration import Seconds
from hzo.plans import Cost, Plan
from hzo.tracing import Graph


def seconds_of(graph: Graph, plan: Plan, known: Seconds) -> float:
    """The time of one gradient of the batch traced: base pass, queries, adjoints and parameter rules."""
    batch = graph.nominal_batch
    total = known.fixed + known.rules

    def queries(cost: Cost, operations: Sequence[int], read: Iterable[int]) -> float:
        elements = sum(graph.values[v].per_sample for v in read)
        return cost.queries * batch * (sum(known.operations[k] for k in operations) + known.decoding * elements)

    for node in plan.nodes:
        once = known.edges.get((node.target, node.source, node.value))
        spent = queries(node.cost, node.operations, node.outputs)
        if once is None:
            total += spent
        elif node.probe is None:
            total += node.repeats * once
        else:  # the first repeat as it was measured; the others run beside it, as more copies of the batch
            total += once + (node.repeats - 1) * min(once, spent / node.repeats)
    for probe in plan.perturbed:
        total += queries(probe.cost, [probe.operation], graph.operations[probe.operation].writes)
    return total

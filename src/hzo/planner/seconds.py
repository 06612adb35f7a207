"""How long one gradient takes, from the measured seconds of operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hzo.planner.calibration import Seconds
from hzo.plans import Cost, Node, ParameterProbe, Plan, share_of
from hzo.tracing import Graph


def seconds_of(graph: Graph, plan: Plan, known: Seconds, batch: int | None = None, ways: int = 1) -> float:
    """The time of one gradient: base pass, queries, adjoints and parameter rules.

    Args:
        batch: samples; None for those traced. What does not ask queries is taken to grow with their number.
        ways: processes that share its queries, of which this is the time of the busiest.
    """
    batch = batch or graph.nominal_batch
    part = batch / graph.nominal_batch
    total = (known.fixed + known.rules) * part

    def queries(cost: Cost, operations: Sequence[int], read: Iterable[int]) -> float:
        elements = sum(graph.values[v].per_sample for v in read)
        return cost.queries * batch * (sum(known.operations[k] for k in operations) + known.decoding * elements)

    def share(asking: Node | ParameterProbe) -> float:
        return float(share_of(asking.probe if isinstance(asking, Node) else asking, ways))

    for node in plan.nodes:
        once = known.edges.get((node.target, node.source, node.value))
        spent = share(node) * queries(node.cost, node.operations, node.outputs)
        if once is None:
            total += spent
        elif node.probe is None:
            total += node.repeats * once * part
        else:  # the first repeat as it was measured; the others run beside it, as more copies of the batch
            once *= share(node) * part
            total += once + (node.repeats - 1) * min(once, spent / node.repeats)
    for probe in plan.perturbed:
        total += share(probe) * queries(probe.cost, [probe.operation], graph.operations[probe.operation].writes)
    return total

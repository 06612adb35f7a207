"""How a node's cotangent is found: by the rule of one operation, or by the cheapest probe that is allowed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from hzo.declared import find_adjoint
from hzo.finite_differences import DRAWS, Probe, Scheme, color, thin
from hzo.locality import slice_locality
from hzo.plans.alike import slice_key
from hzo.plans.cost import adjoint_cost, node_cost, rule_cost
from hzo.plans.plan import ByRule, Cost, Estimator
from hzo.structure import Assume, elementwise_slice
from hzo.tracing import Graph, GraphOperation

_known: WeakKeyDictionary[Graph, dict[Hashable, Probe | None]] = WeakKeyDictionary()
"""Colorings by what slices are made of: blocks that are alike are colored once."""


@dataclass(frozen=True)
class Allowed:
    """What probes may assume, and how they take differences; ``spacing`` as in ``hzo.plan``."""

    assume: Assume
    scheme: Scheme
    spacing: int | None = None


def choose_estimator(
    graph: Graph, value: int, operations: tuple[int, ...], outputs: Sequence[int], allowed: Allowed
) -> tuple[Estimator, Cost]:
    """A rule, or the cheapest probe that what is assumed allows; and its cost."""
    elements = graph.values[value].per_sample
    if allowed.assume == "structure" and len(operations) == 1:
        op = graph.operations[operations[0]]
        if has_adjoint(op):
            return ByRule(op.rule), rule_cost(graph, op, value)
        declared = find_adjoint(graph, op, value)
        if declared is not None:
            shapes = declared.probes(graph, op, value)
            return ByRule(declared.promise), adjoint_cost(graph, operations[0], value, shapes)
    probe = Probe("coordinate", elements)
    apart = all(graph.values[v].batch_dim is not None for v in (value, *outputs))
    if operations and allowed.assume != "nothing" and apart:
        if elementwise_slice(graph, value, operations, outputs):
            probe = Probe("elementwise", elements)
        elif allowed.assume != "structure" or not _free_by_rules(graph, operations):
            probe = _colored(graph, value, operations, outputs, allowed.spacing) or probe
    return probe, node_cost(graph, probe, operations, allowed.scheme)


def has_adjoint(op: GraphOperation) -> bool:
    """Whether an operation has a rule that is no queries."""
    return op.rule not in ("queries", "")


def _free_by_rules(graph: Graph, operations: Sequence[int]) -> bool:
    """Whether rules carry a cotangent through several operations without asking anything: no queries are cheaper."""
    return len(operations) > 1 and all(
        has_adjoint(graph.operations[k]) and not graph.operations[k].measured for k in operations
    )


def _colored(
    graph: Graph, value: int, operations: Sequence[int], outputs: Sequence[int], spacing: int | None
) -> Probe | None:
    """An exact coloring, or an approximate one of fewer directions; None where every element needs its own."""
    known = _known.setdefault(graph, {})
    key = slice_key(graph, value, operations, outputs), spacing
    if key not in known:
        known[key] = _colored_anew(graph, value, operations, outputs, spacing)
    return known[key]


def _colored_anew(
    graph: Graph, value: int, operations: Sequence[int], outputs: Sequence[int], spacing: int | None
) -> Probe | None:
    elements = graph.values[value].per_sample
    found = slice_locality(graph, value, operations, outputs)
    probe = Probe("colored", elements, coloring=color(found.patterns))
    if spacing is not None and probe.coloring is not None:
        thinned = thin(probe.coloring, spacing, found.local)
        if thinned.spacing is not None and thinned.directions * DRAWS < probe.directions:
            probe = Probe("colored", elements, coloring=thinned, draws=DRAWS)
    return probe if probe.directions < elements else None

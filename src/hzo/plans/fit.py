"""Whether a plan fits a chain, and where not the first call that differs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from hzo.errors import PlanError
from hzo.plans.plan import Plan
from hzo.tracing import Graph


def check_fits(plan: Plan, graph: Graph) -> None:
    """Raise PlanError, which names the first call that differs, where a plan was made for another chain.

    Fingerprints tell modes apart, too: in which of them samples influence each other is part of an operation.
    """
    if plan.fingerprint != graph.fingerprint:
        raise PlanError(
            "this plan was made for another chain, input shape, dtype or set of trainable parameters: "
            f"{difference(plan.calls, graph)}; make one for this: chain = hzo.trace(model, x); plan = hzo.plan(chain)"
        )


def difference(calls: Sequence[str], graph: Graph) -> str:
    """In words, the first call of a graph that is not the one of ``calls``, which were another graph's."""
    for position, (was, runs) in enumerate(zip_longest(calls, graph.calls)):
        if was != runs:
            where = graph.describe(min(position, len(graph.operations)))
            return f"at {where} {runs or 'nothing'} runs where {was or 'nothing'} had run"
    return "the calls are the same, but not their options, promises, random numbers, or how they are cut into stages"

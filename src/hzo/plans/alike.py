"""Slices of a graph that are alike, such as blocks of a network: what is found out about one holds for all.

Two slices are alike if their operations are the same, one by one, on values of the same shapes, and read and write
each other's in the same way. Which values these are makes no difference, except for those of whole numbers or truth
values that are no results: what an operation picks may depend on their content. Source: ours.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from hzo.tape import Ref
from hzo.tracing import Graph, GraphOperation

_kinds: WeakKeyDictionary[Graph, tuple[int, ...]] = WeakKeyDictionary()


def slice_key(graph: Graph, value: int, operations: Sequence[int], outputs: Sequence[int]) -> Hashable:
    """Equal for slices of one graph that are alike, from a value to outputs. Cost: linear in the operations."""
    kinds = _kinds.get(graph)
    if kinds is None:
        numbers: dict[Hashable, int] = {}
        kinds = tuple(numbers.setdefault(_kind(graph, op), len(numbers)) for op in graph.operations)
        _kinds[graph] = kinds
    names = {value: 0}
    calls = []
    for k in operations:
        op = graph.operations[k]
        calls.append((kinds[k], *[names.setdefault(v, len(names)) for v in (*op.reads, *op.writes)]))
    return _about(graph, value), tuple(calls), tuple([names[v] for v in outputs])


def _kind(graph: Graph, op: GraphOperation) -> Hashable:
    """Equal for operations that differ in nothing but in which values they read and write."""
    places = {v: k for k, v in enumerate(op.reads)}

    def told(argument: Any) -> Any:
        if type(argument) is Ref:
            return Ref, places[argument.value]
        return tuple([told(a) for a in argument]) if type(argument) is tuple else argument

    key = (
        op.target,
        told(op.args),
        tuple([(name, told(argument)) for name, argument in op.kwargs.items()]),
        tuple([_about(graph, v) for v in op.reads]),
        tuple([None if v is None else _about(graph, v) for v in op.results]),
        (op.batched, op.coupled, op.deterministic),
        None if op.module is None else op.index,  # what is declared of a module may depend on anything
    )
    try:
        hash(key)
    except TypeError:
        return op.index
    return key


def _about(graph: Graph, value: int) -> Hashable:
    about = graph.values[value]
    content = value if about.producer < 0 and not about.floating else None
    return about.shape, about.dtype, about.batched, about.batch_dim, about.outer, content

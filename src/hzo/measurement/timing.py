"""How long parts of a chain take on this machine."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

from hzo.execution import Activations, run_slice
from hzo.finite_differences import Probe, directions_per_chunk
from hzo.plans import Cost, Node, bytes_per_direction
from hzo.tracing import Graph, GraphOperation

_MOST_COPIES = 256  # of the batch, in one call: enough to see what a query costs

T = TypeVar("T")


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds of the quicker of two calls, and the result of the last."""
    best = float("inf")
    for _ in range(2):
        began = perf_counter()
        result = function()
        best = min(best, perf_counter() - began)
    return best, result


def operation_seconds(graph: Graph, activations: Activations) -> tuple[float, ...]:
    """Seconds of every operation inside a query, for one sample; 0 for those that no query runs.

    Cost: two chunks of queries of every operation.
    """
    return tuple(_seconds(graph, activations, op) for op in graph.operations)


def _seconds(graph: Graph, activations: Activations, op: GraphOperation) -> float:
    moved = next((v for v in op.reads if graph.values[v].batched and graph.values[v].floating), None)
    if not op.batched or moved is None or op.coupled:
        return 0.0
    batch, value, at = activations.batch, graph.values[moved], activations.tensor(moved)
    probe = Probe("coordinate", value.per_sample)
    node = Node(moved, op.index, op.index + 1, (op.index,), op.writes, False, probe, Cost())
    chunk = directions_per_chunk(bytes_per_direction(graph, node, batch), None, at.device)
    copies = max(1, min(chunk, value.per_sample, _MOST_COPIES))
    state = {moved: at.repeat(copies, *[1] * at.dim()).view(copies, *at.shape)}
    outputs = [v for v in op.writes if graph.values[v].batched]
    taken, _ = timed(lambda: run_slice(graph, [op.index], activations, state, outputs, copies))
    return taken / (copies * batch)

"""What was declared of a module (``hzo.declare``), as links."""

from __future__ import annotations

from hzo.declared import is_only_input
from hzo.finite_differences import Links
from hzo.locality.common import sizes
from hzo.tracing import Graph, GraphOperation, declared, declared_links


def links(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """Local, elementwise and tokens, between tensors with the batch first."""
    first = graph.values[read].batch_dim == 0 == graph.values[write].batch_dim
    if not first or not is_only_input(op, read):
        return None
    return declared_links(declared(op.module) or (), sizes(graph, read), sizes(graph, write))

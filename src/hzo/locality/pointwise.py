"""Operations that keep places apart, or mix them along whole dimensions: elementwise, norms, softmax, reductions."""

from __future__ import annotations

from typing import Any

import torch

from hzo.finite_differences import Links
from hzo.locality.common import LinkRule, along, argument, dims_of, is_first_operand, mixed, sizes
from hzo.tracing import Graph, GraphOperation

aten = torch.ops.aten


def broadcast(graph: Graph, _: GraphOperation, read: int, write: int) -> Links | None:
    """Place by place, shapes aligned at their ends."""
    before, after = sizes(graph, read), sizes(graph, write)
    shift = len(after) - len(before)
    return along(graph, read, write, [d + shift for d in range(len(before))]) if shift >= 0 else None


def _same_place(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    return mixed(graph, read, write, ()) if is_first_operand(op, read) else None


def _over_the_last(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """Layer and RMS norm: statistics over the last dimensions."""
    across = range(-len(argument(op, "normalized_shape")), 0)
    return mixed(graph, read, write, across) if is_first_operand(op, read) else None


def _group_norm(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """Statistics over groups of channels, and all of space."""
    groups = int(argument(op, "group"))
    links = mixed(graph, read, write, range(2, len(sizes(graph, read))))
    if links is None or not is_first_operand(op, read) or graph.values[read].batch_dim != 0:
        return None
    if sizes(graph, read)[0] != 1:  # instances: what is left of the batch dimension is channels
        return links
    channels = sizes(graph, read)[1]
    return (links[0], {1: blocks(channels, channels, groups)}, *links[2:])


def blocks(rows: int, columns: int, groups: int) -> tuple[int, ...]:
    """Rows and columns in equal groups; a row meets the columns of its own."""
    width, height = columns // groups, rows // groups
    return tuple(((1 << width) - 1) << (row // height * width) for row in range(rows))


def _batch_norm(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """With its running statistics; with those of the batch, see below."""
    rule = _batch_statistics if argument(op, "training") else _same_place
    return rule(graph, op, read, write)


def _batch_statistics(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """Normalization of each of (samples × channels) over space: an instance norm, where samples are folded into the
    channels, or a batch norm, which couples samples and never comes here."""
    if not is_first_operand(op, read) or graph.values[read].batch_dim != 1:
        return None
    return mixed(graph, read, write, range(2, len(sizes(graph, read))))


def _over_dim(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """Softmax and running sums: mixed along one dimension."""
    dims = dims_of(argument(op, "dim"))
    return mixed(graph, read, write, dims) if dims and is_first_operand(op, read) else None


def _reduction(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    dims = dims_of(argument(op, "dim"))
    if not dims or not is_first_operand(op, read):
        return None
    before, after = sizes(graph, read), sizes(graph, write)
    gone = {d % len(before) for d in dims}
    if len(after) == len(before):
        return along(graph, read, write, [None if d in gone else d for d in range(len(before))])
    places = iter(range(len(before)))
    return along(graph, read, write, [None if d in gone else next(places) for d in range(len(before))])


def _gated(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """GLU: an output sees its own place in both halves."""
    before, after = sizes(graph, read), sizes(graph, write)
    dim = int(argument(op, "dim")) % len(before)
    half = before[dim] // 2
    if not is_first_operand(op, read) or after != (*before[:dim], half, *before[dim + 1 :]):
        return None
    pairs = tuple((1 << i) | (1 << (i + half)) for i in range(half))
    links = along(graph, read, write, [None if d == dim else d for d in range(len(before))])
    return None if links is None else tuple({dim: pairs} if d == dim else link for d, link in enumerate(links))


_REDUCTIONS = (
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim,
    aten.logsumexp.default, aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.prod.dim_int,
    aten.linalg_vector_norm.default, aten.argmax.default,
)  # fmt: skip

RULES: dict[Any, LinkRule] = {
    **dict.fromkeys((aten._to_copy.default, aten.alias.default, aten.lift_fresh.default), _same_place),
    aten._prelu_kernel.default: broadcast,
    aten._native_batch_norm_legit_no_training.default: _same_place,
    **dict.fromkeys(
        (aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten._native_batch_norm_legit.no_stats),
        _batch_norm,
    ),
    **dict.fromkeys((aten.native_layer_norm.default, aten._fused_rms_norm.default), _over_the_last),
    aten.native_group_norm.default: _group_norm,
    **dict.fromkeys(
        (aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default, aten.cumsum.default,
         aten.cumprod.default, aten.logcumsumexp.default, aten.sort.default, aten.sort.stable),
        _over_dim,
    ),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    aten.glu.default: _gated,
}  # fmt: skip

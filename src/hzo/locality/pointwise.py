"""Operations that keep places apart, or mix them along whole dimensions: elementwise, norms, softmax, reductions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from hzo.adjoints.common import argument, is_first_operand
from hzo.finite_differences import Links
from hzo.locality.common import Rule, along, dims_of, functions, mixed, sizes
from hzo.tracing import Graph, Operation


def broadcast(graph: Graph, _: Operation, read: int, write: int) -> Links | None:
    """Place by place, shapes aligned at their ends."""
    before, after = sizes(graph, read), sizes(graph, write)
    shift = len(after) - len(before)
    return along(graph, read, write, [d + shift for d in range(len(before))]) if shift >= 0 else None


def _same_place(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    return mixed(graph, read, write, ()) if is_first_operand(graph, op, read) else None


def _batch_norm(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """With its running statistics; with those of the batch, samples are coupled and nothing is promised."""
    module: Any = op.module
    by_batch = module.training or module.running_mean is None
    return None if by_batch else _same_place(graph, op, read, write)


def _functional_batch_norm(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    training = argument(op, 5, "training", False)
    return _same_place(graph, op, read, write) if training is False else None


def _over_the_last(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """Layer and RMS norm: statistics over the last dimensions."""
    module: Any = op.module
    shape = module.normalized_shape if module is not None else argument(op, 1, "normalized_shape")
    across = range(-len(tuple(shape)), 0)
    return mixed(graph, read, write, across) if is_first_operand(graph, op, read) else None


def _group_norm(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """Statistics over groups of channels, and all of space."""
    module: Any = op.module
    groups = int(module.num_groups if module is not None else argument(op, 1, "num_groups"))
    links = mixed(graph, read, write, range(2, len(sizes(graph, read))))
    if links is None or not is_first_operand(graph, op, read) or graph.values[read].batch_dim != 0:
        return None
    channels = sizes(graph, read)[1]
    return (links[0], {1: blocks(channels, channels, groups)}, *links[2:])


def blocks(rows: int, columns: int, groups: int) -> tuple[int, ...]:
    """Rows and columns in equal groups; a row meets the columns of its own."""
    width, height = columns // groups, rows // groups
    return tuple(((1 << width) - 1) << (row // height * width) for row in range(rows))


def _instance_norm(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    holds = is_first_operand(graph, op, read) and graph.values[read].batch_dim == 0
    return mixed(graph, read, write, range(2, len(sizes(graph, read)))) if holds else None


def _over_dim(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """Softmax and running sums: mixed along one dimension."""
    module: Any = op.module
    dims = dims_of(module.dim if module is not None else argument(op, 1, "dim"))
    return mixed(graph, read, write, dims) if dims and is_first_operand(graph, op, read) else None


def _softmax_2d(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    return mixed(graph, read, write, (-3,)) if is_first_operand(graph, op, read) else None


def _reduction(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    dims = dims_of(argument(op, 1, "dim"))
    if not dims or not is_first_operand(graph, op, read):
        return None
    before, after = sizes(graph, read), sizes(graph, write)
    gone = {d % len(before) for d in dims}
    if len(after) == len(before):
        return along(graph, read, write, [None if d in gone else d for d in range(len(before))])
    places = iter(range(len(before)))
    return along(graph, read, write, [None if d in gone else next(places) for d in range(len(before))])


def _gated(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """GLU: an output sees its own place in both halves."""
    module: Any = op.module
    dim = module.dim if module is not None else argument(op, 1, "dim", -1)
    before, after = sizes(graph, read), sizes(graph, write)
    dim %= len(before)
    half = before[dim] // 2
    if not is_first_operand(graph, op, read) or after != (*before[:dim], half, *before[dim + 1 :]):
        return None
    pairs = tuple((1 << i) | (1 << (i + half)) for i in range(half))
    links = along(graph, read, write, [None if d == dim else d for d in range(len(before))])
    return None if links is None else tuple({dim: pairs} if d == dim else link for d, link in enumerate(links))


MODULES: dict[type[nn.Module], Rule] = {
    nn.PReLU: _same_place,
    **dict.fromkeys((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout, nn.RReLU), _same_place),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _over_the_last),
    nn.GroupNorm: _group_norm,
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_norm),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, nn.Softmin), _over_dim),
    nn.Softmax2d: _softmax_2d,
    nn.GLU: _gated,
}
FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(functions("prelu", "dropout1d", "dropout2d", "dropout3d", "rrelu"), _same_place),
    F.batch_norm: _functional_batch_norm,
    **dict.fromkeys((F.layer_norm, F.rms_norm), _over_the_last),
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    **dict.fromkeys(functions("softmax", "log_softmax", "softmin"), _over_dim),
    **dict.fromkeys(functions("cumsum", "cumprod", "logcumsumexp"), _over_dim),
    **dict.fromkeys(functions("mean", "sum", "amax", "amin", "max", "min", "logsumexp", "var", "std"), _reduction),
    F.glu: _gated,
}

"""Operations that copy places: reshape, permute, concatenate, pad, index. Where each place comes from shows when the
operation runs on their numbers."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hzo.execution import VIEWS
from hzo.finite_differences import Links, matrix_of, without_full
from hzo.locality.common import LinkRule, sizes
from hzo.tape import Ref
from hzo.tape.aliases import read_window, write_window
from hzo.tape.record import flat
from hzo.tracing import Graph, GraphOperation

aten = torch.ops.aten
_LARGEST = 2**22  # elements of an operand whose places are numbered
_known: WeakKeyDictionary[Graph, dict[Any, Links | None]] = WeakKeyDictionary()


def by_numbers(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    """Links of an operation that copies places, found once."""
    known = _known.setdefault(graph, {})
    key = _call(graph, op, read, write)
    if key not in known:
        known[key] = _links(graph, op, read, write)
    return known[key]


def _call(graph: Graph, op: GraphOperation, read: int, write: int) -> Any:
    """What the links depend on: blocks of a network that are alike have the same."""

    def told(leaf: Any) -> Any:
        if type(leaf) is tuple:
            return tuple([told(item) for item in leaf])
        if type(leaf) is not Ref:
            return leaf
        about = graph.values[leaf.value]
        if not about.floating:  # what it picks depends on its numbers
            raise LookupError
        return about.shape, about.batch_dim, about.outer, about.batched, leaf.value == read

    about = graph.values[write]
    place = op.results.index(write), about.shape, about.batch_dim, about.outer
    try:
        key = (op.target, told(op.args), tuple((k, told(v)) for k, v in op.kwargs.items()), place)
        hash(key)
    except (LookupError, TypeError):
        return op.index, read, write
    return key


def _links(graph: Graph, op: GraphOperation, read: int, write: int) -> Links | None:
    places = _places(graph, op, read, write)
    if places is None:
        return None
    before, after = sizes(graph, read), sizes(graph, write)
    copied = (places >= 0).nonzero(as_tuple=True)
    sources = torch.unravel_index(places[copied], before)
    links = []
    for size, source in zip(before, sources, strict=True):
        found = {}
        for b, target in enumerate(copied):
            pairs = torch.unique(target * size + source).tolist()
            found[b] = matrix_of(after[b], (divmod(pair, size) for pair in pairs))
        links.append(without_full(found, size))
    return tuple(links)


@torch.no_grad()
def _places(graph: Graph, op: GraphOperation, read: int, write: int) -> Tensor | None:
    """For every place of the first sample of the result the place of the operand that it copies, −1 where it copies
    none. The operation runs twice, with other numbers: what stays the same is a constant."""
    value, result = graph.values[read], graph.values[write]
    elements, one = value.numel, value.per_sample
    if not value.floating or elements > _LARGEST or value.batch_dim is None or result.batch_dim is None:
        return None
    numbers = torch.arange(1, elements + 1, dtype=torch.float64, device="cpu")
    numbers = value.joined(numbers.view(graph.batch, *value.sample_shape)).reshape(value.shape)

    def fill(leaf: Any, numbers: Tensor) -> Any:
        if type(leaf) is tuple:
            return tuple([fill(item, numbers) for item in leaf])
        if type(leaf) is not Ref:
            return leaf
        if leaf.value == read:
            return numbers
        about, constant = graph.values[leaf.value], graph.constants.get(leaf.value)
        if about.floating:
            return torch.zeros(about.shape, dtype=torch.float64, device="cpu")
        if constant is None or about.batched:  # what values pick is for values to say
            raise LookupError
        return constant.cpu()

    def run(numbers: Tensor) -> Tensor:
        args = fill(op.args, numbers)
        if op.target in VIEWS:  # the numbers may lie in memory otherwise than the operand
            args = (args[0].contiguous(), *args[1:])
        made = flat(op.target(*args, **{k: fill(v, numbers) for k, v in op.kwargs.items()}))
        return result.sample(made[op.results.index(write)], 0, graph.batch)

    try:
        first, second = run(numbers), run(numbers + 2 * elements)
    except LookupError:
        return None
    if tuple(first.shape) != result.sample_shape:
        return None
    places = torch.where(second - first == 2 * elements, first.long() - 1, -1)
    return places if bool((places < one).all()) else None


_TARGETS = (
    aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.t.default, aten.transpose.int,
    aten.permute.default, aten.slice.Tensor, aten.select.int, aten.diagonal.default, aten.unfold.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor, aten.unbind.int, aten.cat.default,
    aten.stack.default, aten.expand.default, aten.repeat.default, aten.flip.default, aten.roll.default,
    aten.rot90.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default,
    aten.tril.default, aten.triu.default, aten.im2col.default, aten.constant_pad_nd.default,
    aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default,
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default,
    aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default, aten.index.Tensor,
    aten.index_select.default, aten.gather.default, aten.as_strided.default, read_window, write_window,
)  # fmt: skip
RULES: dict[Any, LinkRule] = dict.fromkeys(_TARGETS, by_numbers)

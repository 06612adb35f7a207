"""Operations that copy places: reshape, permute, concatenate, pad, index. Where each place comes from shows when the
operation runs on their numbers."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.finite_differences import Links, matrix_of, without_full
from hzo.locality.common import Rule, functions, sizes
from hzo.tracing import Attribute, Extent, Graph, Operation, Ref, leaves, map_arguments, tensors_in

_LARGEST = 2**22  # elements of an operand whose places are numbered
_known: WeakKeyDictionary[Graph, dict[tuple[int, int, int], Links | None]] = WeakKeyDictionary()


def _by_numbers(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    known = _known.setdefault(graph, {})
    key = (op.index, read, write)
    if key not in known:
        known[key] = _links(graph, op, read, write)
    return known[key]


def _links(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
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
def _places(graph: Graph, op: Operation, read: int, write: int) -> Tensor | None:
    """For every place of one sample of the result the place of the operand that it copies, −1 where it copies none.

    The operation runs on two samples, so that a batch of one cannot be taken for an axis of size one, and twice with
    other numbers: what stays the same is a constant.
    """
    value, result = graph.values[read], graph.values[write]
    elements = value.per_sample
    if elements > _LARGEST or value.batch_dim is None or result.batch_dim is None:
        return None
    one = torch.arange(1, elements + 1, dtype=torch.float64, device="cpu").view(value.sample_shape)
    numbers = torch.cat([one, one + elements], value.batch_dim)

    def fill(leaf: Any, numbers: Tensor) -> Any:
        if isinstance(leaf, Extent):
            return 2 * leaf.per_sample
        if leaf == Ref(read):
            return numbers
        if isinstance(leaf, Attribute):
            return torch.zeros(leaf.get().shape, dtype=torch.float64, device="cpu")
        if isinstance(leaf, Ref):
            other = graph.values[leaf.value]
            shape = [s // graph.batch * 2 if d == other.batch_dim else s for d, s in enumerate(other.shape)]
            return torch.zeros(shape, dtype=torch.float64, device="cpu")
        return leaf

    def run(numbers: Tensor) -> Tensor:
        args, kwargs = map_arguments(lambda leaf: fill(leaf, numbers), (op.args, op.kwargs))
        found = dict(zip(op.writes, tensors_in(op.target(*args, **kwargs)), strict=True))[write]
        return found.narrow(result.batch_dim or 0, 0, found.shape[result.batch_dim or 0] // 2)

    first, second = run(numbers), run(numbers + 2 * elements)
    if tuple(first.shape) != result.sample_shape:
        return None
    places = torch.where(second - first == 2 * elements, first.long() - 1, -1)
    return places if bool((places < elements).all()) else None


def _indexed(graph: Graph, op: Operation, read: int, write: int) -> Links | None:
    """Integers, slices, None and Ellipsis; what tensors pick is for values to say."""
    return (
        None
        if any(isinstance(leaf, (Ref, Attribute, Tensor)) for leaf in leaves(op.args[1:]))
        else _by_numbers(graph, op, read, write)
    )


_NAMES = (
    "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "swapaxes", "swapdims", "permute",
    "t", "movedim", "moveaxis", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "chunk", "split",
    "unbind", "narrow", "select", "expand", "expand_as", "view_as", "reshape_as", "flip", "roll", "repeat", "tile",
    "tensor_split", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "tril", "triu",
    "diagonal", "rot90", "unfold",
)  # fmt: skip

MODULES: dict[type[nn.Module], Rule] = dict.fromkeys(
    (
        nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
        nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
        nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
        nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
    ),
    _by_numbers,
)  # fmt: skip
FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(functions(*_NAMES), _by_numbers),
    F.pad: _by_numbers,
    Tensor.__getitem__: _indexed,
}

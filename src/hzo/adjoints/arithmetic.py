"""Sums, products and reindexing: the Jacobian is the identity, another activity, or a map of places.

The table of parameter rules holds the same local derivatives; here the operand is an activity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.adjoints.common import Adjoint, Call, argument, given, is_first_operand, only_options, slots_of
from hzo.parameter_rules import find_rule
from hzo.tracing import Attribute, Extent, Graph, Operation, Ref, leaves, map_arguments, tensors_in

# In place, the left operand is overwritten and the rule of the same function out of place applies to it as well.
_OUT_OF_PLACE: dict[Any, Any] = {
    Tensor.add_: Tensor.add,
    Tensor.__iadd__: Tensor.add,
    Tensor.sub_: Tensor.sub,
    Tensor.__isub__: Tensor.sub,
    Tensor.mul_: Tensor.mul,
    Tensor.__imul__: Tensor.mul,
}


def _has_local_rule(graph: Graph, op: Operation, value: int) -> bool:
    args, kwargs = graph.arguments_without_memory(op)
    slots, target = slots_of(op, value), _OUT_OF_PLACE.get(op.target, op.target)
    nested = sum(isinstance(leaf, Ref) and leaf.value == value for leaf in leaves((op.args, op.kwargs)))
    return nested == len(slots) > 0 and find_rule(target, args, kwargs, frozenset(slots)) is not None


def _no_weights(graph: Graph, op: Operation, value: int) -> bool:
    """A product with a weight is measured instead (elementwise or affine), not read."""
    found = [leaf for leaf in leaves((op.args, op.kwargs)) if isinstance(leaf, (Attribute, Ref))]
    shared = any(isinstance(leaf, Attribute) or not graph.values[leaf.value].batched for leaf in found)
    return not shared and _has_local_rule(graph, op, value)


def _by_local_rule(call: Call, value: int) -> Tensor:
    wanted, target = frozenset(slots_of(call.op, value)), _OUT_OF_PLACE.get(call.op.target, call.op.target)
    rule = find_rule(target, call.args, call.kwargs, wanted)
    assert rule is not None
    found = list(rule(target, call.args, call.kwargs, call.cotangent, wanted).values())
    return torch.stack(found).sum(0) if len(found) > 1 else found[0]


def _fills(graph: Graph, op: Operation, value: int) -> bool:
    return is_first_operand(graph, op, value) and only_options(op, "input", "mask", "value")


def _masked_fill(call: Call, value: int) -> Tensor:
    mask = given(call.args, call.kwargs, 1, "mask")
    return call.cotangent.masked_fill(mask, 0).sum_to_size(call.activity(value).shape)


def _chooses(graph: Graph, op: Operation, value: int) -> bool:
    return only_options(op, "condition", "input", "other")


def _where(call: Call, value: int) -> Tensor:
    condition = given(call.args, call.kwargs, 0, "condition")
    zero = torch.zeros((), dtype=call.dtype, device=call.cotangent.device)
    found = zero
    if argument(call.op, 1, "input") == Ref(value):
        found = found + torch.where(condition, call.cotangent, zero)
    if argument(call.op, 2, "other") == Ref(value):
        found = found + torch.where(condition, zero, call.cotangent)
    return found.expand_as(call.cotangent).sum_to_size(call.activity(value).shape)


def _same_places(graph: Graph, op: Operation, value: int) -> bool:
    """Not Tensor.view(dtype), which reads the bits as something else."""
    return not any(isinstance(leaf, torch.dtype) for leaf in leaves((op.args, op.kwargs)))


def _same_order(call: Call, value: int) -> Tensor:
    """An operand that only lends its shape (``view_as``) has a cotangent of zero."""
    shape, first = call.activity(value).shape, argument(call.op, 0, "input") == Ref(value)
    return call.cotangent.reshape(shape) if first else call.cotangent.new_zeros(shape)


def _nothing(call: Call, value: int) -> Tensor:
    """Only the shape of the operand is used."""
    return torch.zeros(call.activity(value).shape, dtype=call.dtype, device=call.cotangent.device)


def _places(call: Call, value: int) -> Tensor:
    """Carry the cotangent to where each output element was copied from.

    Which place that is shows when the operation runs on the numbers 1, 2, … of the places, and 0 for other tensors.
    """
    operand = call.activity(value)
    numbers = torch.arange(1, operand.numel() + 1, dtype=torch.float64, device=operand.device).view(operand.shape)
    templates = leaves((call.op.args, call.op.kwargs))

    def numbered(leaf: Any) -> Any:
        template = next(templates)
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        return numbers if template == Ref(value) else torch.zeros_like(leaf, dtype=torch.float64)

    args, kwargs = map_arguments(numbered, (call.args, call.kwargs))
    found = torch.zeros(operand.numel() + 1, dtype=call.dtype, device=operand.device)
    for written, output in zip(call.op.writes, tensors_in(call.op.target(*args, **kwargs)), strict=True):
        if written in call.cotangents:
            found.index_add_(0, output.reshape(-1).long(), call.cotangents[written].reshape(-1))
    return found[1:].view(operand.shape)


def _itself(call: Call, value: int) -> Tensor:
    """A swap of two dimensions, a flip, a triangle kept: each its own adjoint."""
    result: Tensor = call.again(value, call.cotangent)
    return result


def _permuted(call: Call, value: int) -> Tensor:
    """The order of the dimensions, seen on one that carries its number as its size."""
    ndim = call.cotangent.dim()
    order = call.again(value, torch.empty(tuple(range(ndim)), device="meta")).shape
    return call.cotangent.permute([list(order).index(d) for d in range(ndim)])


def _expanded(call: Call, value: int) -> Tensor:
    first = argument(call.op, 0, "input") == Ref(value)
    return call.cotangent.sum_to_size(call.activity(value).shape) if first else _nothing(call, value)


def _joins(graph: Graph, op: Operation, value: int) -> bool:
    return only_options(op, "tensors", "dim")


def _joined(call: Call, value: int) -> list[tuple[int, Tensor]]:
    """Where in the list the value stands."""
    templates, tensors = argument(call.op, 0, "tensors"), given(call.args, call.kwargs, 0, "tensors")
    return [(k, t) for k, (template, t) in enumerate(zip(templates, tensors, strict=True)) if template == Ref(value)]


def _concatenated(call: Call, value: int) -> Tensor:
    dim, tensors = argument(call.op, 1, "dim", 0), given(call.args, call.kwargs, 0, "tensors")
    # An empty vector may be concatenated with anything, and takes no place.
    sizes = [0 if t.dim() == 1 and t.numel() == 0 else t.shape[dim] for t in tensors]
    parts = [call.cotangent.narrow(dim, sum(sizes[:k]), sizes[k]) for k, _ in _joined(call, value)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _stacked(call: Call, value: int) -> Tensor:
    dim = argument(call.op, 1, "dim", 0)
    parts = [call.cotangent.select(dim, k) for k, _ in _joined(call, value)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _parts(call: Call, value: int) -> Tensor:
    """Disjoint views of the operand: write each cotangent into its view."""
    found = torch.zeros(call.activity(value).shape, dtype=call.dtype, device=call.activity(value).device)
    for written, view in zip(call.op.writes, tensors_in(call.again(value, found)), strict=True):
        if written in call.cotangents:
            view.copy_(call.cotangents[written])
    return found


def _indexed(call: Call, value: int) -> Tensor:
    """Integers, slices, None and Ellipsis give a view; tensors, lists and booleans a copy, and may repeat places."""
    index = call.op.args[1]
    items = index if isinstance(index, tuple) else (index,)
    basic = all(item is None or item is Ellipsis or type(item) in (int, Extent, slice) for item in items)
    return (_parts if basic else _places)(call, value)


def _pads(graph: Graph, op: Operation, value: int) -> bool:
    return is_first_operand(graph, op, value) and only_options(op, "input", "pad", "mode", "value")


def _padded(call: Call, value: int) -> Tensor:
    """Constants beside the operand are cut off; negative padding is a cut, and puts zeros back."""
    if argument(call.op, 2, "mode", "constant") != "constant":
        return _places(call, value)
    return F.pad(call.cotangent, [-n for n in given(call.args, call.kwargs, 1, "pad")])


def _mean(call: Call, value: int) -> Tensor:
    operand = call.activity(value)
    expanded = _sum(call, value)
    return expanded * (call.cotangent.numel() / operand.numel())


def _sum(call: Call, value: int) -> Tensor:
    operand = call.activity(value)
    dims = argument(call.op, 1, "dim")
    keep = argument(call.op, 2, "keepdim", False)
    g = call.cotangent
    if dims is not None and not keep:
        for d in sorted(d % operand.dim() for d in ([dims] if isinstance(dims, int) else dims)):
            g = g.unsqueeze(d)
    return g.expand_as(operand)


def _over_dimensions(graph: Graph, op: Operation, value: int) -> bool:
    dims = argument(op, 1, "dim")
    named = isinstance(dims, int) or (isinstance(dims, (tuple, list)) and len(dims) > 0)
    return named and is_first_operand(graph, op, value) and only_options(op, "input", "dim", "keepdim")


def _functions(*names: str) -> list[Any]:
    """All functions of these names that torch offers."""
    spaces = (torch, Tensor, F)
    return [found for name in names for space in spaces if (found := getattr(space, name, None)) is not None]


_SUMS = ("add", "add_", "sub", "sub_", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "neg")
_PRODUCTS = (
    "mul",
    "mul_",
    "multiply",
    "__mul__",
    "__rmul__",
    "__imul__",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "bmm",
    "mm",
)
_RESHAPES = (
    "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "view_as", "reshape_as",
)  # fmt: skip
_OWN_ADJOINTS = ("transpose", "swapaxes", "swapdims", "t", "flip", "tril", "triu")
_COPIES = (
    "movedim", "moveaxis", "hstack", "vstack", "index_select", "roll", "repeat", "tile", "repeat_interleave",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "diagonal", "rot90", "take_along_dim", "gather",
)  # fmt: skip
_PARTS = ("chunk", "split", "tensor_split", "unbind", "narrow", "select")
_SHAPES_ONLY = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")

_SUM = Adjoint("sum", _by_local_rule, _has_local_rule, reads="shapes")
_PRODUCT = Adjoint("bilinear", _by_local_rule, _no_weights, reads="inputs")
_SAME_ORDER = Adjoint("reindexing", _same_order, _same_places, reads="shapes")
_REINDEXING = Adjoint("reindexing", _places, reads="shapes")
_OWN_ADJOINT = Adjoint("reindexing", _itself, is_first_operand, reads="shapes")
_PERMUTED = Adjoint("reindexing", _permuted, is_first_operand, reads="shapes")

FUNCTIONS: dict[Any, Adjoint] = {
    **dict.fromkeys(_functions(*_SUMS), _SUM),
    **dict.fromkeys(_functions(*_PRODUCTS), _PRODUCT),
    **dict.fromkeys(_functions(*_COPIES), _REINDEXING),
    **dict.fromkeys(_functions(*_RESHAPES), _SAME_ORDER),
    **dict.fromkeys(_functions(*_OWN_ADJOINTS), _OWN_ADJOINT),
    **dict.fromkeys(_functions("permute"), _PERMUTED),
    # How reading the attributes .T and .mT reaches the recording.
    **dict.fromkeys((Tensor.T.__get__, Tensor.mT.__get__), _PERMUTED),  # type: ignore[attr-defined]
    **dict.fromkeys(_functions("expand", "expand_as"), Adjoint("reindexing", _expanded, reads="shapes")),
    **dict.fromkeys(
        _functions("cat", "concat", "concatenate"), Adjoint("reindexing", _concatenated, _joins, reads="shapes")
    ),
    torch.stack: Adjoint("reindexing", _stacked, _joins, reads="shapes"),
    **dict.fromkeys(_functions(*_PARTS), Adjoint("reindexing", _parts, is_first_operand, reads="shapes")),
    **dict.fromkeys(_functions(*_SHAPES_ONLY), Adjoint("reindexing", _nothing, is_first_operand, reads="shapes")),
    Tensor.__getitem__: Adjoint("reindexing", _indexed, is_first_operand, reads="shapes"),
    F.pad: Adjoint("reindexing", _padded, _pads, reads="shapes"),
    **dict.fromkeys(
        _functions("masked_fill", "masked_fill_"), Adjoint("selection", _masked_fill, _fills, reads="shapes")
    ),
    torch.where: Adjoint("selection", _where, _chooses, reads="shapes"),
    **dict.fromkeys(_functions("mean"), Adjoint("sum", _mean, _over_dimensions, reads="shapes")),
    **dict.fromkeys(_functions("sum"), Adjoint("sum", _sum, _over_dimensions, reads="shapes")),
}

MODULES: dict[type[nn.Module], Adjoint] = {
    nn.Identity: _SAME_ORDER,
    nn.Flatten: _SAME_ORDER,
    nn.Unflatten: _SAME_ORDER,
    nn.PixelShuffle: _REINDEXING,
    nn.PixelUnshuffle: _REINDEXING,
    nn.ChannelShuffle: _REINDEXING,
    nn.ZeroPad1d: _REINDEXING,
    nn.ZeroPad2d: _REINDEXING,
    nn.ReflectionPad2d: _REINDEXING,
    nn.ReplicationPad2d: _REINDEXING,
    nn.CircularPad2d: _REINDEXING,
}

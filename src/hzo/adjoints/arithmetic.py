"""Sums, products and reindexing: the Jacobian is the identity, another activity, or a map of places.

The table of parameter rules holds the same local derivatives; here the operand is an activity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.adjoints.common import Adjoint, Call, argument, is_first_operand, slots_of
from hzo.chain import Attribute, Graph, Operation, Ref, leaves, map_arguments, tensors_in
from hzo.parameter_rules import find_rule


def _stand_in(graph: Graph, leaf: Any) -> Any:
    if isinstance(leaf, Ref):
        value = graph.values[leaf.value]
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(leaf, Attribute):
        return leaf.get()
    return leaf


def _has_local_rule(graph: Graph, op: Operation, value: int) -> bool:
    args, kwargs = map_arguments(lambda leaf: _stand_in(graph, leaf), (op.args, op.kwargs))
    slots = slots_of(op, value)
    nested = sum(isinstance(leaf, Ref) and leaf.value == value for leaf in leaves((op.args, op.kwargs)))
    return nested == len(slots) > 0 and find_rule(op.target, args, kwargs, frozenset(slots)) is not None


def _no_weights(graph: Graph, op: Operation, value: int) -> bool:
    """A product with a weight is measured instead (elementwise or affine), not read."""
    found = [leaf for leaf in leaves((op.args, op.kwargs)) if isinstance(leaf, (Attribute, Ref))]
    shared = any(isinstance(leaf, Attribute) or not graph.values[leaf.value].batched for leaf in found)
    return not shared and _has_local_rule(graph, op, value)


def _by_local_rule(call: Call, value: int) -> Tensor:
    wanted = frozenset(slots_of(call.op, value))
    rule = find_rule(call.op.target, call.args, call.kwargs, wanted)
    assert rule is not None
    found = list(rule(call.op.target, call.args, call.kwargs, call.cotangent, wanted).values())
    return torch.stack(found).sum(0) if len(found) > 1 else found[0]


def _masked_fill(call: Call, value: int) -> Tensor:
    return call.cotangent.masked_fill(call.args[1], 0)


def _where(call: Call, value: int) -> Tensor:
    condition = call.args[0]
    zero = torch.zeros((), dtype=call.dtype, device=call.cotangent.device)
    found = sum(
        (
            torch.where(condition, call.cotangent, zero) if slot == 1 else torch.where(condition, zero, call.cotangent)
            for slot in slots_of(call.op, value)
        ),
        start=zero,
    )
    return found.sum_to_size(call.activity(value).shape)


def _same_order(call: Call, value: int) -> Tensor:
    return call.cotangent.reshape(call.activity(value).shape)


def _places(call: Call, value: int) -> Tensor:
    """Carry the cotangent to where each output element was copied from.

    Which place that is shows when the operation runs on the numbers 1, 2, … of the places, and 0 for other operands.
    """
    operand = call.activity(value)
    numbers = torch.arange(1, operand.numel() + 1, dtype=torch.float64, device=operand.device).view(operand.shape)
    templates = leaves((call.op.args, call.op.kwargs))

    def numbered(leaf: Any) -> Any:
        template = next(templates)
        if not (isinstance(leaf, Tensor) and isinstance(template, (Ref, Attribute)) and leaf.is_floating_point()):
            return leaf
        return numbers if template == Ref(value) else torch.zeros_like(leaf, dtype=torch.float64)

    args, kwargs = map_arguments(numbered, (call.args, call.kwargs))
    found = torch.zeros(operand.numel() + 1, dtype=call.dtype, device=operand.device)
    for written, output in zip(call.op.writes, tensors_in(call.op.target(*args, **kwargs)), strict=True):
        if written in call.cotangents:
            found.index_add_(0, output.reshape(-1).long(), call.cotangents[written].reshape(-1))
    return found[1:].view(operand.shape)


def _transposed(call: Call, value: int) -> Tensor:
    """A swap of two dimensions is its own inverse."""
    result: Tensor = call.op.target(call.cotangent, *call.args[1:], **call.kwargs)
    return result


def _permuted(call: Call, value: int) -> Tensor:
    """The order of the dimensions, seen on one that carries its number as its size."""
    ndim = call.cotangent.dim()
    order = call.op.target(torch.empty(tuple(range(ndim)), device="meta"), *call.args[1:], **call.kwargs).shape
    return call.cotangent.permute([list(order).index(d) for d in range(ndim)])


def _concatenated(call: Call, value: int) -> Tensor:
    dim = argument(call.op, 1, "dim", 0)
    found, start = torch.zeros((), dtype=call.dtype, device=call.cotangent.device), 0
    for template, tensor in zip(call.op.args[0], call.args[0], strict=True):
        if template == Ref(value):
            found = found + call.cotangent.narrow(dim, start, tensor.shape[dim])
        start += tensor.shape[dim]
    return found


def _parts(call: Call, value: int) -> Tensor:
    """Disjoint views of the operand: write each cotangent into its view."""
    found = torch.zeros(call.activity(value).shape, dtype=call.dtype, device=call.activity(value).device)
    views = call.op.target(found, *call.args[1:], **call.kwargs)
    for written, view in zip(call.op.writes, tensors_in(views), strict=True):
        if written in call.cotangents:
            view.copy_(call.cotangents[written])
    return found


def _indexed(call: Call, value: int) -> Tensor:
    """Integers, slices, None and Ellipsis give a view; tensors and lists may repeat places."""
    index = call.op.args[1]
    items = index if isinstance(index, tuple) else (index,)
    basic = all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)
    return (_parts if basic else _places)(call, value)


def _pads_with_zeros(graph: Graph, op: Operation, value: int) -> bool:
    mode, fill = argument(op, 2, "mode", "constant"), argument(op, 3, "value")
    return is_first_operand(graph, op, value) and (mode != "constant" or fill in (None, 0))


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
    return is_first_operand(graph, op, value) and argument(op, 1, "dim") is not None and "dtype" not in op.kwargs


def _functions(*names: str) -> list[Any]:
    """All functions of these names that torch offers."""
    spaces = (torch, Tensor, F)
    return [found for name in names for space in spaces if (found := getattr(space, name, None)) is not None]


_SUMS = ("add", "add_", "sub", "sub_", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "neg")
_PRODUCTS = ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "matmul", "__matmul__", "__rmatmul__", "bmm")
_RESHAPES = (
    "reshape",
    "view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "clone",
    "view_as",
    "reshape_as",
)
_COPIES = (
    "t", "movedim", "moveaxis", "expand", "expand_as", "stack", "hstack", "vstack", "index_select", "flip", "roll",
    "repeat", "tile", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "tril", "triu",
    "diagonal", "rot90", "take_along_dim", "gather",
)  # fmt: skip
_PARTS = ("chunk", "split", "tensor_split", "unbind", "narrow", "select")

_SUM = Adjoint("sum", _by_local_rule, _has_local_rule)
_PRODUCT = Adjoint("bilinear", _by_local_rule, _no_weights)
_SAME_ORDER = Adjoint("reindexing", _same_order, is_first_operand)
_REINDEXING = Adjoint("reindexing", _places)

FUNCTIONS: dict[Any, Adjoint] = {
    **dict.fromkeys(_functions(*_SUMS), _SUM),
    **dict.fromkeys(_functions(*_PRODUCTS), _PRODUCT),
    **dict.fromkeys(_functions(*_COPIES), _REINDEXING),
    **dict.fromkeys(_functions(*_RESHAPES), _SAME_ORDER),
    **dict.fromkeys(
        _functions("transpose", "swapaxes", "swapdims"), Adjoint("reindexing", _transposed, is_first_operand)
    ),
    **dict.fromkeys(_functions("permute"), Adjoint("reindexing", _permuted, is_first_operand)),
    **dict.fromkeys(_functions("cat", "concat", "concatenate"), Adjoint("reindexing", _concatenated)),
    **dict.fromkeys(_functions(*_PARTS), Adjoint("reindexing", _parts, is_first_operand)),
    Tensor.__getitem__: Adjoint("reindexing", _indexed, is_first_operand),
    F.pad: Adjoint("reindexing", _places, _pads_with_zeros),
    **dict.fromkeys(_functions("masked_fill", "masked_fill_"), Adjoint("selection", _masked_fill, is_first_operand)),
    torch.where: Adjoint("selection", _where),
    **dict.fromkeys(_functions("mean"), Adjoint("sum", _mean, _over_dimensions)),
    **dict.fromkeys(_functions("sum"), Adjoint("sum", _sum, _over_dimensions)),
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

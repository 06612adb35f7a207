"""Parameters of arithmetic with broadcasting, of reindexing, and PReLU. Cost: one pass over the cotangent."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.parameter_rules.common import Arguments, Entry, lift


def _to_operands(a: Arguments, wanted: frozenset[str], slopes: dict[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Undo broadcasting: what reaches each operand, summed to its shape."""
    return {name: slopes[name]().sum_to_size(a[name].shape) for name in wanted}


def _add(sign: int, a: Arguments, g: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """input ± alpha · other."""
    scale = sign * a.get("alpha", 1)
    return _to_operands(a, wanted, {"input": lambda: g, "other": lambda: scale * g})


def _mul(a: Arguments, g: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    x, y = lift(a, "input", g), lift(a, "other", g)
    return _to_operands(a, wanted, {"input": lambda: g * y, "other": lambda: g * x})


def _div(a: Arguments, g: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    x, y = lift(a, "input", g), lift(a, "other", g)
    return _to_operands(a, wanted, {"input": lambda: g / y, "other": lambda: -g * x / y.square()})


def _neg(_: Arguments, g: Tensor, __: frozenset[str]) -> dict[str, Tensor]:
    return {"input": -g}


def _prelu(a: Arguments, g: Tensor, _: frozenset[str]) -> dict[str, Tensor]:
    """The slope belongs to the negative part; one for all channels, or one for each along dimension 1."""
    product = g * lift(a, "input", g).clamp(max=0)
    if a["weight"].numel() == 1:
        return {"weight": product.sum().view(a["weight"].shape)}
    return {"weight": product.sum([0, *range(2, product.ndim)])}


def _expand(a: Arguments, g: Tensor, _: frozenset[str]) -> dict[str, Tensor]:
    return {"input": g.sum_to_size(a["input"].shape)}


def _same_order(a: Arguments, g: Tensor, _: frozenset[str]) -> dict[str, Tensor]:
    return {"input": g.reshape(a["input"].shape)}


def _reindex(function: Callable[..., Tensor], a: Arguments, g: Tensor, _: frozenset[str]) -> dict[str, Tensor]:
    """Run the function on the positions of the elements: they say where each cotangent belongs."""
    parameter: Tensor = a["input"]
    positions = torch.arange(parameter.numel(), device=g.device).view(parameter.shape)
    options = {name: value for name, value in a.items() if name not in ("input", "rest")}
    found = function(positions, *a["rest"], **options).reshape(-1)
    return {"input": g.new_zeros(parameter.numel()).index_add_(0, found, g.reshape(-1)).view(parameter.shape)}


def _exact_division(a: Arguments) -> bool:
    return a.get("rounding_mode") is None


def _sizes_only(a: Arguments) -> bool:
    # Tensor.view(dtype) reads the bits of the parameter as something else.
    return not any(isinstance(value, torch.dtype) for value in (*a["rest"], *a.values()))


T = torch.Tensor
_BOTH, _FORWARD, _REVERSED = ("input", "other"), ("input", "other"), ("other", "input")
_SCALED = (*_FORWARD, "alpha")
_PLUS, _MINUS = partial(_add, 1), partial(_add, -1)


# In place, the left operand is overwritten: only the right one can be a parameter.
def _in_place(entry: Entry) -> Entry:
    return Entry(entry.rule, entry.names, ("other",), accepts=entry.accepts)


_ADD, _SUB = Entry(_PLUS, _SCALED, _BOTH), Entry(_MINUS, _SCALED, _BOTH)
_MUL = Entry(_mul, _FORWARD, _BOTH)
_DIV = Entry(_div, (*_FORWARD, "rounding_mode"), _BOTH, accepts=_exact_division)
_SHAPE_ONLY = Entry(_same_order, ("input",), ("input",), accepts=_sizes_only, variadic=True)

_ARITHMETIC: dict[tuple[Callable[..., Any], ...], Entry] = {
    (torch.add, T.add, T.__add__, T.__radd__, operator.add): _ADD,
    (T.add_, T.__iadd__, operator.iadd): _in_place(_ADD),
    (torch.sub, T.sub, T.__sub__, torch.subtract, T.subtract, operator.sub): _SUB,
    (T.sub_, T.__isub__, operator.isub): _in_place(_SUB),
    (T.__rsub__,): Entry(_MINUS, _REVERSED, _BOTH),
    (torch.mul, T.mul, T.__mul__, T.__rmul__, torch.multiply, T.multiply, operator.mul): _MUL,
    (T.mul_, T.__imul__, operator.imul): _in_place(_MUL),
    (torch.div, T.div, T.__truediv__, torch.divide, T.divide, operator.truediv): _DIV,
    (torch.true_divide, T.true_divide): Entry(_div, _FORWARD, _BOTH),
    (T.div_, T.__itruediv__, operator.itruediv): _in_place(_DIV),
    (T.__rtruediv__,): Entry(_div, _REVERSED, _BOTH),
    (torch.neg, T.neg, T.__neg__, operator.neg): Entry(_neg, ("input",), ("input",)),
    (F.prelu, torch.prelu): Entry(_prelu, ("input", "weight"), ("weight",)),
    (T.expand, T.expand_as): Entry(_expand, ("input",), ("input",), variadic=True),
    (T.contiguous, T.clone, T.float, T.double, T.half, T.bfloat16, T.type_as): _SHAPE_ONLY,
    (T.to,): Entry(_same_order, ("input",), ("input",), variadic=True),
    (torch.reshape, T.reshape, T.view, T.view_as, T.reshape_as, torch.flatten, T.flatten): _SHAPE_ONLY,
    (torch.unsqueeze, T.unsqueeze, torch.squeeze, T.squeeze, T.unflatten): _SHAPE_ONLY,
}
_REINDEXING: tuple[Callable[..., Any], ...] = (
    *(torch.transpose, T.transpose, torch.permute, T.permute, torch.t, T.t, torch.movedim, T.movedim),
    *(T.__getitem__, operator.getitem, torch.narrow, T.narrow, torch.select, T.select, T.repeat),
    *(torch.flip, T.flip, torch.roll, T.roll),
    # How reading the attribute .T reaches __torch_function__.
    *(T.T.__get__, T.mT.__get__),  # type: ignore[attr-defined]
)

MODULES: dict[type[nn.Module], Entry] = {
    nn.PReLU: Entry(_prelu, ("input",), ("weight",), attributes=("weight",)),
}
FUNCTIONS: dict[Callable[..., Any], Entry] = {
    **{function: entry for functions, entry in _ARITHMETIC.items() for function in functions},
    **{f: Entry(partial(_reindex, f), ("input",), ("input",), variadic=True) for f in _REINDEXING},
}

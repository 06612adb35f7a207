"""Operators on lists of tensors (``torch._foreach_add_``), one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_PREFIX = "aten::_foreach_"
_OTHER_NAMES = {"norm": "linalg_vector_norm"}
_BY_A_NUMBER = {"maximum": "clamp_min", "maximum_": "clamp_min_", "minimum": "clamp_max", "minimum_": "clamp_max_"}
_BY_KEYWORD = {"alpha", "dtype", "memory_format"}

Single = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A call on single tensors: operator, arguments, keywords."""


def on_lists(func: Any) -> bool:
    """Whether an operator does to each tensor of a list what another operator does to one."""
    name = func._schema.name
    if not name.startswith(_PREFIX):
        return False
    single = name.removeprefix(_PREFIX)
    return hasattr(aten, _OTHER_NAMES.get(single, single))


def singles(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Single]:
    """The calls on single tensors that a call on lists consists of."""
    name = func._schema.name.removeprefix(_PREFIX)
    given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    if isinstance(given.get("scalars"), Tensor):
        given["scalars"] = given["scalars"].tolist()
    lists = [key for key, value in given.items() if isinstance(value, (list, tuple))]
    for k in range(len(given[lists[0]])):
        one = {key: value[k] if key in lists else value for key, value in given.items() if value is not None}
        keywords = {key: one.pop(key) for key in _BY_KEYWORD & one.keys()}
        if name.startswith("addc"):
            keywords["value"] = one.pop("scalars", one.pop("value", 1))
        arguments = tuple(one.values())
        single = _BY_A_NUMBER[name] if name in _BY_A_NUMBER and not isinstance(arguments[1], Tensor) else name
        single = _OTHER_NAMES.get(single, single)
        overload = torch._C._jit_resolve_packet(f"aten::{single}", *arguments, **keywords)
        yield getattr(getattr(aten, single), overload or "default"), arguments, keywords

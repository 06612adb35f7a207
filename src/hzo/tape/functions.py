"""The form without side effects of an operator that writes to its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_cache: dict[Any, Callable[..., Any]] = {}


class OutOfPlace:
    """Runs an operator on copies of what it would change; returns its other results, then the changed copies.

    There is one object for each operator, so that two recordings of one step name the same target.
    """

    def __init__(self, func: Any, writes: tuple[int | str, ...]) -> None:
        self.func = func
        self.writes = writes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given: list[Any] = list(args)
        named = dict(kwargs)
        copies: list[Tensor] = []
        for slot in self.writes:
            if isinstance(slot, int) and slot < len(given):
                given[slot] = _copied(given[slot], copies)
            elif slot in named:
                named[str(slot)] = _copied(named[str(slot)], copies)
        result = self.func(*given, **named)
        results = () if result is None else result if isinstance(result, (tuple, list)) else (result,)
        if results and not any(r is c for r in results for c in copies):  # statistics, which are constants
            return result
        return (*(r for r in results if all(r is not c for c in copies)), *copies)

    def __repr__(self) -> str:
        return f"{self.func} out of place"


def _copied(argument: Any, copies: list[Tensor]) -> Any:
    """A copy of a tensor or of tensors in a list, added to ``copies`` as well."""
    if isinstance(argument, Tensor):
        copies.append(argument.clone())
        return copies[-1]
    return [_copied(a, copies) for a in argument] if isinstance(argument, (list, tuple)) else argument


def operator_of(target: Any) -> Any:
    """The operator that a target of the tape runs, on copies or as it is."""
    return target.func if type(target) is OutOfPlace else target


def out_of_place(func: Any, writes: tuple[int | str, ...]) -> Callable[..., Any]:
    """The operator that computes the same without writing, ``aten.add`` for ``aten.add_``; else a wrapper of copies."""
    if func not in _cache:
        namespace, _, name = func._schema.name.partition("::")
        found: Any = None
        if name.endswith("_") and not name.endswith("__"):
            packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
            found = None if packet is None else _same_arguments(packet, func)
        _cache[func] = found or OutOfPlace(func, writes)
    return _cache[func]


def _same_arguments(packet: Any, func: Any) -> Any:
    """The overload with the same arguments: of the same name where that has them; ``pow_.Scalar`` is another one's."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in sorted(packet.overloads(), key=lambda name: name != func._overloadname):
        overload = getattr(packet, name)
        if [(a.name, str(a.type)) for a in overload._schema.arguments] == wanted:
            return overload
    return None


def _rrelu_again(
    x: Tensor, noise: Tensor, lower: Any = 0.125, upper: Any = 1 / 3, training: bool = False, _: Any = None
) -> Tensor:
    """Random slopes once more: those that were drawn stand in the noise."""
    if not training:
        slope = (lower + upper) / 2
        return torch.where(x > 0, x, slope * x)
    return torch.where(x > 0, x, x * noise)


def replay_of(target: Callable[..., Any]) -> Callable[..., Any]:
    """What computes the same again, with the random numbers that a call drew where these stand among its operands."""
    if operator_of(target) is torch.ops.aten.rrelu_with_noise.default:
        return _rrelu_again
    return target

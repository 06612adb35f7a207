"""What happens to a call without a rule of its own: a measured slope, PyTorch's decomposition, or queries.

In this order. An operator that PyTorch tags ``pointwise`` has one slope per element, which two runs measure. Another
one that PyTorch knows a decomposition of is recorded again, as the calls it consists of. What is left is perturbed
element by element: twice as many runs as it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hzo.errors import TapeError
from hzo.rules.base import Call, Cotangents, Key, Rule, unbroadcast
from hzo.tape.record import flat


def fallback(target: Any) -> tuple[Rule, str]:
    """The rule of an operator that the table does not hold, and how it works: "slope", "decomposition" or "queries"."""
    if isinstance(target, torch._ops.OpOverload):
        if torch.Tag.pointwise in target.tags:
            return Rule(_by_slope, measures=True), "slope"
        decomposition = _decomposition(target)
        if decomposition is not None:
            return Rule(_by_decomposition(decomposition)), "decomposition"
    return Rule(_by_queries, measures=True), "queries"


def fallback_steps(x: Tensor, power: float = 1 / 3) -> Tensor:
    """A finite-difference step for each element: in proportion to its size, or where small to its surroundings.

    The surroundings are the median size of the elements that are not zero, which outliers and masks do not move.
    """
    size = x.abs()
    present = size[(size > 0) & size.isfinite()]
    scale = present.median() if present.numel() else size.new_ones(())
    steps: Tensor = torch.finfo(x.dtype).eps ** power * torch.maximum(size.nan_to_num(posinf=0), scale)
    return steps


def _operands(call: Call) -> Iterator[tuple[Key, int | None, Tensor]]:
    """The operands that need a cotangent: key, position within a list, tensor."""
    keys: list[Key] = [*range(len(call.op.args)), *call.op.kwargs]
    for key in keys:
        if not call.needs(key):
            continue
        given = call.kwargs[key] if isinstance(key, str) else call.args[key]
        if isinstance(given, Tensor):
            yield key, None, given
        else:
            for k, asked in enumerate(call.each(key)):
                if asked:
                    yield key, k, given[k]


def _with(call: Call, key: Key, k: int | None, tensor: Tensor) -> dict[Key, Any]:
    if k is None:
        return {key: tensor}
    given = call.kwargs[key] if isinstance(key, str) else call.args[key]
    return {key: tuple(tensor if j == k else t for j, t in enumerate(given))}


def _collect(call: Call, found: dict[Key, Any], key: Key, k: int | None, grad: Tensor) -> None:
    if k is None:
        found[key] = grad
    else:
        given = call.kwargs[key] if isinstance(key, str) else call.args[key]
        found.setdefault(key, [None] * len(given))[k] = grad


def _by_slope(call: Call) -> Cotangents:
    """``g`` times the slope of every element, measured by a central difference, one-sided at the edge of a domain."""
    if call.result.is_complex() or any(x.is_complex() for _, _, x in _operands(call)):
        return _by_queries(call)  # a complex slope is a matrix of four
    found: dict[Key, Any] = {}
    for key, k, x in _operands(call):
        wide = x.expand(call.result.shape) if x.shape != call.result.shape else x
        steps = fallback_steps(wide)
        above, below = wide + steps, wide - steps
        upper = call.measure(_with(call, key, k, above), above)
        lower = call.measure(_with(call, key, k, below), below)
        slope = (upper - lower) / (above - below)
        if not bool(slope.isfinite().all()):
            here = call.result
            right, left = (upper - here) / (above - wide), (here - lower) / (wide - below)
            slope = torch.where(slope.isfinite(), slope, torch.where(right.isfinite(), right, left))
        _collect(call, found, key, k, unbroadcast(call.grad * slope, x))
    return found


def _decomposition(target: Any) -> Callable[..., Any] | None:
    table: dict[Any, Callable[..., Any]] = import_module("torch._decomp").decomposition_table  # few calls come here
    found = table.get(target)
    if found is not None and getattr(found, "__module__", "").startswith("torch._decomp"):  # not of PyTorch's prims
        return found
    if torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"):
        decompose: Callable[..., Any] = target.decompose
        return decompose
    return None


def _by_decomposition(decomposition: Callable[..., Any]) -> Callable[[Call], Cotangents]:
    def rule(call: Call) -> Cotangents:
        return call.engine.again(call, decomposition)

    return rule


def _by_queries(call: Call) -> Cotangents:
    """Central differences, one element at a time: twice as many runs as the operands have elements."""
    found: dict[Key, Any] = {}
    if any(r is None and g is not None for r, g in zip(call.out, call.grads, strict=True)):
        raise TapeError(f"{call.op.name}: a result was overwritten in place before it was needed")
    for key, k, x in _operands(call):
        if x.layout != torch.strided:
            raise TapeError(
                f"{call.op.name} of a sparse tensor has no rule; make the tensor dense before (x.to_dense()), or "
                "compute with its indices and values"
            )
        if x.device.type == "meta":
            raise TapeError(
                f"{call.op.name} has no rule, and what it read was overwritten in place; replace the in-place call "
                "behind it (x = x + y instead of x += y), or record with keep=True"
            )
        parts = torch.view_as_real(x.resolve_conj()).contiguous() if x.is_complex() else x
        gradient = _differences(call, key, k, x, parts)
        _collect(call, found, key, k, torch.view_as_complex(gradient) if x.is_complex() else gradient)
    return found


def _differences(call: Call, key: Key, k: int | None, x: Tensor, parts: Tensor) -> Tensor:
    """The derivative along every element of ``parts``: the operand, or its real and imaginary parts."""
    steps = fallback_steps(parts).flatten()
    base = parts.flatten()
    result = torch.zeros_like(base)

    def at(moved: Tensor) -> list[Any]:
        whole = moved.view(parts.shape)
        operand = torch.view_as_complex(whole) if x.is_complex() else whole
        return flat(call.measure(_with(call, key, k, operand), moved[:1]))

    for j in range(base.numel()):
        upper, lower = base.clone(), base.clone()
        upper[j] += steps[j]
        lower[j] -= steps[j]
        pairs = zip(at(upper), at(lower), call.grads, strict=True)
        total = sum(((up - down) * g.conj()).real.sum() for up, down, g in pairs if g is not None)
        result[j] = total / (upper[j] - lower[j])
    return result.view(parts.shape)

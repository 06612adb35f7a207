"""From (what an operation was given, the cotangent of what it returned) to the gradients of its parameters.

These closed rules are backprop's *local* step: they assume that a layer computes what its type says.
Everything else (a subclass, a hook, a parametrization, a function that no table holds) gets no rule, and its
parameters are perturbed.
Source: textbook; the paper, as far as we know it, uses the same local products.

The tables: products (linear.py), convolutions, normalizing layers, arithmetic and reindexing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hzo.errors import InputError
from hzo.parameter_rules import arithmetic, convolution, linear, normalization
from hzo.parameter_rules.common import Entry, bind
from hzo.tracing import untouched

__all__ = ["Rule", "Slot", "closed_form", "find_rule"]

# For a module the name of the parameter ("weight"); for a function the operand's position, or its keyword.
Slot = int | str
Target = Callable[..., Any]
# (target, args, kwargs, cotangent, wanted) -> gradient by slot.
Rule = Callable[[Target, tuple[Any, ...], Mapping[str, Any], Tensor, frozenset[Slot]], dict[Slot, Tensor]]

_FILES = (linear, convolution, normalization, arithmetic)
MODULES: dict[type[nn.Module], Entry] = {kind: e for file in _FILES for kind, e in file.MODULES.items()}
FUNCTIONS: dict[Target, Entry] = {function: e for file in _FILES for function, e in file.FUNCTIONS.items()}


def closed_form(target: Target) -> bool:
    """Whether ``target`` is in a table: a function by identity, a module by exact type with nothing in the
    way.

    In the way are forward hooks, a parametrization or weight norm, and instance attributes in place of
    methods.
    """
    return _entry(target) is not None


def find_rule(target: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: frozenset[Slot]) -> Rule | None:
    """The rule for one call ``target(*args, **kwargs)``; None where the caller has to perturb the parameters
    instead.

    Args:
        target: a module, or a function or method such as ``torch.add``, ``torch.Tensor.add``, ``F.linear``.
        args: of the call, the tensor itself first for a method.
        kwargs: of the call.
        wanted: the slots whose gradients are asked for. A parameter in two slots has a gradient in each: add
            them.

    The rule takes ``(target, args, kwargs, cotangent, wanted)`` and returns a gradient for each slot, of the
    shape of the parameter and in the dtype of the cotangent, computed in float32 at least: give a float32
    cotangent for a forward pass in low precision. Its args are those *before* the call, also for methods that
    write in place. It runs no part of the model and changes nothing; whoever applies it counts it. Cost:
    about the forward pass of the operation. It raises InputError for a call that find_rule returns None for.
    """
    entry = _entry(target)
    if entry is None or _arguments(entry, target, args, kwargs, wanted) is None:
        return None
    return _apply


def _entry(target: Target) -> Entry | None:
    if isinstance(target, nn.Module):
        return MODULES.get(type(target)) if untouched(target) else None
    return FUNCTIONS.get(target) if isinstance(target, Hashable) else None


def _name(entry: Entry, target: Target, slot: Slot) -> str | None:
    if isinstance(slot, str):
        return slot
    return entry.names[slot] if slot < len(entry.names) and not isinstance(target, nn.Module) else None


def _arguments(
    entry: Entry, target: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: frozenset[Slot]
) -> dict[str, Any] | None:
    """The arguments by name; None where the entry does not cover this call, or not all that is wanted."""
    arguments = bind(entry, args, kwargs)
    if arguments is None:
        return None
    operands: Mapping[str, Any] = arguments
    if isinstance(target, nn.Module):
        arguments |= {name: getattr(target, name) for name in entry.attributes}
        operands = target._parameters
    names = {_name(entry, target, slot) for slot in wanted}
    if not names <= set(entry.parameters) or not entry.accepts(arguments):
        return None
    parameters = [operands.get(str(name)) for name in names]
    if not all(isinstance(parameter, Tensor) and parameter.is_floating_point() for parameter in parameters):
        return None
    if any(isinstance(value, Tensor) and value.is_complex() for value in arguments.values()):
        return None
    return arguments


@torch.no_grad()
def _apply(
    target: Target,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    cotangent: Tensor,
    wanted: frozenset[Slot],
) -> dict[Slot, Tensor]:
    entry = _entry(target)
    arguments = None if entry is None else _arguments(entry, target, args, kwargs, wanted)
    if entry is None or arguments is None:
        raise InputError(f"Expected a call that find_rule has a rule for; got {target}. Ask it before applying.")
    names = {slot: str(_name(entry, target, slot)) for slot in wanted}
    g = cotangent.detach().to(torch.promote_types(cotangent.dtype, torch.float32))
    device = g.device.type
    # Autocast would send the products back to low precision.
    full = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with full:
        found = entry.rule(arguments, g, frozenset(names.values()))
    return {slot: found[name].to(cotangent.dtype) for slot, name in names.items()}

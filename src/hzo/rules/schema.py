"""Arguments by the names in an operator's schema, for operators of one kind that order them differently."""

from __future__ import annotations

from functools import cache
from typing import Any

from hzo.rules.base import Call, Key
from hzo.tape.functions import operator_of


@cache
def arguments(target: Any) -> dict[str, tuple[int, Any]]:
    """By name: the position, and the default. Calls out of place keep the operator that they run in ``func``."""
    schema = operator_of(target)._schema
    return {argument.name: (k, argument.default_value) for k, argument in enumerate(schema.arguments)}


def _of(call: Call) -> dict[str, tuple[int, Any]]:
    if call.schema is None:
        call.schema = arguments(call.op.target)
    return call.schema


def has(call: Call, name: str) -> bool:
    """Whether the operator has an argument of this name."""
    return name in (call.schema or _of(call))


def key_of(call: Call, name: str) -> Key:
    """The place of an argument in this call: its position, or its name where it came as a keyword."""
    position, _ = (call.schema or _of(call))[name]
    return position if position < len(call.args) else name


def named(call: Call, name: str) -> Any:
    """An argument; its default where the call left it out."""
    position, default = (call.schema or _of(call))[name]
    return call.args[position] if position < len(call.args) else call.kwargs.get(name, default)

"""What hzo is told of a module beside what its class says: one record, in one attribute, with one reader."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

ATTRIBUTE = "hzo_marks"
"""Of the module, or of its class; copies and pickles of a module keep it."""

_NONE: Mapping[str, object] = {}


@dataclass(frozen=True)
class Marks:
    """A module with marks is one operation of a recording: what runs inside is not looked at.

    Attributes:
        promises: what ``hzo.declare`` was told of its Jacobian, all that may be assumed of it; None where nothing was
            declared, so that its type speaks for it.
        step: the length h of differences of what goes into it, where one was declared.
        box: the name of a black box, in messages and in counts; None for any other module.
        ignores_parameters: trainable tensors that it uses get no gradient, as its user asked.
        pooled: calls of a black box run in other workers, several at a time.
    """

    promises: tuple[Hashable, ...] | None = None
    step: float | None = None
    box: str | None = None
    ignores_parameters: bool = False
    pooled: bool = False


def marks_of(module: object) -> Marks | None:
    """The marks of a module; None where it has none, and for anything that is no module."""
    own = getattr(module, "__dict__", _NONE)  # a module asked for what it does not have writes an error message first
    found = own[ATTRIBUTE] if ATTRIBUTE in own else getattr(type(module), ATTRIBUTE, None)
    return found if isinstance(found, Marks) else None


def ignores_parameters(module: object) -> bool:
    """Whether the trainable tensors that a module uses are to get no gradient."""
    marks = marks_of(module)
    return marks is not None and marks.ignores_parameters


def is_declared(module: object) -> bool:
    """Whether ``hzo.declare`` was called on a module."""
    marks = marks_of(module)
    return marks is not None and marks.promises is not None

"""What the tables of rules are made of: entries, and arguments by name instead of by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Arguments = Mapping[str, Any]
# (arguments by name, cotangent, names wanted) -> gradient by name, of those wanted at least.
NamedRule = Callable[[Arguments, Tensor, frozenset[str]], dict[str, Tensor]]


def _always(_: Arguments) -> bool:
    return True


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        rule: the gradients.
        names: of the positional arguments of the function, or of the module's forward.
        parameters: the arguments that have a gradient here.
        attributes: of a module, that join its arguments under the same names.
        accepts: False for options whose gradient is another.
        variadic: further arguments are allowed, and reach the rule as "rest" and by keyword.
    """

    rule: NamedRule
    names: tuple[str, ...]
    parameters: tuple[str, ...] = ("weight", "bias")
    attributes: tuple[str, ...] = ()
    accepts: Callable[[Arguments], bool] = _always
    variadic: bool = False


def bind(entry: Entry, args: tuple[Any, ...], kwargs: Arguments) -> dict[str, Any] | None:
    """Arguments by name; None where the call has some that the entry does not know."""
    known = dict(zip(entry.names, args, strict=False))
    rest = args[len(entry.names) :]
    if not entry.variadic and (rest or not set(kwargs) <= set(entry.names)):
        return None
    return {**known, **kwargs, "rest": rest}


def lift(arguments: Arguments, name: str, like: Tensor) -> Tensor:
    """A tensor among the arguments, in the dtype of the cotangent; a number becomes a tensor."""
    value = arguments[name]
    return value.to(like.dtype) if isinstance(value, Tensor) else like.new_tensor(value)

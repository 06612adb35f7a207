"""Options that are numbers or names: one check and one sentence for all who take them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from math import isfinite
from typing import TypeVar

import torch

from hzo.errors import HzoError, InputError

Choice = TypeVar("Choice")


def positive(what: str, value: object, otherwise: str = "") -> float:
    """``value`` as a float.

    Args:
        what: the option, as it stands behind "a positive finite". otherwise: what a caller might do instead.

    Raises:
        InputError: it is no number, or not positive and finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
        raise InputError(f"expected a positive finite {what}, got {shown(value)}{_behind(otherwise)}")
    return float(value)


def whole(what: str, value: object, otherwise: str = "") -> int:
    """``value``, a number of things; arguments as those of ``positive``.

    Raises:
        InputError: it is no whole number, below 1, or more than anybody waits for.
    """
    if type(value) is not int or value < 1:
        raise InputError(f"expected {what} to be a whole number from 1 on, got {shown(value)}{_behind(otherwise)}")
    if value > _MOST:
        raise InputError(f"expected {what} to be a whole number up to {_MOST:,}, got {shown(value)}")
    return value


def one_of(what: str, value: object, choices: Sequence[Choice], error: type[HzoError] = InputError) -> Choice:
    """``value``, one of these choices: names, numbers, None.

    Args:
        what: the option's name. error: the kind of error, where it is not one of an argument alone.
    """
    for choice in choices:
        if isinstance(value, type(choice)) and not isinstance(value, bool) and value == choice:
            return choice
    raise error(f"expected {what} to be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def scale_factor(scale: object) -> float:
    """The factor on gradients that a caller gave, as a number.

    Raises:
        InputError: neither a finite number nor a tensor of one.
    """
    try:
        found = float(scale)  # type: ignore[arg-type]  # what does not fit raises
        if isinstance(scale, torch.Tensor) or isfinite(found):  # a scaler's factor may overflow; it looks at gradients
            return found
        raise ValueError(scale)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            "expected scale to be a finite number or a tensor of one, such as scaler.scale(torch.ones(())), got "
            f"{shown(scale)}"
        ) from None


def seconds_set(name: str, default: float) -> float:
    """A limit in time, which the environment may set under this name; empty or not there: the default.

    Raises:
        InputError: to something that is none.
    """
    given = os.environ.get(name, "")
    try:
        seconds = float(given or default)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"expected the environment to have a number of seconds in {name}, got {given!r}")
    return seconds


def function(what: str, value: object) -> None:
    """Whether something can be called.

    Raises:
        InputError: it cannot; or it is the class of a module instead of a module.
    """
    if not callable(value):
        raise InputError(f"expected {what} to be a function or module, got {shown(value)}")
    if isinstance(value, type) and issubclass(value, torch.nn.Module):
        raise InputError(
            f"expected {what} to be a module, got the class {value.__name__}; make one: {value.__name__}()"
        )


_LARGEST = sys.float_info.max
_MOST = 10**9  # of anything that is run or drawn one after the other


def shown(value: object) -> str:
    """A value in an error message, cut to sixty characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _behind(otherwise: str) -> str:
    return f"; {otherwise}" if otherwise else ""

"""Options that are numbers: one check and one sentence for all who take them."""

from __future__ import annotations

from hzo.errors import InputError


def positive(what: str, value: object, otherwise: str = "") -> float:
    """``value`` as a float.

    Args:
        what: the option, as it stands behind "a positive finite". otherwise: what a caller might do instead.

    Raises:
        InputError: it is no number, or not positive and finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InputError(f"expected a positive finite {what}, got {value!r}{_behind(otherwise)}")
    return float(value)


def whole(what: str, value: object, otherwise: str = "") -> int:
    """``value``, a number of things; arguments as those of ``positive``.

    Raises:
        InputError: it is no whole number, or below 1.
    """
    if type(value) is not int or value < 1:
        raise InputError(f"expected {what} to be a whole number from 1 on, got {value!r}{_behind(otherwise)}")
    return value


def _behind(otherwise: str) -> str:
    return f"; {otherwise}" if otherwise else ""

"""How long workers may take to start."""

from __future__ import annotations

import os

from hzo.errors import InputError


def start_limit() -> float:
    """Seconds within which one worker of dask or Ray must be there: ``HZO_CONNECT_SECONDS``, else 60.

    Raises:
        InputError: what is there is no number above 0.
    """
    given = os.environ.get("HZO_CONNECT_SECONDS", "60")
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise InputError(f"expected HZO_CONNECT_SECONDS to be a number of seconds above 0, got {given!r}")
    return limit

"""How long workers may take to start."""

from __future__ import annotations

from hzo._options import seconds_set


def start_limit() -> float:
    """Seconds within which one worker of dask or Ray must be there: ``HZO_CONNECT_SECONDS``, else 60.

    Raises:
        InputError: what is there is no number above 0.
    """
    return seconds_set("HZO_CONNECT_SECONDS", 60.0)

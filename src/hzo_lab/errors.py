"""Errors of the application beside those of ``hzo.errors``: what was expected, what came, what to do next."""

from hzo.errors import HzoError


class DataError(HzoError, ValueError):
    """A data file is missing, truncated or not what it should be."""


class CheckpointError(HzoError, RuntimeError):
    """A run directory or checkpoint cannot be used."""

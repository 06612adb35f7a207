"""From the loss at the end of a tape back to the gradients of its leaves."""

from hzo.reverse.step import RecordedStep, record
from hzo.reverse.sweep import sweep

__all__ = ["RecordedStep", "record", "sweep"]

"""From the loss at the end of a tape back to the gradients of its leaves."""

from hzo.reverse.backward import gradients_of, named
from hzo.reverse.pullback import Pullback, recorded_call
from hzo.reverse.step import Gradients, RecordedStep, accumulate, one_by_one, record
from hzo.reverse.walk import sweep

__all__ = [
    "Gradients",
    "Pullback",
    "RecordedStep",
    "accumulate",
    "gradients_of",
    "named",
    "one_by_one",
    "record",
    "recorded_call",
    "sweep",
]

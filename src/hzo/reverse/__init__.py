"""From the loss at the end of a tape back to the gradients of its leaves."""

from hzo.reverse.backward import as_data, check_input, gradients_by_name, gradients_of, loss_of, recorded_loss
from hzo.reverse.pullback import Pullback, recorded_call
from hzo.reverse.step import LeafGradients, RecordedStep, accumulate, drained, hooked, record
from hzo.reverse.walk import again, carry_back, measurements_of, sweep, sweep_end

__all__ = [
    "LeafGradients",
    "Pullback",
    "RecordedStep",
    "accumulate",
    "again",
    "as_data",
    "carry_back",
    "check_input",
    "drained",
    "gradients_by_name",
    "gradients_of",
    "hooked",
    "loss_of",
    "measurements_of",
    "record",
    "recorded_call",
    "recorded_loss",
    "sweep",
    "sweep_end",
]

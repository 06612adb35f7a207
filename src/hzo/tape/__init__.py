"""What one step of the user's Python did, written down as calls of PyTorch's operators (ATen), inputs to loss."""

from hzo.tape.operations import Operation, Ref, Value, ref
from hzo.tape.record import Recorder, current_recorder
from hzo.tape.tape import Tape

__all__ = ["Operation", "Recorder", "Ref", "Tape", "Value", "current_recorder", "ref"]

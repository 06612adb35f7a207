"""How a model becomes a graph: run it, write down its operations, learn what each of them does."""

from hzo.tracing.recorder.operation_properties import close
from hzo.tracing.recorder.tracer import batch_size, call_arguments, signature, trace

__all__ = [
    "batch_size",
    "call_arguments",
    "close",
    "signature",
    "trace",
]

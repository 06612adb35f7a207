"""How a model becomes a graph: record it, write down its operations, learn what each of them does."""

from hzo.tracing.recorder.inputs import batch_size, call_arguments, requires_gradient, signature
from hzo.tracing.recorder.run import OutOfSight, Run, recorded
from hzo.tracing.recorder.sample_axes import close
from hzo.tracing.recorder.tracer import names_of, trace

__all__ = [
    "OutOfSight",
    "Run",
    "batch_size",
    "call_arguments",
    "close",
    "names_of",
    "recorded",
    "requires_gradient",
    "signature",
    "trace",
]

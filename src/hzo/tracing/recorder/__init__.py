"""How a model becomes a graph: record it, write down its operations, learn what each of them does."""

from hzo.tracing.recorder.properties import rerun
from hzo.tracing.recorder.run import OutOfSight, Run, check_tensors, recorded, write_back
from hzo.tracing.recorder.sample_axes import close
from hzo.tracing.recorder.tracer import chain_of, names_of, trace

__all__ = [
    "OutOfSight",
    "Run",
    "chain_of",
    "check_tensors",
    "close",
    "names_of",
    "recorded",
    "rerun",
    "trace",
    "write_back",
]

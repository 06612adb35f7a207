"""How a model becomes a graph: record it, write down its operations, learn what each of them does."""

from hzo.tracing.recorder.properties import rerun
from hzo.tracing.recorder.run import OutOfSight, RecordedRun, check_tensors, recorded, write_back
from hzo.tracing.recorder.sample_axes import close
from hzo.tracing.recorder.tracer import chain_of, leaf_names, trace

__all__ = [
    "OutOfSight",
    "RecordedRun",
    "chain_of",
    "check_tensors",
    "close",
    "leaf_names",
    "recorded",
    "rerun",
    "trace",
    "write_back",
]

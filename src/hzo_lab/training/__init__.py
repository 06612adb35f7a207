"""Training runs: models, methods, the loop, checkpoints, plots."""

from hzo_lab.training.config import TrainConfig, from_dict, read_config, replace
from hzo_lab.training.loggers import LOGS, check_logs
from hzo_lab.training.loop import Progress, Result, on_threads, train
from hzo_lab.training.methods import CHUNK_BYTES, make_plan, refuse_untestable
from hzo_lab.training.models import mlp, resnet
from hzo_lab.training.plots import (
    COLORS,
    STYLE,
    Record,
    accuracy_axis,
    comparison,
    cosine_panel,
    running,
    save,
    series,
    spread_band,
)
from hzo_lab.training.probe import without_trace
from hzo_lab.training.ranks import ranks as ranks_of
from hzo_lab.training.ranks import restarted, run_id
from hzo_lab.training.recipes import recipe
from hzo_lab.training.run import Run, device_called, device_of, load_data, loss_fn, resume, start

__all__ = [
    "CHUNK_BYTES",
    "COLORS",
    "LOGS",
    "STYLE",
    "Progress",
    "Record",
    "Result",
    "Run",
    "TrainConfig",
    "accuracy_axis",
    "check_logs",
    "comparison",
    "cosine_panel",
    "device_called",
    "device_of",
    "from_dict",
    "load_data",
    "loss_fn",
    "make_plan",
    "mlp",
    "on_threads",
    "ranks_of",
    "read_config",
    "recipe",
    "refuse_untestable",
    "replace",
    "resnet",
    "restarted",
    "resume",
    "run_id",
    "running",
    "save",
    "series",
    "spread_band",
    "start",
    "train",
    "without_trace",
]

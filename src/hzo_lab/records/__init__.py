"""What a run leaves on disk, and what makes it repeatable: files, seeds, memory, and where a number comes from."""

from hzo._seeds import derive
from hzo_lab.records.allocations import peak_of
from hzo_lab.records.files import (
    CONFIG,
    CURVES,
    METRICS,
    SUMMARY,
    MetricsLog,
    alone_in,
    disk_errors,
    new_run_directory,
    read_metrics,
    refuse_used_directory,
)
from hzo_lab.records.provenance import commit, environment
from hzo_lab.records.seeds import (
    generator,
    generator_states,
    restore_generators,
    seed_everything,
    separate_random_numbers,
)

__all__ = [
    "CONFIG",
    "CURVES",
    "METRICS",
    "SUMMARY",
    "MetricsLog",
    "alone_in",
    "commit",
    "derive",
    "disk_errors",
    "environment",
    "generator",
    "generator_states",
    "new_run_directory",
    "peak_of",
    "read_metrics",
    "refuse_used_directory",
    "restore_generators",
    "seed_everything",
    "separate_random_numbers",
]

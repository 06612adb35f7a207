"""Run a traced model, or a slice of it at a perturbed state; count what runs, and undo what it changed."""

from hzo.execution.counting import QueryCount, as_checks, count_queries, open_count
from hzo.execution.operation import Activities, call, query, read, resolve
from hzo.execution.passes import base_pass, run_again, run_alone, run_slice, run_with_parameter
from hzo.execution.side_effects import (
    RandomState,
    contained,
    devices_of,
    random_state,
    restore_snapshot,
    set_random_state,
    take_snapshot,
    undone_on_error,
    with_parameters,
)

__all__ = [
    "Activities",
    "QueryCount",
    "RandomState",
    "as_checks",
    "base_pass",
    "call",
    "contained",
    "count_queries",
    "devices_of",
    "open_count",
    "query",
    "random_state",
    "read",
    "resolve",
    "restore_snapshot",
    "run_again",
    "run_alone",
    "run_slice",
    "run_with_parameter",
    "set_random_state",
    "take_snapshot",
    "undone_on_error",
    "with_parameters",
]

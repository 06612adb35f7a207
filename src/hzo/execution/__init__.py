"""Run slices of a traced model at perturbed states; count what runs, and undo what it changed."""

from hzo.execution.activations import Activations
from hzo.execution.copies import READS_BASE, VIEWS
from hzo.execution.counting import QueryCount, as_checks, count_queries, open_count
from hzo.execution.operation import query, read
from hzo.execution.passes import arguments_of, count_probes, run_again, run_probe, run_slice, run_with_parameter
from hzo.execution.precision import coarsest_product, full_float32
from hzo.execution.side_effects import contained, copied, devices_of, restore_snapshot, take_snapshot, undone_on_error
from hzo.execution.tape_end import replay
from hzo.tape.opaque import with_parameters
from hzo.tape.state import RandomState, random_state, set_random_state

__all__ = [
    "READS_BASE",
    "VIEWS",
    "Activations",
    "QueryCount",
    "RandomState",
    "arguments_of",
    "as_checks",
    "coarsest_product",
    "contained",
    "copied",
    "count_probes",
    "count_queries",
    "devices_of",
    "full_float32",
    "open_count",
    "query",
    "random_state",
    "read",
    "replay",
    "restore_snapshot",
    "run_again",
    "run_probe",
    "run_slice",
    "run_with_parameter",
    "set_random_state",
    "take_snapshot",
    "undone_on_error",
    "with_parameters",
]

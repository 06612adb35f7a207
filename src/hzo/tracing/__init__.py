"""What a traced model is: a chain of stages over a graph of operations, and what is promised of its modules."""

from hzo.tracing.arguments import leaves, map_arguments, map_output, output_leaves, tensors_in
from hzo.tracing.chain import Chain, Stages, module_of, noisy
from hzo.tracing.graph import Graph, GraphOperation, GraphValue, Measured, ParameterUse, Stage, split_samples
from hzo.tracing.inputs import batch_size, call_arguments, check_dense, requires_gradient, signature
from hzo.tracing.kept_traces import keep, kept
from hzo.tracing.promises import (
    PROMISES,
    Local,
    Promise,
    declare,
    declared,
    declared_links,
    declared_step,
    local_along,
    untouched,
)

__all__ = [
    "PROMISES",
    "Chain",
    "Graph",
    "GraphOperation",
    "GraphValue",
    "Local",
    "Measured",
    "ParameterUse",
    "Promise",
    "Stage",
    "Stages",
    "batch_size",
    "call_arguments",
    "check_dense",
    "declare",
    "declared",
    "declared_links",
    "declared_step",
    "keep",
    "kept",
    "leaves",
    "local_along",
    "map_arguments",
    "map_output",
    "module_of",
    "noisy",
    "output_leaves",
    "requires_gradient",
    "signature",
    "split_samples",
    "tensors_in",
    "untouched",
]

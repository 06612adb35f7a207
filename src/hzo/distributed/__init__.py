"""Models that are spread over processes: gradients averaged as their wrapper would, or an error that says how."""

from hzo.distributed.collectives import collective_in, is_collective, without_collectives
from hzo.distributed.mesh import Shares, code_of, digest, shared, shares
from hzo.distributed.wrappers import (
    average_accumulated,
    averaged,
    kind_of_wrapper,
    mean_over,
    refuse_all_wrappers,
    refuse_running,
    refuse_share,
    refuse_wrapped_loss,
    refuse_wrappers,
    unwrapped,
    wraps_shares,
)

__all__ = [
    "Shares",
    "average_accumulated",
    "averaged",
    "code_of",
    "collective_in",
    "digest",
    "is_collective",
    "kind_of_wrapper",
    "mean_over",
    "refuse_all_wrappers",
    "refuse_running",
    "refuse_share",
    "refuse_wrapped_loss",
    "refuse_wrappers",
    "shared",
    "shares",
    "unwrapped",
    "without_collectives",
    "wraps_shares",
]

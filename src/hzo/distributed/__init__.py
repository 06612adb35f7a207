"""Models that are spread over processes: gradients averaged as their wrapper would, or an error that says how."""

from hzo.distributed.mesh import Shares, shared, shares
from hzo.distributed.wrappers import (
    averaged,
    kind_of_wrapper,
    mean_over,
    refuse_all_wrappers,
    refuse_share,
    refuse_wrappers,
    sharded,
    unwrapped,
)

__all__ = [
    "Shares",
    "averaged",
    "kind_of_wrapper",
    "mean_over",
    "refuse_all_wrappers",
    "refuse_share",
    "refuse_wrappers",
    "sharded",
    "shared",
    "shares",
    "unwrapped",
]

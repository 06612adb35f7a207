"""Models that are spread over processes: gradients averaged as their wrapper would, or an error that says how."""

from hzo.distributed.wrappers import averaged, forward_of, refuse_wrappers

__all__ = ["averaged", "forward_of", "refuse_wrappers"]

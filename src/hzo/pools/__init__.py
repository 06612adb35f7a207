"""Workers that answer queries: any executor, what becomes of calls that it loses, and Ray's actors as one."""

from hzo.pools.kept_answers import backward_half, forward_half, one_gradient
from hzo.pools.pool import Pool
from hzo.pools.process_pool import processes
from hzo.pools.ray_pool import ray_executor

__all__ = ["Pool", "backward_half", "forward_half", "one_gradient", "processes", "ray_executor"]

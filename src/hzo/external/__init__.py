"""Callables from outside as modules and losses: black boxes, programs of their own, scores without a derivative."""

from hzo.external.box import BlackBox, blackbox
from hzo.external.criterion import smoothed
from hzo.external.network import module, plain
from hzo.external.pool import Pool
from hzo.external.program import simulator
from hzo.external.ray_pool import ray_executor

__all__ = [
    "BlackBox",
    "Pool",
    "blackbox",
    "module",
    "plain",
    "ray_executor",
    "simulator",
    "smoothed",
]

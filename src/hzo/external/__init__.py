"""Callables from outside as modules and losses: black boxes, programs of their own, scores without a derivative."""

from hzo.external.box import BlackBox, blackbox
from hzo.external.criterion import smoothed
from hzo.external.network import module, plain
from hzo.external.program import simulator

__all__ = [
    "BlackBox",
    "blackbox",
    "module",
    "plain",
    "simulator",
    "smoothed",
]

"""The claims of the paper, each tried by one command: ``hzo reproduce``.

One file a claim, each with one function that takes a ``Setting`` and returns a ``Finding``; ``registry`` lists them,
``record`` writes what they found.
"""

from hzo_lab.paper.finding import SCALES, Finding, Scale, Setting
from hzo_lab.paper.measure import cosine, expected_error, relative_error, squared_gain
from hzo_lab.paper.networks import ACTIVATIONS, BATCH, WIDTH, data, network

__all__ = [
    "ACTIVATIONS",
    "BATCH",
    "SCALES",
    "WIDTH",
    "Finding",
    "Scale",
    "Setting",
    "cosine",
    "data",
    "expected_error",
    "network",
    "relative_error",
    "squared_gain",
]

"""Losses: those of torch known by name, and scores without a derivative, which are smoothed."""

from hzo.losses.checks import check_finite, check_loss
from hzo.losses.evaluation import LossFn, cast, evaluate
from hzo.losses.known import checked, find_known, fitting_loss
from hzo.losses.smoothed import Smoothing, smoothed_loss

__all__ = [
    "LossFn",
    "Smoothing",
    "cast",
    "check_finite",
    "check_loss",
    "checked",
    "evaluate",
    "find_known",
    "fitting_loss",
    "smoothed_loss",
]

"""The cotangent of the loss with respect to the output of the model: where every sweep starts."""

from hzo.losses.checks import check_finite, check_loss
from hzo.losses.closed_forms import checked, find_closed_form
from hzo.losses.cotangent import loss_and_cotangent
from hzo.losses.perturbed import cast, evaluate
from hzo.losses.smoothed import Smoothing

__all__ = [
    "Smoothing",
    "cast",
    "check_finite",
    "check_loss",
    "checked",
    "evaluate",
    "find_closed_form",
    "loss_and_cotangent",
]

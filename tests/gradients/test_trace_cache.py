"""Traces and plans that are kept from call to call: never one that was made for other options."""

from dataclasses import replace

import torch
from torch import nn

import hzo
from hzo.gradients.trace_cache import plan_of

X = torch.randn(4, 3, dtype=torch.float64)


def calibrated():
    chain = hzo.trace(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh()).double(), X)
    return chain, hzo.calibrate(chain, X, assume="nothing", seconds=False)


def test_a_plan_is_made_once():
    chain, calibration = calibrated()
    options = {"assume": "nothing", "calibration": calibration, "target_cosine": 0.9999}
    assert plan_of(chain, options) is plan_of(chain, dict(reversed(options.items())))
    equal = replace(calibration, norms=dict(calibration.norms))
    assert plan_of(chain, {**options, "calibration": equal}) is plan_of(chain, options)


def test_calibrations_that_look_alike_have_plans_of_their_own():
    """Another curvature asks for other steps; a calibration's repr does not show it."""
    chain, first = calibrated()
    other = replace(first, bends={at: replace(bend, size=1e4 * bend.size) for at, bend in first.bends.items()})
    assert repr(first) == repr(other)
    plans = [plan_of(chain, {"assume": "nothing", "calibration": c}) for c in (first, other)]
    assert plans[0] != plans[1]
    assert plans[1] == hzo.plan(chain, assume="nothing", calibration=other)

"""Measure a chain by forward passes alone: noise, gains, curvature, seconds."""

from hzo.measurement.calibrate_chain import calibrate

__all__ = [
    "calibrate",
]

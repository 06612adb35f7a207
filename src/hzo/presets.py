"""Options of ``hzo.plan`` under a name: ``hzo.plan(chain, **hzo.presets.paper)``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

paper: Mapping[str, Any] = MappingProxyType({"tree": "bisect", "assume": "locality", "scheme": "central"})
"""Bisection of the depth and central differences, as in the paper."""

fast: Mapping[str, Any] = MappingProxyType({"tree": "planned", "assume": "structure", "scheme": "central"})
"""The cheapest tree, and all that is known of the layers."""

"""Which rule a call has: that of the table, or what PyTorch's tags and decompositions say of it."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from hzo.rules.base import Rule, rules
from hzo.rules.custom import CUSTOM
from hzo.rules.fallback import fallback
from hzo.tape.custom import CustomFunction
from hzo.tape.functions import operator_of

_WITHOUT_RULES = {"base", "fallback", "measured", "registry", "schema"}
FAMILIES = tuple(
    import_module(f"hzo.rules.{module.name}")
    for module in iter_modules(import_module("hzo.rules").__path__)
    if module.name not in _WITHOUT_RULES
)
"""Every other file of this folder: importing it enters its rules into the table."""

_fallbacks: dict[Any, tuple[Rule, str]] = {}


def find_rule(target: Any) -> Rule:
    """The rule of an operator: its own, that of a custom Function, or the best there is without one (fallback.py)."""
    rule = rules.get(target)
    if rule is not None:
        return rule
    if type(target) is CustomFunction:
        return CUSTOM
    return _fallback(target)[0]


def kind_of(target: Any) -> str:
    """How an operator is carried back: "rule", "custom Function", "slope", "decomposition" or "queries"."""
    if target in rules:
        return "rule"
    return "custom Function" if type(target) is CustomFunction else _fallback(target)[1]


def _fallback(target: Any) -> tuple[Rule, str]:
    if target not in _fallbacks:
        _fallbacks[target] = fallback(target)
    return _fallbacks[target]


LEAN = frozenset(id(operator_of(target)) for target, rule in rules.items() if rule.lean)
"""Ids of those with rules declared ``lean``: what their calls make, and nobody needs, may go while the step runs."""

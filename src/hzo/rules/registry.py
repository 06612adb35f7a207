"""Which rule a call has: that of the table, or what PyTorch's tags and decompositions say of an operator without one."""

from __future__ import annotations

from typing import Any

from hzo.rules import pointwise, products, reindexing
from hzo.rules.base import Rule, rules

FAMILIES = (pointwise, products, reindexing)


def find_rule(target: Any) -> Rule:
    """The rule of an operator."""
    return rules[target]

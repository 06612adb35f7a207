"""How every ATen call carries a cotangent back to its operands: one table, one file a family of calls."""

from hzo.rules.base import Call, Rule, rules, vjp

__all__ = ["Call", "Rule", "rules", "vjp"]

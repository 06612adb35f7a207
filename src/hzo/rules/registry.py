"""Which rule a call has: that of the table, or what PyTorch's tags and decompositions say of it."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

from hzo.rules.base import Rule, rules
from hzo.rules.custom import CUSTOM
from hzo.rules.fallback import fallback
from hzo.tape.custom import CustomFunction

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


_aten = torch.ops.aten
LEAN = frozenset(
    (
        _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.neg.default,
        _aten.relu.default, _aten.leaky_relu.default, _aten.hardtanh.default, _aten.hardswish.default,
        _aten.gelu.default, _aten.silu.default, _aten.sigmoid.default, _aten.tanh.default, _aten.rsqrt.default,
        _aten.pow.Tensor_Scalar, _aten._to_copy.default, _aten.clone.default, _aten.alias.default,
        _aten.convolution.default, _aten.native_batch_norm.default, _aten.native_layer_norm.default,
        _aten.native_group_norm.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default, _aten._softmax.default, _aten._log_softmax.default,
        _aten.nll_loss_forward.default, _aten.embedding.default, _aten.sum.default, _aten.sum.dim_IntList,
        _aten.mean.default, _aten.mean.dim, _aten.cat.default, _aten.stack.default, _aten.t.default,
        _aten.transpose.int, _aten.permute.default, _aten.view.default, _aten._unsafe_view.default,
        _aten.expand.default, _aten.slice.Tensor, _aten.select.int, _aten.split.Tensor, _aten.split_with_sizes.default,
        _aten.unbind.int, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.max_pool2d_with_indices.default,
        _aten.avg_pool2d.default, _aten._adaptive_avg_pool2d.default,
    )
)  # fmt: skip
"""Operators whose rules are tried to read no more than PyTorch's own derivative saves, so that the rest may go."""

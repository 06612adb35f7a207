"""Scale and shift of normalizing layers: Σ g·x̂ and Σ g. Cost: one pass over the input and one over the
cotangent.

x̂ comes from the input and its statistics, ε included, never from the standardised output: that loses ε, and
is 0/0 where the scale is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.parameter_rules.common import Arguments, Entry, NamedRule, lift


def _layer(x: Tensor, a: Arguments) -> Tensor:
    return F.layer_norm(x, _trailing(a), eps=a.get("eps", 1e-5))


def _rms(x: Tensor, a: Arguments) -> Tensor:
    eps = a.get("eps")
    if eps is None:  # torch: that of the dtype it computes in, float32 for narrower inputs
        eps = torch.finfo(torch.promote_types(a["input"].dtype, torch.float32)).eps
    return F.rms_norm(x, _trailing(a), eps=eps)


def _group(x: Tensor, a: Arguments) -> Tensor:
    return F.group_norm(x, a["num_groups"], eps=a.get("eps", 1e-5))


def _batch(x: Tensor, a: Arguments) -> Tensor:
    own = a.get("training", False) or a.get("running_mean") is None
    mean, var = (None, None) if own else _running(x, a)
    return F.batch_norm(x, mean, var, training=own, eps=a.get("eps", 1e-5))


def _instance(x: Tensor, a: Arguments) -> Tensor:
    own = a.get("use_input_stats", a.get("training", True)) or not a.get("track_running_stats", True)
    own = own or a.get("running_mean") is None
    mean, var = (None, None) if own else _running(x, a)
    return F.instance_norm(x, mean, var, use_input_stats=own, eps=a.get("eps", 1e-5))


def _running(x: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    return a["running_mean"].to(x.dtype), a["running_var"].to(x.dtype)


def _trailing(a: Arguments) -> list[int]:
    shape = a["normalized_shape"]
    return [shape] if isinstance(shape, int) else list(shape)


def _over_leading(standardise: Callable[[Tensor, Arguments], Tensor]) -> NamedRule:
    """Parameters of the trailing shape: sum over all dimensions before it."""

    def rule(a: Arguments, g: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
        shape = _trailing(a)
        found = {"bias": g.sum_to_size(shape)} if "bias" in wanted else {}
        if "weight" in wanted:
            found["weight"] = (g * standardise(lift(a, "input", g), a)).sum_to_size(shape)
        return found

    return rule


def _per_channel(standardise: Callable[[Tensor, Arguments], Tensor], single: int = 0) -> NamedRule:
    """Parameters (C,): sum over all dimensions but 1; with ``single`` dimensions there is no batch."""

    def rule(a: Arguments, g: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
        x = lift(a, "input", g)
        if x.ndim == single:
            x, g = x.unsqueeze(0), g.unsqueeze(0)
        over = [0, *range(2, g.ndim)]
        found = {"bias": g.sum(over)} if "bias" in wanted else {}
        if "weight" in wanted:
            found["weight"] = (g * standardise(x, a)).sum(over)
        return found

    return rule


_SHAPED = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS = ("input", "normalized_shape", "weight", "eps")
_GROUPED = ("input", "num_groups", "weight", "bias", "eps")
_LAYER_RULE, _RMS_RULE = _over_leading(_layer), _over_leading(_rms)
_GROUP_RULE, _BATCH_RULE = _per_channel(_group), _per_channel(_batch)
_RUNNING = ("running_mean", "running_var")

MODULES: dict[type[nn.Module], Entry] = {
    nn.LayerNorm: Entry(_LAYER_RULE, ("input",), attributes=("normalized_shape", "eps")),
    nn.RMSNorm: Entry(_RMS_RULE, ("input",), ("weight",), attributes=("normalized_shape", "eps")),
    nn.GroupNorm: Entry(_GROUP_RULE, ("input",), attributes=("num_groups", "eps")),
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        Entry(_BATCH_RULE, ("input",), attributes=(*_RUNNING, "training", "eps")),
    ),
    **{
        layer: Entry(
            _per_channel(_instance, single),
            ("input",),
            attributes=(*_RUNNING, "training", "track_running_stats", "eps"),
        )
        for layer, single in ((nn.InstanceNorm1d, 2), (nn.InstanceNorm2d, 3), (nn.InstanceNorm3d, 4))
    },
}
FUNCTIONS: dict[Callable[..., Any], Entry] = {
    F.layer_norm: Entry(_LAYER_RULE, _SHAPED),
    torch.layer_norm: Entry(_LAYER_RULE, (*_SHAPED, "cudnn_enable")),
    F.rms_norm: Entry(_RMS_RULE, _RMS, ("weight",)),
    torch.rms_norm: Entry(_RMS_RULE, _RMS, ("weight",)),
    F.group_norm: Entry(_GROUP_RULE, _GROUPED),
    torch.group_norm: Entry(_GROUP_RULE, (*_GROUPED, "cudnn_enabled")),
    F.batch_norm: Entry(_BATCH_RULE, ("input", *_RUNNING, "weight", "bias", "training", "momentum", "eps")),
    F.instance_norm: Entry(
        _per_channel(_instance),
        ("input", *_RUNNING, "weight", "bias", "use_input_stats", "momentum", "eps"),
    ),
}

"""Softmax and attention: ``diag(p) − ppᵀ`` with p as observed, and products of observed activities (textbook)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.adjoints.common import Adjoint, Call, argument, is_first_operand, slots_of
from hzo.tracing import Graph, Operation, Ref

aten: Any = torch.ops.aten


def _dim(op: Operation, dims: int) -> int:
    module: Any = op.module
    found = module.dim if module is not None else argument(op, 1, "dim")
    return int(found) % dims


def _accepts_softmax(graph: Graph, op: Operation, value: int) -> bool:
    module: Any = op.module
    dim = module.dim if module is not None else argument(op, 1, "dim")
    if not isinstance(dim, int) or ("dtype" in op.kwargs and op.kwargs["dtype"] is not None):
        return False
    operand = graph.values[value]
    return is_first_operand(graph, op, value) and dim % len(operand.shape) != operand.batch_dim


def _softmax(call: Call, value: int) -> Tensor:
    p = call.outputs[0].to(call.dtype)
    found: Tensor = aten._softmax_backward_data(call.cotangent, p, _dim(call.op, p.dim()), call.dtype)
    return found


def _log_softmax(call: Call, value: int) -> Tensor:
    p = call.outputs[0].to(call.dtype)
    found: Tensor = aten._log_softmax_backward_data(call.cotangent, p, _dim(call.op, p.dim()), call.dtype)
    return found


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _options(op: Operation) -> dict[str, Any]:
    return {**dict(zip(_NAMES, op.args, strict=False)), **op.kwargs}


def _accepts_attention(graph: Graph, op: Operation, value: int) -> bool:
    options = _options(op)
    shapes = [graph.values[o.value].shape for o in (options[n] for n in _NAMES[:3]) if isinstance(o, Ref)]
    plain = not options.get("dropout_p") and not options.get("enable_gqa")
    asked = set(slots_of(op, value)) <= {0, 1, 2, *_NAMES[:3]}
    return plain and asked and len({shape[:-2] for shape in shapes}) == 1 and len(shapes) == 3


def _attention(call: Call, value: int) -> Tensor:
    """softmax(q kᵀ · scale + mask) v: two products and a softmax, all of observed activities."""
    given = {**dict(zip(_NAMES, call.args, strict=False)), **call.kwargs}
    q, k, v = (given[name].to(call.dtype) for name in _NAMES[:3])
    g = call.cotangent
    scale = given.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.mT) * scale
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    p = aten._safe_softmax(scores, -1)  # a row that sees nothing gives zero, and not NaN
    found = torch.zeros((), dtype=call.dtype, device=q.device)
    for name in _NAMES[:3]:
        slot = call.op.args[_NAMES.index(name)] if _NAMES.index(name) < len(call.op.args) else call.op.kwargs[name]
        if slot != Ref(value):
            continue
        if name == "value":
            found = found + p.mT @ g
        else:
            pulled = aten._softmax_backward_data(g @ v.mT, p, p.dim() - 1, call.dtype) * scale
            found = found + (pulled @ k if name == "query" else pulled.mT @ q)
    return found


_SOFTMAX = Adjoint("softmax", _softmax, _accepts_softmax, reads="output")
_LOG_SOFTMAX = Adjoint("softmax", _log_softmax, _accepts_softmax, reads="output")

MODULES: dict[type[nn.Module], Adjoint] = {nn.Softmax: _SOFTMAX, nn.LogSoftmax: _LOG_SOFTMAX}
FUNCTIONS: dict[Any, Adjoint] = {
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _SOFTMAX),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _LOG_SOFTMAX),
    F.scaled_dot_product_attention: Adjoint("bilinear", _attention, _accepts_attention, reads="inputs"),
}

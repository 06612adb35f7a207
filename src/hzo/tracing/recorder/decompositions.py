"""Layers of torch that are recorded as the smaller operations that they are made of.

``nn.MultiheadAttention`` calls one opaque kernel; as projections, products and a softmax it needs no plain queries and
none of its weights is perturbed. Only a module of the exact type, with nothing in the way, is taken apart, and only
calls that are covered here; any other stays one operation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hzo.tracing import untouched

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


def decomposition(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """What computes ``module(*args, **kwargs)`` from operations that can be recorded; None to leave it whole."""
    if type(module) is not nn.MultiheadAttention or getattr(module, "hzo_opaque", False):
        return None
    plain = untouched(module) and type(module.out_proj) is NonDynamicallyQuantizableLinear
    if not plain or not untouched(module.out_proj) or module.bias_k is not None or module.add_zero_attn:
        return None
    given = _SIGNATURE.bind(module, *args, **kwargs)
    given.apply_defaults()
    options = dict(given.arguments)
    del options["self"]
    inputs = [options[name] for name in ("query", "key", "value")]
    if any(not isinstance(t, Tensor) or t.dim() != 3 or t.is_nested for t in inputs):
        return None
    if options["is_causal"] and options["attn_mask"] is None:  # the module will say what is wrong
        return None
    return lambda: _attention(module, **options)


@contextmanager
def slow_paths() -> Iterator[None]:
    """Inside, attention and the encoder layers of torch take the path that autograd takes, operation by operation."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    q, k, v = (_heads(module, t) for t in _projected(module, query, key, value))
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _mask(module, q, key_padding_mask, attn_mask)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights or dropout:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        mixed = weights @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    batch, heads, tokens, width = mixed.shape
    mixed = mixed.permute(2, 0, 1, 3).contiguous().view(tokens, batch, heads * width)
    output = F.linear(mixed, module.out_proj.weight, module.out_proj.bias)
    output = output.transpose(0, 1) if module.batch_first else output
    if not need_weights or weights is None:
        return output, None
    return output, weights.mean(1) if average_attn_weights else weights


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Queries, keys and values; one projection for those that come from the same tensor."""
    width, bias = module.embed_dim, module.in_proj_bias
    if not module._qkv_same_embed_dim:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = [None if bias is None else bias.narrow(0, k * width, width) for k in range(3)]
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def project(x: Tensor, first: int, count: int) -> list[Tensor]:
        if count == 3:
            found = F.linear(x, module.in_proj_weight, bias)
        else:
            weight = module.in_proj_weight.narrow(0, first * width, count * width)
            found = F.linear(x, weight, None if bias is None else bias.narrow(0, first * width, count * width))
        return [found] if count == 1 else list(found.chunk(count, -1))

    if query is key and key is value:
        return project(query, 0, 3)
    if key is value:
        return [*project(query, 0, 1), *project(key, 1, 2)]
    return [*project(query, 0, 1), *project(key, 1, 1), *project(value, 2, 1)]


def _heads(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """(batch, heads, tokens, width of a head)"""
    split = x.view(*x.shape[:-1], module.num_heads, x.shape[-1] // module.num_heads)
    return split.transpose(1, 2) if module.batch_first else split.permute(1, 2, 0, 3)


def _mask(
    module: nn.MultiheadAttention, q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> Tensor | None:
    """Both masks as one that is added to the scores."""
    added = None if attn_mask is None else _additive(attn_mask, q.dtype)
    if added is not None and added.dim() == 3:  # (batch · heads, tokens, tokens)
        added = added.view(-1, module.num_heads, *added.shape[1:])
    if key_padding_mask is None:
        return added
    padding = _additive(key_padding_mask, q.dtype).unsqueeze(1).unsqueeze(1)
    return padding if added is None else added + padding


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))

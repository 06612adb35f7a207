"""Fused attention: PyTorch's own adjoint of the kernel that ran, once for queries, keys and values.

It takes the result and the log-sum-exp that the call returned; dropout is drawn again from the state of the generator
that the call returned, too: the same mask. Queries, keys and values are read, learned ones included: they are results
of other calls, and attention has no weight of its own that a device could hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo.rules.base import Call, Cotangents, vjp
from hzo.rules.schema import has, key_of, named

aten = torch.ops.aten


def _operands(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return named(call, "query"), named(call, "key"), named(call, "value")


def _collect(call: Call, found: tuple[Any, ...], names: tuple[str, ...] = ("query", "key", "value")) -> Cotangents:
    keys = [key_of(call, name) for name in names]
    return {key: g for key, g in zip(keys, found, strict=False) if call.needs(key)}


def _lengths(call: Call) -> tuple[int, int]:
    """The longest sequences of queries and keys: where the call does not say, those of its dense operands."""
    q, k, _ = _operands(call)
    if has(call, "max_q"):
        return int(named(call, "max_q")), int(named(call, "max_k"))
    return int(q.shape[2]), int(k.shape[2])


@vjp(aten._scaled_dot_product_flash_attention_for_cpu.default, lean=True)
def flash_attention_for_cpu(call: Call) -> Cotangents:
    """Attention in blocks on a CPU; heads of queries may share keys and values."""
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        call.grad,
        *_operands(call),
        call.out[0],
        call.out[1],
        named(call, "dropout_p"),
        named(call, "is_causal"),
        attn_mask=named(call, "attn_mask"),
        scale=named(call, "scale"),
    )
    return _collect(call, found)


@vjp(aten._scaled_dot_product_flash_attention.default)
def flash_attention(call: Call) -> Cotangents:
    """Attention in blocks on a GPU."""
    out, logsumexp, starts_q, starts_k, _, _, state, unused = call.out[:8]
    found = aten._scaled_dot_product_flash_attention_backward(
        call.grad,
        *_operands(call),
        out,
        logsumexp,
        starts_q,
        starts_k,
        *_lengths(call),
        named(call, "dropout_p"),
        named(call, "is_causal"),
        state,
        unused,
        scale=named(call, "scale"),
    )
    return _collect(call, found)


@vjp(aten._flash_attention_forward.default)
def flash_attention_of_sequences(call: Call) -> Cotangents:
    """The same for packed sequences of different lengths, laid out as (batch, length, head, feature)."""
    out, logsumexp, state, unused = call.out[:4]
    found = aten._flash_attention_backward(
        call.grad,
        *_operands(call),
        out,
        logsumexp,
        named(call, "cum_seq_q"),
        named(call, "cum_seq_k"),
        *_lengths(call),
        named(call, "dropout_p"),
        named(call, "is_causal"),
        state,
        unused,
        scale=named(call, "scale"),
        window_size_left=named(call, "window_size_left"),
        window_size_right=named(call, "window_size_right"),
    )
    return _collect(call, found)


@vjp(aten._scaled_dot_product_efficient_attention.default)
def efficient_attention(call: Call) -> Cotangents:
    """Memory-efficient attention; its bias may ask for a cotangent."""
    names = ("query", "key", "value", "attn_bias")
    out, logsumexp, seed, offset = call.out[:4]
    found = aten._scaled_dot_product_efficient_attention_backward(
        call.grad,
        *_operands(call),
        named(call, "attn_bias"),
        out,
        logsumexp,
        seed,
        offset,
        named(call, "dropout_p"),
        [call.needs(key_of(call, name)) for name in names],
        named(call, "is_causal"),
        scale=named(call, "scale"),
    )
    return _collect(call, found, names)


@vjp(aten._efficient_attention_forward.default)
def efficient_attention_of_sequences(call: Call) -> Cotangents:
    """The same for packed sequences of different lengths, laid out as (batch, length, head, feature)."""
    out, logsumexp, seed, offset = call.out[:4]
    q, k, v = _operands(call)
    longest = [named(call, name) for name in ("max_seqlen_q", "max_seqlen_k")]
    found = aten._efficient_attention_backward(
        call.grad,
        q,
        k,
        v,
        named(call, "bias"),
        out,
        named(call, "cu_seqlens_q"),
        named(call, "cu_seqlens_k"),
        q.shape[1] if longest[0] is None else longest[0],
        k.shape[1] if longest[1] is None else longest[1],
        logsumexp,
        named(call, "dropout_p"),
        seed,
        offset,
        named(call, "custom_mask_type"),
        call.needs(key_of(call, "bias")),
        scale=named(call, "scale"),
        window_size=named(call, "window_size"),
    )
    return _collect(call, found, ("query", "key", "value", "bias"))


@vjp(aten._scaled_dot_product_cudnn_attention.default, aten._cudnn_attention_forward.default)
def cudnn_attention(call: Call) -> Cotangents:
    """Attention by cuDNN, dense or of packed sequences."""
    out, logsumexp, starts_q, starts_k, _, _, seed, offset = call.out[:8]
    backward = aten._scaled_dot_product_cudnn_attention_backward
    if call.op.target is aten._cudnn_attention_forward.default:
        backward, starts_q, starts_k = (
            aten._cudnn_attention_backward,
            named(call, "cum_seq_q"),
            named(call, "cum_seq_k"),
        )
    found = backward(
        call.grad,
        *_operands(call),
        out,
        logsumexp,
        seed,
        offset,
        named(call, "attn_bias"),
        starts_q,
        starts_k,
        *_lengths(call),
        named(call, "dropout_p"),
        named(call, "is_causal"),
        scale=named(call, "scale"),
    )
    return _collect(call, found)


@vjp(aten._scaled_dot_product_fused_attention_overrideable.default)
def fused_attention_of_a_device(call: Call) -> Cotangents:
    """What devices of other makers have in place of the kernels above."""
    names = ("query", "key", "value", "attn_bias")
    out, logsumexp, starts_q, starts_k, _, _, seed, offset = call.out[:8]
    found = aten._scaled_dot_product_fused_attention_overrideable_backward(
        call.grad,
        *_operands(call),
        named(call, "attn_bias"),
        [call.needs(key_of(call, name)) for name in names],
        out,
        logsumexp,
        starts_q,
        starts_k,
        *_lengths(call),
        named(call, "dropout_p"),
        named(call, "is_causal"),
        seed,
        offset,
        scale=named(call, "scale"),
    )
    return _collect(call, found, names)

"""Packed sequences, and cells that a GPU computes in one kernel: the gates that it returned go into its own adjoint.

On a CPU the cells, and whole layers everywhere, are recorded as the calls they consist of, which have rules of their
own. The products with weights lie outside of the cells; a cell adds its biases, so that no weight is read here.
"""

from __future__ import annotations

import torch

from hzo.rules.base import Call, Cotangents, Key, vjp
from hzo.rules.schema import key_of, named

aten = torch.ops.aten


@vjp(aten._pack_padded_sequence.default)
def pack_padded_sequence(call: Call) -> Cotangents:
    """The steps of sequences of different lengths, those of all sequences beside each other."""
    x, _, batch_first = call.args[:3]
    return {0: aten._pack_padded_sequence_backward(call.grad, x.shape, call.out[1], batch_first)}


@vjp(aten._thnn_fused_lstm_cell.default)
def lstm_cell(call: Call) -> Cotangents:
    """One step of an LSTM, from its gates before activation."""
    of_hidden, of_cell = call.grads[:2]
    biased = named(call, "input_bias") is not None
    of_gates, of_before, of_bias = aten._thnn_fused_lstm_cell_backward_impl(
        of_hidden, of_cell, named(call, "cx"), call.out[1], call.out[2], biased
    )
    found = {"input_gates": of_gates, "hidden_gates": of_gates, "cx": of_before}
    if biased:
        found |= {"input_bias": of_bias, "hidden_bias": of_bias}
    return _collect(call, found)


@vjp(aten._thnn_fused_gru_cell.default)
def gru_cell(call: Call) -> Cotangents:
    """One step of a GRU, from its gates before activation."""
    if call.grads[0] is None:
        return {}
    biased = named(call, "input_bias") is not None
    names = ("input_gates", "hidden_gates", "hx", *(("input_bias", "hidden_bias") if biased else ()))
    found = aten._thnn_fused_gru_cell_backward(call.grad, call.out[1], biased)
    return _collect(call, dict(zip(names, found, strict=False)))


def _collect(call: Call, found: dict[str, torch.Tensor]) -> dict[Key, torch.Tensor]:
    keys = {key_of(call, name): g for name, g in found.items()}
    return {key: g for key, g in keys.items() if call.needs(key)}

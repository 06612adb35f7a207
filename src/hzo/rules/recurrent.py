"""Packed sequences, LSTMs of oneDNN, and cells that a GPU computes in one kernel, each with PyTorch's own adjoint.

An LSTM of oneDNN is one operator, and its weights are measured. With some biases so large that their gates are shut or
open, one step on an impulse shows the other gates: the logarithm of the odds of a gate is what its weight and the
impulse make together. Three calls show all four gates; they have a row for each entry of the impulse, and one of zeros.
As precise as the operator in its own precision, since impulses are made as large as leaves the gates in the middle of
their range. Source: ours.

Other layers, and cells on a CPU, are recorded as the calls they consist of, which have rules of their own. Of the cells
that a GPU computes in one kernel, the products with weights lie outside; a cell adds its biases, so that no weight is
read here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import frexp, isfinite, log2, sqrt
from typing import Any

import torch
from torch import Tensor

from hzo.errors import TapeError
from hzo.rules.base import Call, Cotangents, Key, vjp
from hzo.rules.measured import ROWS, Draw, Trial, measured_once
from hzo.rules.schema import key_of, named

aten = torch.ops.aten


@vjp(aten._pack_padded_sequence.default)
def pack_padded_sequence(call: Call) -> Cotangents:
    """The steps of sequences of different lengths, those of all sequences beside each other."""
    x, _, batch_first = call.args[:3]
    return {0: aten._pack_padded_sequence_backward(call.grad, x.shape, call.out[1], batch_first)}


_OPEN = 100.0  # a gate with this bias is one in float32; with its negative, zero
_LSTM = 2  # oneDNN's number of the kind of layer
_LEAST, _MOST = 0.25, 2.5  # of what an impulse and its weights make, the range in which gates show it well
_FARTHEST = 80.0  # of the exponent of an impulse
_TRIES = 20


@vjp(aten.mkldnn_rnn_layer.default, measures=True)
def mkldnn_lstm(call: Call) -> Cotangents:
    """One direction of one layer of an LSTM by oneDNN, over all steps."""
    mode = named(call, "mode")
    if mode != _LSTM:
        raise TapeError(
            f"expected an LSTM (mode {_LSTM}) of aten.mkldnn_rnn_layer, got mode {mode}; please report this"
        )
    x, of_input, of_hidden, *biases = call.args[:5]
    hidden, cell = call.args[5:7]
    sizes = x.shape[-1], hidden.shape[-1]
    if not call.needs(0):
        of_input = torch.zeros(of_input.shape, dtype=of_input.dtype, device=call.args[0].device)  # for that alone
    elif call.weight(1):
        of_input = measured_once(call, 1, of_input, "input", lambda: _measured_gates(call, *sizes, 0), _tried(call, 0))
    if call.weight(2):
        of_hidden = measured_once(
            call, 2, of_hidden, "hidden", lambda: _measured_gates(call, *sizes, 1), _tried(call, 1)
        )
    found = aten.mkldnn_rnn_layer_backward(
        x, of_input, of_hidden, *biases, hidden, cell, *call.out[:3], *call.grads[:3], named(call, "reverse"), mode,
        named(call, "hidden_size"), named(call, "num_layers"), named(call, "has_biases"), True,
        named(call, "bidirectional"), named(call, "batch_sizes"), named(call, "batch_first"), call.out[3],
    )  # fmt: skip
    return {key: found[key] for key in range(7) if call.needs(key)}


def _measured_gates(call: Call, inputs: int, width: int, which: int) -> Tensor:
    """The weight of an LSTM's input (``which`` = 0) or of its state (1), for all gates, by impulses in one of them."""
    dtype, device = call.args[1 + which].dtype, call.args[0].device
    size = inputs if which == 0 else width
    probe = torch.zeros(size + 1, size, dtype=dtype, device=device)
    beside = torch.zeros(size + 1, width if which == 0 else inputs, dtype=dtype, device=device)
    step, state = (probe[None], beside) if which == 0 else (beside[None], probe)
    second = torch.zeros(4 * width, dtype=dtype, device=device)
    replaced: dict[Key, object] = {0: step, 4: second, 5: state}
    replaced |= {key_of(call, "reverse"): False, key_of(call, "has_biases"): True, key_of(call, "train"): False}

    def run(before: float, *biases: float) -> tuple[Tensor, Tensor]:
        bias = torch.tensor(biases, dtype=dtype, device=device).repeat_interleave(width)
        cell = torch.full((size + 1, width), before, dtype=dtype, device=device)
        _, hidden, after, _ = call.measure({**replaced, 3: bias, 6: cell}, probe)
        return hidden, after

    size_of = _Impulses(size, width)
    for _ in range(_TRIES):
        scale = torch.tensor(size_of.exponents, device=device).exp2().to(dtype)
        probe[:size].diagonal().copy_(scale)
        seen = _gates(run)
        seen = seen[:-1] - seen[-1:]
        if size_of.fit(seen.abs().amax(1).tolist()):
            return (seen / scale[:, None]).t().contiguous()
    raise TapeError(
        "the weights of an LSTM could not be measured: its gates answer to no impulse between very small and very "
        "large ones; they are not finite, or what computes the layer is no LSTM"
    )


def _tried(call: Call, which: int) -> Trial:
    """One step on random numbers that leave the gates open: the layer's own against that with the kept weight."""
    x, hidden = call.args[0], call.args[5]
    inputs, width = x.shape[-1], hidden.shape[-1]
    size = inputs if which == 0 else width

    def answers(rows: Tensor, weights: dict[Key, object]) -> Tensor:
        like: Any = {"dtype": rows.dtype, "device": rows.device}
        beside = torch.zeros(ROWS, width if which == 0 else inputs, **like)
        step, state = (rows[None], beside) if which == 0 else (beside[None], rows)
        none, cell = torch.zeros(4 * width, **like), torch.ones(ROWS, width, **like)
        replaced: dict[Key, object] = {0: step, 3: none, 4: none, 5: state, 6: cell, **weights}
        replaced |= {key_of(call, "reverse"): False, key_of(call, "has_biases"): True, key_of(call, "train"): False}
        return torch.cat(call.measure(replaced, rows)[1:3], 1)

    def expect(kept: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        sizes = kept.norm(dim=1)
        rows = draw(ROWS, size, like=kept) / sizes.max().clamp(min=1e-30)
        other = torch.zeros(4 * width, inputs if which else width, dtype=kept.dtype, device=kept.device)
        expected = answers(rows, {1: other, 2: kept} if which else {1: kept, 2: other})
        per_unit = (rows.norm(dim=1, keepdim=True) * sizes).view(ROWS, 4, width).sum(1) + 1
        return rows, expected, torch.cat([per_unit, per_unit], 1)

    return Trial(12 * size * width * size, expect, lambda rows: answers(rows, {}))


class _Impulses:
    """How large impulses are: powers of two, so that nothing is rounded, which leave the gates where they show them."""

    def __init__(self, size: int, width: int) -> None:
        self.exponents = [float(frexp(sqrt(width))[1])] * size  # right for weights as PyTorch draws them
        self._low, self._high = [-_FARTHEST] * size, [_FARTHEST] * size

    def fit(self, answers: list[float]) -> bool:
        """Whether all gates answered well; otherwise the next impulses are chosen, by bisection or by proportion."""
        good = True
        for k, answer in enumerate(answers):
            now, better = self.exponents[k], 0.0
            if not isfinite(answer):
                self._high[k] = now
                better = round((self._low[k] + now) / 2)
            elif answer == 0:
                if now >= _FARTHEST:  # a weight of zero
                    continue
                self._low[k] = now
                better = _FARTHEST if self._high[k] == _FARTHEST else round((now + self._high[k]) / 2)
            elif not _LEAST <= answer <= _MOST:
                better = now - round(log2(answer))
            else:
                continue
            good, self.exponents[k] = False, better
        return good


def _gates(run: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """What goes into the gates (input, forget, candidate, output) by what comes out of one step."""
    hidden, cell = run(0.0, 0.0, -_OPEN, _OPEN, 0.0)  # the cell shows the input gate
    entering, leaving = cell.logit(), (hidden / cell.tanh()).logit()
    candidate = run(0.0, _OPEN, -_OPEN, 0.0, 0.0)[1].atanh()
    forgetting = run(1.0, -_OPEN, 0.0, 0.0, 0.0)[1].logit()
    return torch.cat([entering, forgetting, candidate, leaving], 1)


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

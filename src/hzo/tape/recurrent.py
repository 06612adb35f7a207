"""Recurrent layers with one operation for what a cell does besides its products: the same arithmetic as PyTorch's, in
the same order, whose dozen small calls a step would be recorded one by one.

Products with weights stay calls of their own, whose rules measure them. Source of the cells: PyTorch's ``RNN.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class GruCell(torch.autograd.Function):
    """The next state of a GRU by the products of its input and of its state, (N, 3H) each, and the state, (N, H).

    Only operands are saved: a derivative taken inside a step goes through the backward, and would end at anything else.
    """

    @staticmethod
    def forward(ctx: Any, of_input: Tensor, of_state: Tensor, state: Tensor) -> Tensor:
        ctx.save_for_backward(of_input, of_state, state)
        _, update, new, _ = _gru_gates(of_input, of_state)
        return (state - new).mul_(update).add_(new)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_input, of_state, state = ctx.saved_tensors
        reset, update, new, state_new = _gru_gates(of_input, of_state)
        of_new = grad * (1 - update) * (1 - new * new)
        of_update = grad * (state - new) * update * (1 - update)
        of_reset = of_new * state_new * reset * (1 - reset)
        return (
            torch.cat([of_reset, of_update, of_new], -1),
            torch.cat([of_reset, of_update, of_new * reset], -1),
            grad * update,
        )


def _gru_gates(of_input: Tensor, of_state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input_reset, input_update, input_new = of_input.chunk(3, -1)
    state_reset, state_update, state_new = of_state.chunk(3, -1)
    reset, update = (state_reset + input_reset).sigmoid(), (state_update + input_update).sigmoid()
    return reset, update, (input_new + state_new * reset).tanh(), state_new


class LstmCell(torch.autograd.Function):
    """The next state and cell of an LSTM, (N, H) each, by the products of its input and its state, (N, 4H) each, and
    the cell. Only operands are saved, as for a GRU."""

    @staticmethod
    def forward(ctx: Any, of_input: Tensor, of_state: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(of_input, of_state, cell)
        enter, forget, candidate, leave = _lstm_gates(of_input, of_state)
        after = forget * cell + enter * candidate
        return leave * after.tanh(), after

    @staticmethod
    def backward(ctx: Any, of_hidden: Tensor, of_after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_input, of_state, cell = ctx.saved_tensors
        enter, forget, candidate, leave = _lstm_gates(of_input, of_state)
        shown = (forget * cell + enter * candidate).tanh()
        of_cell = of_after + of_hidden * leave * (1 - shown * shown)
        of_gates = torch.cat(
            [
                of_cell * candidate * enter * (1 - enter),
                of_cell * cell * forget * (1 - forget),
                of_cell * enter * (1 - candidate * candidate),
                of_hidden * shown * leave * (1 - leave),
            ],
            -1,
        )
        return of_gates, of_gates, of_cell * forget


def _lstm_gates(of_input: Tensor, of_state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    enter, forget, candidate, leave = (of_state + of_input).chunk(4, -1)
    return enter.sigmoid(), forget.sigmoid(), candidate.tanh(), leave.sigmoid()


HiddenState = tuple[Tensor, ...]
"""The hidden state, and the cell of an LSTM."""
Weights = Sequence[Tensor]
"""Of one direction of one layer: of the input, of the state, two biases where there are any, a projection."""


def layers(
    kind: str,
    x: Tensor,
    state: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biased: bool,
    count: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """What ``torch.lstm`` and ``torch.gru`` return for padded sequences, with their arguments."""
    first = (state,) if isinstance(state, Tensor) else tuple(state)
    states = list(zip(*(s.unbind(0) for s in first), strict=True))
    directions = 2 if bidirectional else 1
    each = len(weights) // (count * directions)
    x = x.transpose(0, 1) if batch_first else x
    last: list[HiddenState] = []
    for layer in range(count):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            out, end = _run(kind, x, states[k], weights[k * each : (k + 1) * each], biased, backwards=direction == 1)
            outputs.append(out)
            last.append(end)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and train and layer < count - 1:
            x = F.dropout(x, dropout, training=True)
    x = x.transpose(0, 1) if batch_first else x
    return (x, *(torch.stack(parts) for parts in zip(*last, strict=True)))


def _run(
    kind: str, x: Tensor, state: HiddenState, weights: Weights, biased: bool, backwards: bool
) -> tuple[Tensor, HiddenState]:
    of_input, of_state = weights[0], weights[1]
    biases: tuple[Tensor | None, Tensor | None] = (weights[2], weights[3]) if biased else (None, None)
    projection = weights[-1].t() if len(weights) in (3, 5) else None
    steps = F.linear(x, of_input, biases[0]).unbind(0)
    transposed = of_state.t()
    outputs = []
    if backwards:
        steps = steps[::-1]
    for step in steps:
        product = state[0].mm(transposed) if biases[1] is None else torch.addmm(biases[1], state[0], transposed)
        state = _next(kind, step, product, state, projection)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _next(kind: str, step: Tensor, product: Tensor, state: HiddenState, projection: Tensor | None) -> HiddenState:
    if kind == "gru":
        return (GruCell.apply(step, product, state[0]),)  # type: ignore[no-untyped-call]
    hidden, cell = LstmCell.apply(step, product, state[1])  # type: ignore[no-untyped-call]
    return (hidden if projection is None else hidden.mm(projection)), cell


def cell(
    kind: str,
    x: Tensor,
    state: Tensor | Sequence[Tensor],
    of_input: Tensor,
    of_state: Tensor,
    input_bias: Tensor | None = None,
    state_bias: Tensor | None = None,
) -> Tensor | HiddenState:
    """What ``torch.lstm_cell`` and ``torch.gru_cell`` return, with their arguments."""
    before = (state,) if isinstance(state, Tensor) else tuple(state)
    found = _next(kind, F.linear(x, of_input, input_bias), F.linear(before[0], of_state, state_bias), before, None)
    return found[0] if kind == "gru" else found


def fits(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one of padded sequences, on a CPU and of one dtype; packed ones run step by step, and PyTorch
    says what is wrong with a call that has other sizes."""
    if kind not in RUNS or kwargs:
        return False
    tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
    same = all(t.dtype == args[0].dtype and t.device.type == "cpu" for t in tensors)
    if kind.endswith("_cell"):
        return same and args[0].dim() == 2
    padded = len(args) == 9 and args[0].dim() == 3 and not isinstance(args[3], (list, tuple))
    return same and padded and args[0].numel() > 0 and _sizes_fit(args)


def _sizes_fit(args: tuple[Any, ...]) -> bool:
    x, state, weights, _, count, _, _, bidirectional, batch_first = args
    first = state if isinstance(state, Tensor) else state[0]
    sizes = count * (2 if bidirectional else 1), x.shape[0 if batch_first else 1]
    return first.dim() == 3 and first.shape[:2] == sizes and x.shape[-1] == weights[0].shape[1]


def onednn_takes(args: tuple[Any, ...]) -> bool:
    """Whether an LSTM has no projection."""
    hidden, cell = args[1]
    return bool(hidden.shape[-1] == cell.shape[-1])


RUNS: dict[str, Callable[..., Any]] = {
    "lstm": lambda *args: layers("lstm", *args),
    "gru": lambda *args: layers("gru", *args),
    "lstm_cell": lambda *args: cell("lstm", *args),
    "gru_cell": lambda *args: cell("gru", *args),
}

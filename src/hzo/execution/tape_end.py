"""Run the end of a tape again from other values: the loss at other outputs of the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from hzo.execution import counting
from hzo.execution.copies import call_with
from hzo.tape import Tape
from hzo.tape.record import flat


@torch.no_grad()
def replay(tape: Tape, start: int, moved: Mapping[int, Tensor], seeds: Mapping[int, Tensor]) -> float:
    """Run the operations from ``start`` on that depend on some values, with others in the place of these.

    Args:
        tape: of a recording that kept all contents. moved: by value. seeds: weights of the values asked for, the loss.

    Returns the weighted sum. Random numbers and buffers are those of the recording. Cost: one check evaluation.
    """
    local = dict(moved)
    for op in tape.operations[start:]:
        given = {v: local[v] for v in op.reads() if v in local}
        if not given:
            continue
        state = tape.states.get(op.index)
        with nullcontext() if state is None else state.again():
            results = flat(call_with(tape, op, given))
        local.update((v, r) for v, r in zip(op.writes, results, strict=True) if v is not None)
    counting.add(check_evaluations=1)
    found = ((local[v] if v in local else tape.tensor(v), weight) for v, weight in seeds.items())
    return sum(float((tensor.double() * weight).sum()) for tensor, weight in found)

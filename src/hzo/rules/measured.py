"""Weights that several calls read are measured once: the matrix that a recurrent cell applies at every step.

What was measured is kept while further calls of the same operator with the same weight are to come, and no longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hzo.rules.base import Call
from hzo.tape import Tape
from hzo.tape.operations import Ref


class _Kept:
    """For one recording: how many calls an operator and a weight have, and what was measured for those to come."""

    def __init__(self, tape: Tape) -> None:
        self.uses: Counter[Hashable] = Counter()
        self.seen: dict[Hashable, tuple[Tensor, Tensor, int]] = {}
        for op in tape.operations:
            for template in op.args:
                if type(template) is Ref and tape.values[template.value].weight:
                    tensor = tape.tensors[template.value]
                    if tensor is not None and tensor.layout == torch.strided:
                        self.uses[op.target, _memory(tensor)] += 1


_kept: WeakKeyDictionary[Tape, _Kept] = WeakKeyDictionary()


def _memory(tensor: Tensor) -> Hashable:
    """Equal for tensors that show the same content of the same memory, as long as one of them lives."""
    bits = tensor.is_conj(), tensor.is_neg()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, bits, tensor._version


def measured_once(call: Call, weight: Tensor, options: Hashable, measure: Callable[[], Tensor]) -> Tensor:
    """What a measurement of an operator shows of a weight.

    Args:
        options: all that it depends on besides the operator and the weight.
        measure: taken where it is not known from another call.
    """
    if weight.layout != torch.strided or weight.numel() == 0:
        return measure()
    kept = _kept.get(call.tape)
    if kept is None:
        kept = _kept[call.tape] = _Kept(call.tape)
    memory = _memory(weight)
    uses = kept.uses[call.op.target, memory]
    if uses < 2:
        return measure()
    key = (call.op.target, memory, options)
    found, held, left = kept.seen.pop(key, (None, weight, uses))
    if found is None:
        found = measure()
    if left > 1:
        kept.seen[key] = found, held, left - 1
    return found

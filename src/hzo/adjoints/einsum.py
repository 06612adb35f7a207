"""Sums of products by letters: the Jacobian with respect to one operand is the product of the others (textbook)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hzo.adjoints.common import Adjoint, Call
from hzo.tracing import Graph, Operation, Ref


def _letters(equation: str) -> tuple[list[str], str] | None:
    """Letters of the operands and of the result; None for what this rule does not cover."""
    text = equation.replace(" ", "")
    if "->" not in text or not text.replace(",", "").replace("->", "").isalpha():
        return None
    operands, _, result = text.partition("->")
    found = operands.split(",")
    distinct = all(len(set(letters)) == len(letters) for letters in (*found, result))
    return (found, result) if distinct else None


def _accepts(graph: Graph, op: Operation, value: int) -> bool:
    """Activities only: a weight would have to be read."""
    equation, *operands = op.args
    letters = _letters(equation) if isinstance(equation, str) else None
    plain = all(isinstance(o, Ref) and graph.values[o.value].batched for o in operands)
    return plain and letters is not None and len(letters[0]) == len(operands) and not op.kwargs


def _apply(call: Call, value: int) -> Tensor:
    letters = _letters(call.args[0])
    assert letters is not None
    operands, result = letters
    given = [t.to(call.dtype) for t in call.args[1:]]
    shape = call.activity(value).shape
    found = torch.zeros(shape, dtype=call.dtype, device=call.cotangent.device)
    for k, template in enumerate(call.op.args[1:]):
        if template != Ref(value):
            continue
        others = [j for j in range(len(operands)) if j != k]
        known = set(result).union(*(operands[j] for j in others))
        kept = "".join(letter for letter in operands[k] if letter in known)
        terms = ",".join([result, *(operands[j] for j in others)])
        part = torch.einsum(f"{terms}->{kept}", call.cotangent, *(given[j] for j in others))
        for d, letter in enumerate(operands[k]):
            if letter not in known:  # summed over alone: the same everywhere along it
                part = part.unsqueeze(d)
        found += part
    return found


MODULES: dict[type[nn.Module], Adjoint] = {}
FUNCTIONS = {torch.einsum: Adjoint("bilinear", _apply, _accepts, reads="inputs")}

"""Rules of operators that this machine has no kernel for, tried on operands and results that are made by hand."""

import torch

from hzo.reverse.walk import ENGINE
from hzo.rules.base import Call, Engine
from hzo.rules.registry import find_rule
from hzo.tape import Operation, Tape, Value, ref


def by_hand(target, args, out, grads, *, kwargs=None, weights=(), measure=None):
    """What the rule of an operator says of a call with these operands, results and cotangents.

    Args:
        args, kwargs: operands that require a gradient ask for a cotangent. weights: places of those that are weights.
        measure: runs the operator on a probe; the operator itself by default.
    """
    tape = Tape()

    def placed(key, argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        tape.values.append(Value(argument.shape, argument.dtype, argument.requires_grad, -1, key in weights))
        tape.tensors.append(argument.detach())
        return ref(len(tape.values) - 1)

    places = tuple(placed(k, argument) for k, argument in enumerate(args))
    named = {name: placed(name, argument) for name, argument in (kwargs or {}).items()}
    writes = []
    for result in out:
        if not isinstance(result, torch.Tensor):
            writes.append(None)
            continue
        writes.append(len(tape.values))
        tape.values.append(Value(result.shape, result.dtype, True, 0, False))
        tape.tensors.append(result.detach())
    op = Operation(0, target, places, named, tuple(writes))
    run = measure or (lambda op, args, kwargs, size: op.target(*args, **kwargs))
    with torch.no_grad():
        return find_rule(target).vjp(Call(tape, op, list(grads), Engine(run, ENGINE.again)))

"""Rules of operators that this machine has no kernel for, tried on operands and results that are made by hand."""

import torch

from hzo.reverse.walk import ENGINE
from hzo.rules.base import Call, Engine
from hzo.rules.registry import find_rule
from hzo.tape import Recorder, ref


def by_hand(target, args, out, grads, *, kwargs=None, weights=(), measure=None):
    """What the rule of an operator says of a call with these operands, results and cotangents.

    Args:
        args, kwargs: operands that require a gradient ask for a cotangent. weights: places of those that are weights.
        measure: runs the operator on a probe; the operator itself by default.
    """
    recorder = Recorder(keep=True)

    def placed(key, argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        return ref(recorder.new_value(argument.detach(), argument.requires_grad, -1, key in weights))

    places = tuple(placed(k, argument) for k, argument in enumerate(args))
    op = recorder.operation(target, places, {name: placed(name, a) for name, a in (kwargs or {}).items()})
    op.writes = tuple(
        recorder.new_value(r.detach(), True, op.index, False) if isinstance(r, torch.Tensor) else None for r in out
    )
    run = measure or (lambda call, args, kwargs, size: call.op.target(*args, **kwargs))
    with torch.no_grad():
        return find_rule(target).vjp(Call(recorder.tape, op, list(grads), Engine(run, ENGINE.again)))

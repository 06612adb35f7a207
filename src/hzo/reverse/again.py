"""Recording one call again as the calls that it consists of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hzo.reverse.sweep import sweep
from hzo.rules.base import Call, Cotangents, Key
from hzo.rules.fallback import flat_results
from hzo.tape import Recorder
from hzo.tape.surroundings import recording


def cotangents_of(call: Call, function: Callable[..., Any]) -> Cotangents:
    """The cotangents of a call's operands through ``function``, which computes the same by other calls."""
    leaves: list[tuple[Key, int | None, Tensor]] = []

    def leaf(key: Key, k: int | None, tensor: Any, asked: bool) -> Any:
        if not isinstance(tensor, Tensor) or not asked:
            return tensor
        made = tensor.detach().requires_grad_()
        leaves.append((key, k, made))
        return made

    def fill(key: Key, given: Any) -> Any:
        if isinstance(given, Tensor):
            return leaf(key, None, given, call.needs(key))
        if isinstance(given, tuple) and call.needs(key):
            return tuple(leaf(key, k, t, asked) for k, (t, asked) in enumerate(zip(given, call.each(key), strict=True)))
        return given

    args = [fill(k, a) for k, a in enumerate(call.args)]
    kwargs = {k: fill(k, a) for k, a in call.kwargs.items()}
    recorder = Recorder()
    with recording(recorder):
        for key, k, made in leaves:
            value = recorder.read(made)
            recorder.tape.values[value].weight = call.weight(key) if k is None else False
        results = flat_results(function(*args, **kwargs))
        seeds: dict[int, Tensor] = {}
        for result, grad in zip(results, call.grads, strict=True):
            if grad is not None and isinstance(result, Tensor) and result.requires_grad:
                value = recorder.read(result)
                seeds[value] = seeds[value] + grad if value in seeds else grad
    with torch.no_grad():
        found = sweep(recorder.tape, seeds, {})
    cotangents: dict[Key, Any] = {}
    for key, k, made in leaves:
        value_of = recorder.tape.value_of(made)
        grad = found.get(value_of) if value_of is not None else None
        if k is None:
            if grad is not None:
                cotangents[key] = grad
        else:
            given = call.kwargs[key] if isinstance(key, str) else call.args[key]
            cotangents.setdefault(key, [None] * len(given))[k] = grad
    return cotangents

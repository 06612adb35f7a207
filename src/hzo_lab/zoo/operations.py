"""What the gradient of a recorded step measures: operations, counted from shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

import hzo
from hzo.reverse import again, sweep
from hzo.rules.base import Engine
from hzo.rules.registry import kind_of


def forward_equivalents(call: Callable[[], Tensor]) -> tuple[float, float]:
    """Forward equivalents of one gradient, and the share of its calls that go by queries.

    Forward equivalents are the operations of all that the sweep measures, over those of the calls of the step. By
    queries go calls of operators without a rule, a decomposition or a slope: element by element. ``.grad`` stays as it
    is.

    Cost: one gradient. Raises: as that.
    """
    with hzo.record() as step:
        loss = call()
    tape = step.tape
    kinds = [kind_of(op.target) for op in tape.operations]
    forward = 0
    for op in tape.operations:
        results = [None if v is None else tape.tensors[v] for v in op.writes]
        forward += operations(
            op.target, tape.resolve(op.args), {k: tape.resolve(v) for k, v in op.kwargs.items()}, results
        )
    measured = 0

    def measure(made: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> Any:
        nonlocal measured
        out = made.op.target(*args, **kwargs)
        measured += operations(made.op.target, args, kwargs, out)
        return out

    seeds, hooks = step.seed(loss)
    with torch.no_grad(), torch.autocast(loss.device.type, enabled=False):
        sweep(tape, seeds, hooks, Engine(measure, again), counted=False)
    return measured / max(forward, 1), kinds.count("queries") / max(len(kinds), 1)


def operations(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Multiplications of products, as PyTorch's own counter has them, and the elements of the results."""
    results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    written = sum(t.numel() for t in results)
    products = flop_registry.get(getattr(target, "overloadpacket", None))
    if products is None or not results:
        return written
    return int(products(*args, **kwargs, out_val=results[0] if len(results) == 1 else tuple(results))) + written

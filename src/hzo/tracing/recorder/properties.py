"""What running each operation by itself tells: is it deterministic, are samples apart, what does it move and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from hzo.errors import TraceError
from hzo.reverse import measurements_of
from hzo.rules.registry import kind_of
from hzo.tape import Operation, Tape
from hzo.tape.functions import replay_of
from hzo.tape.opaque import Opaque
from hzo.tape.record import flat
from hzo.tracing import GraphOperation, Measured, ParameterUse
from hzo.tracing.recorder.sample_axes import Axes, close, depends, find_axes, finite, guess

aten = torch.ops.aten
_BY_SAMPLE = (aten.bmm.default, aten.baddbmm.default, aten._trilinear.default)


def rerun(tape: Tape, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The results of an operation on other arguments, from the random state and the buffers of the first time."""
    state = tape.states.get(op.index)
    target = replay_of(op.target)
    with torch.no_grad():
        if state is None:
            return flat(target(*args, **kwargs))
        with state.again():
            return flat(target(*args, **kwargs))


def inspect(
    tape: Tape, end: int, axes: Axes, batch: int, names: dict[int, str]
) -> tuple[list[GraphOperation], dict[int, str]]:
    """Every operation of a model with what was learned about it; fills ``axes``.

    Args:
        axes: where samples stand in the leaves that depend on the inputs. names: of the trainable leaves, by value.

    Raises:
        TraceError: an operation on what depends on the inputs makes complex numbers.
    """
    derived: set[int] = set(names)  # trainable, or computed from such and not from an input
    operations = []
    for op in tape.operations[:end]:
        batched = depends(op, axes)
        reads = tuple(dict.fromkeys(op.reads()))
        if batched and any(v is not None and tape.values[v].dtype.is_complex for v in op.writes):
            raise TraceError(
                f"{_name(op)} makes a complex tensor, which has no cotangent in a plan; leave out plan and options "
                "(hzo.backward takes it), or wrap the part in hzo.blackbox"
            )
        parameters = tuple(ParameterUse(v, names.get(v, "")) for v in reads if v in derived and v not in axes)
        learned = _learned(tape, op, batched, reads, parameters)
        if batched:
            if learned.deterministic:
                learned = replace(learned, coupled=_place_samples(tape, op, axes, batch))
            else:  # noise hides where samples stand: as opaque operations have them, in the first dimension
                axes.update((v, guess(tape.values[v].shape, batch)) for v in learned.writes)
        elif parameters:
            derived.update(v for v in learned.writes)
        cost = _cost(tape, op) if batched else 0
        operations.append(replace(learned, cost=-(-cost // batch)))
    return operations, names


def _place_samples(tape: Tape, op: Operation, axes: Axes, batch: int) -> bool:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        return rerun(tape, op, args, kwargs)

    found, coupled = find_axes(tape, op, axes, batch, run)
    axes.update(found)
    return coupled


def _learned(
    tape: Tape, op: Operation, batched: bool, reads: tuple[int, ...], parameters: tuple[ParameterUse, ...]
) -> GraphOperation:
    state = tape.states.get(op.index)
    opaque = isinstance(op.target, Opaque)
    learned = GraphOperation(
        index=op.index,
        name=_name(op),
        target=op.target,
        args=op.args,
        kwargs=op.kwargs,
        results=op.writes,
        reads=reads,
        parameters=parameters,
        batched=batched,
        rule="" if opaque else kind_of(op.target),
        random=state is not None and state.drew and replay_of(op.target) is op.target,
    )
    if opaque and state is not None:
        again = rerun(tape, op, tape.resolve(op.args), {})
        same = [close(a, tape.tensor(v)) for a, v in zip(again, learned.writes, strict=True)]
        return replace(learned, stateful=state.moved, deterministic=all(same))
    measured = {v: m for v in reads if tape.values[v].requires and (m := _measured(tape, op, v, learned.rule))}
    return replace(learned, measured=measured)


def _measured(tape: Tape, op: Operation, value: int, kind: str) -> Measured | None:
    """What the rule measures for one operand; None for nothing, or where queries do it element by element."""
    if kind == "queries":
        return None
    found = measurements_of(tape, op, frozenset({value}))
    if not found:
        return None
    fixed, per_sample = [], []
    for size, of_batch in found:
        rows = size[0] if size else 1
        elements = 1
        for length in size:
            elements *= length
        if of_batch or kind == "slope" or op.target in _BY_SAMPLE:
            per_sample.append((rows, elements))
        else:
            fixed.append((rows, elements))
    return Measured(tuple(fixed), tuple(per_sample))


def _name(op: Operation) -> str:
    """What was called, in a word."""
    if isinstance(op.target, Opaque):
        return op.target.name
    target = getattr(op.target, "func", op.target)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2].strip("_")
    return str(getattr(target, "__name__", None) or target)


def _cost(tape: Tape, op: Operation) -> int:
    """Operations of one run of the batch; what only shows memory in another shape counts as one, not as nothing."""
    args, kwargs = tape.resolve(op.args), {k: tape.resolve(v) for k, v in op.kwargs.items()}
    results = [None if v is None else tape.tensors[v] for v in op.writes]
    products = flop_registry.get(getattr(op.target, "overloadpacket", None))
    if isinstance(op.target, Opaque):
        with FlopCounterMode(display=False) as counter:
            rerun(tape, op, args, kwargs)
        flops = counter.get_total_flops()
    elif products is None:
        flops = 0
    else:
        flops = products(*args, **kwargs, out_val=results[0] if len(results) == 1 else tuple(results))
    shown = {_place(t) for v in op.reads() if (t := tape.tensors[v]) is not None}
    written = sum(t.numel() for t in results if t is not None and _place(t) not in shown)
    return max(1, int(flops) + written)


def _place(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return -id(tensor)


def finite_values(tape: Tape, count: int) -> Sequence[bool]:
    """For every value whether it holds numbers alone."""
    return [
        t is None or not t.is_floating_point() or t.layout != torch.strided or finite(t.detach())
        for t in tape.tensors[:count]
    ]

"""What running each operation by itself tells: does it repeat, keep samples apart, move buffers, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hzo import queries
from hzo.chain import Attribute, Graph, Operation, Value, leaves
from hzo.errors import TraceError
from hzo.execution import call, resolve
from hzo.side_effects import devices_of, random_state, set_random_state


def inspect_operations(graph: Graph, inputs: Sequence[Tensor]) -> Graph:
    """The graph with what was learned about its operations. Meant to run inside ``side_effects.contained``."""
    values: dict[int, Tensor] = dict(zip(graph.inputs, inputs, strict=True))
    operations = []
    for op in graph.operations:
        learned, results = _inspect(graph, op, values, devices_of(inputs))
        values.update(zip(op.writes, results, strict=True))
        operations.append(learned)
    finite = {v: not t.is_floating_point() or bool(t.isfinite().all()) for v, t in values.items()}
    # Two recordings of batch and batch + 1 samples, two runs of the batch here and one of two batches.
    queries.add(check_evaluations=len(graph.stages) * (6 * graph.batch + 1))
    learned_values = tuple(replace(value, finite=finite[value.index]) for value in graph.values)
    return replace(graph, operations=tuple(operations), values=learned_values)


def _inspect(
    graph: Graph, op: Operation, values: dict[int, Tensor], devices: Sequence[torch.device]
) -> tuple[Operation, tuple[Tensor, ...]]:
    buffers = _buffers(op)
    held = [buffer.get() for buffer in buffers]
    before = [tensor.clone() for tensor in held]
    state = random_state(devices)

    def rewind() -> None:
        set_random_state(state)
        for tensor, copy in zip(held, before, strict=True):
            tensor.copy_(copy)

    results = call(op, *resolve(op, values.__getitem__, graph.batch))
    _check_same_tensors(op, buffers, held)
    stateful = tuple(b for b, copy in zip(buffers, before, strict=True) if not torch.equal(b.get(), copy))
    after = random_state(devices), [tensor.clone() for tensor in held]
    rewind()
    with FlopCounterMode(display=False) as counter:
        again = call(op, *resolve(op, values.__getitem__, graph.batch))
    same = all(close(a, b) for a, b in zip(results, again, strict=True))
    coupled = False
    if op.batched and same and not op.random:
        rewind()
        coupled = _mixes_samples(graph, op, values, results)
    set_random_state(after[0])
    for tensor, copy in zip(held, after[1], strict=True):
        tensor.copy_(copy)
    flops = counter.get_total_flops()
    written = sum(t.numel() for t in results)
    cost = -(-(flops + written) // graph.batch)
    return replace(op, stateful=stateful, deterministic=same, coupled=coupled, cost=cost), results


def _buffers(op: Operation) -> tuple[Attribute, ...]:
    """The buffers that an operation may move: those of its module, or those among its arguments."""
    if op.module is not None:
        return tuple(
            Attribute(inner, name)
            for inner in op.module.modules()
            for name, buffer in inner._buffers.items()
            if buffer is not None
        )
    found = (leaf for leaf in leaves((op.args, op.kwargs)) if isinstance(leaf, Attribute))
    return tuple(dict.fromkeys(leaf for leaf in found if leaf.name in leaf.owner._buffers))


def _check_same_tensors(op: Operation, buffers: Sequence[Attribute], held: Sequence[Tensor]) -> None:
    for buffer, tensor in zip(buffers, held, strict=True):
        if buffer.get() is not tensor:
            raise TraceError(
                f"{op.name} assigns a new tensor to its buffer {buffer.name!r} in its forward pass, which queries "
                "cannot undo; change the buffer in place instead (copy_, add_)"
            )


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding that a change of kernel or summation order may cause."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = a[a.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    slack = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a.float(), b.float(), rtol=slack, atol=slack * scale, equal_nan=True)


def _mixes_samples(graph: Graph, op: Operation, values: dict[int, Tensor], results: tuple[Tensor, ...]) -> bool:
    """Whether the results of a batch change when other samples stand behind it."""

    def lookup(index: int) -> Tensor:
        value = graph.values[index]
        if not value.batched:
            return values[index]
        rows = value.rows(values[index], graph.batch)
        others = rows[:1].expand_as(rows)
        if graph.batch == 1 and value.floating:
            others = rows * 0.5
        return value.from_rows(torch.cat([rows, others]), 2 * graph.batch)

    try:
        doubled = call(op, *resolve(op, lookup, 2 * graph.batch))
    except Exception as error:
        raise TraceError(
            f"{op.name} runs with {graph.batch} samples and fails with {2 * graph.batch}: {error}. Queries are folded "
            "into the batch; wrap what needs a fixed batch in hzo.blackbox(f, batched=False)"
        ) from error

    def first_half(value: Value, tensor: Tensor) -> Tensor:
        return value.rows(tensor, 2 * graph.batch)[: graph.batch]

    for index, single, double in zip(op.writes, results, doubled, strict=True):
        value = graph.values[index]
        if not value.batched:
            return True
        if not close(value.rows(single, graph.batch), first_half(value, double)):
            return True
    return False

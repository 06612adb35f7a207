"""What running each operation by itself tells: does it repeat, keep samples apart, move buffers, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hzo.errors import TraceError
from hzo.execution import call, counting, devices_of, random_state, resolve, set_random_state
from hzo.tracing import Attribute, Graph, Operation, leaves


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
    counting.add(check_evaluations=len(graph.stages) * (6 * graph.batch + 1))
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
    _check_own_memory(op, values, results, again)
    same = all(close(a, b) for a, b in zip(results, again, strict=True))
    coupled = op.batched and same and _mixes_samples(graph, op, values, results, rewind)
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


def _check_own_memory(
    op: Operation, values: dict[int, Tensor], results: Sequence[Tensor], again: Sequence[Tensor]
) -> None:
    """Raise where a second call overwrites what the first returned: every difference would be zero."""
    if not op.batched:
        return
    given = [values[v] for v in op.reads] + [leaf for leaf in leaves((op.args, op.kwargs)) if isinstance(leaf, Tensor)]
    given += [leaf.get() for leaf in leaves((op.args, op.kwargs)) if isinstance(leaf, Attribute)]
    if op.module is not None:
        given += [*op.module.parameters(), *op.module.buffers()]
    shared = {t.untyped_storage().data_ptr() for t in given}
    for one, other in zip(results, again, strict=True):
        place = one.untyped_storage().data_ptr()
        if one.numel() and place == other.untyped_storage().data_ptr() and place not in shared:
            raise TraceError(
                f"{op.name} returns the same memory whenever it is called, so that a second call overwrites the result "
                "of the first; return a copy, or wrap it in hzo.blackbox(f)"
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
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.allclose(a.to(wide), b.to(wide), rtol=slack, atol=slack * scale, equal_nan=True)


def _mixes_samples(
    graph: Graph,
    op: Operation,
    values: dict[int, Tensor],
    results: tuple[Tensor, ...],
    rewind: Callable[[], None],
) -> bool:
    """Whether the results of a sample change with the samples around it: one before it and one behind it.

    A random operation draws other numbers for another batch: it is compared with a batch of the same size, and all
    others stand behind, since what it draws may depend on what came before (RReLU draws for negative elements alone).
    """

    batch = graph.batch
    given = {v: graph.values[v].rows(values[v], batch) for v in op.reads if graph.values[v].batched}
    zero = {v for v, rows in given.items() if rows.is_floating_point() and not rows.any()}
    given |= {v: _ramp(given[v]) for v in zero}  # nothing shows in zeros

    def arranged(rows: Tensor, others: Tensor) -> Tensor:
        return torch.cat([rows, others]) if op.random else torch.stack([others, rows], 1).flatten(0, 1)

    def run(samples: int, rows_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def lookup(index: int) -> Tensor:
            if index not in given:
                return values[index]
            return graph.values[index].from_rows(rows_of(given[index]), samples)

        rewind()
        try:
            made = call(op, *resolve(op, lookup, samples))
        except Exception as error:
            raise TraceError(
                f"{op.name} runs with {batch} samples and fails with {samples}: {error}. Queries are "
                "folded into the batch; let it take any number of samples (split what needs a fixed one inside; a "
                "black box says batched=False)"
            ) from error
        return [graph.values[v].rows(t, samples) for v, t in zip(op.writes, made, strict=True)]

    if not all(graph.values[v].batched for v in op.writes):
        return True
    own = slice(batch) if op.random else slice(1, None, 2)
    if op.random:
        alone = [rows[own] for rows in run(2 * batch, lambda rows: arranged(rows, rows))]
    elif zero:
        alone = run(batch, lambda rows: rows)
    else:
        alone = [graph.values[v].rows(t, batch) for v, t in zip(op.writes, results, strict=True)]
    among = [rows[own] for rows in run(2 * batch, lambda rows: arranged(rows, _others(rows)))]
    return not all(close(a, b) for a, b in zip(alone, among, strict=True))


def _others(rows: Tensor) -> Tensor:
    """Samples unlike those given, and yet such as the operation may meet."""
    first = rows[:1].expand_as(rows)
    if not torch.equal(first, rows) or not rows.is_floating_point():
        return first  # another sample of the batch; as a multiset they differ, which a permutation would not
    return rows / 2


def _ramp(rows: Tensor) -> Tensor:
    return torch.linspace(0.1, 1, rows.numel(), device=rows.device).to(rows.dtype).view_as(rows)

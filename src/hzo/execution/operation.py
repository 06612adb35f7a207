"""Running one operation inside a query: same random numbers and same buffers as in the base pass, none of them moved.

Nothing here counts: passes.py does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from torch import Tensor

from hzo.execution.activations import Activations
from hzo.execution.copies import call_with, one_by_one, run_copies
from hzo.tape import Operation
from hzo.tape.opaque import Opaque
from hzo.tape.operations import Ref
from hzo.tape.record import flat
from hzo.tracing import Graph, GraphOperation


def query(
    graph: Graph, op: GraphOperation, activations: Activations, moved: Mapping[int, Tensor], copies: int
) -> dict[int, Tensor]:
    """The results of one operation by value, copies in front, where some operands are replaced by moved copies."""
    call = activations.operation(op.index)
    operands = {v: moved[v] for v in op.reads if v in moved}
    state = activations.tape.states.get(op.index)
    again = state.again if state is not None and (op.random or op.stateful) else nullcontext
    by_copy = op.random or (isinstance(op.target, Opaque) and not _foldable(graph, op))
    if by_copy and copies > 1:

        def one(*tensors: Tensor) -> tuple[Tensor, ...]:
            with again():
                return tuple(flat(call_with(activations.tape, call, dict(zip(operands, tensors, strict=True)))))

        results = one_by_one(one, list(operands.values()), copies)
    else:
        with again():
            if isinstance(op.target, Opaque):
                results = _folded(graph, activations, call, operands, copies)
            else:
                results = run_copies(activations.tape, call, operands, copies)
    found = {v: r for v, r in zip(call.writes, results, strict=True) if v is not None}
    return processed(graph, op, found)


def _foldable(graph: Graph, op: GraphOperation) -> bool:
    """Whether all that an opaque operation reads and makes of activations has its samples in the first dimension."""
    values = [graph.values[v] for v in (*op.reads, *op.writes) if graph.values[v].batched]
    return all(v.batch_dim == 0 and v.outer == 1 for v in values)


def _folded(
    graph: Graph, activations: Activations, call: Operation, moved: Mapping[int, Tensor], copies: int
) -> list[Tensor]:
    """An opaque operation on copies for samples: operands that depend on the inputs are repeated for each of them."""
    if copies == 1:
        found = flat(call_with(activations.tape, call, {v: t.squeeze(0) for v, t in moved.items()}))
        return [r.unsqueeze(0) for r in found]
    given: dict[int, Tensor] = {}
    _, tensors, _ = call.args
    for reference in tensors:
        assert type(reference) is Ref
        value = reference.value
        if not graph.values[value].batched:
            continue
        tensor = moved[value] if value in moved else expanded(activations.tensor(value), copies)
        given[value] = tensor.flatten(0, 1)
    results = flat(call_with(activations.tape, call, given))
    return [r.unflatten(0, (copies, -1)) for r in results]


def processed(graph: Graph, op: GraphOperation, results: dict[int, Tensor]) -> dict[int, Tensor]:
    """What an operation hands on, with the noise of its stage where it is the stage's result."""
    if graph.noise is None:
        return results
    stage, source = graph.stage_of[op.index], graph.noise
    return {v: source.processed(t, stage) if graph.handed_on[v] else t for v, t in results.items()}


def read(graph: Graph, tensor: Tensor, stage: int) -> Tensor:
    """What a query returns of a tensor behind a stage."""
    return tensor if graph.noise is None else graph.noise.read(tensor, stage)


def expanded(tensor: Tensor, copies: int) -> Tensor:
    """A base value as copies that take no memory."""
    return tensor.expand(copies, *tensor.shape) if copies > 1 else tensor.unsqueeze(0)

"""Running a graph: the base pass, and slices of it at perturbed states. Counting happens here and nowhere else.

A slice runs on ``copies`` perturbed copies of the batch at once, in a new first dimension. Values that a slice reads
and does not compute are those of the base pass. How one operation runs inside a query is operation.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor

from hzo.execution import counting
from hzo.execution.activations import Activations
from hzo.execution.operation import expanded, query, read
from hzo.tape import Operation
from hzo.tape.record import flat
from hzo.tracing import Graph, GraphOperation


def run_again(
    graph: Graph, activations: Activations, start: int, stop: int, stages: int, released: Sequence[Iterable[int]]
) -> None:
    """Run operations [start, stop) again, as the base pass did, from activations still stored.

    Args:
        stages: how many these operations make up. released: for every operation the values to release after it.

    Cost: ``stages`` base evaluations a sample. Random numbers and buffers are those of the base pass, and none of them
    moves; values that do not depend on the inputs are still there and are not made again.
    """
    for op, gone in zip(graph.operations[start:stop], released, strict=True):
        if op.batched:
            for value, tensor in query(graph, op, activations, {}, 1).items():
                activations.values[value] = tensor.squeeze(0)
        activations.release(graph, gone)
    counting.add(base_evaluations=activations.batch * stages)


def run_slice(
    graph: Graph,
    operations: Sequence[int],
    activations: Activations,
    perturbed: dict[int, Tensor],
    outputs: Sequence[int],
    copies: int,
) -> list[Tensor]:
    """Run some operations with some values replaced by perturbed copies, (copies, *shape); return ``outputs`` alike.

    Cost: ``copies × batch`` queries.
    """
    local = dict(perturbed)
    last_use = {value: k for k in operations for value in graph.operations[k].reads}
    for k in operations:
        op = graph.operations[k]
        if not perturbed or any(v in local for v in op.reads):
            if not any(v in local for v in op.reads):  # identical queries, of a noisy chain
                moved = next((v for v in op.reads if graph.values[v].batched), None)
                if moved is not None:
                    local[moved] = expanded(activations.tensor(moved), copies)
            local.update(query(graph, op, activations, local, copies))
        for value in op.reads:  # what no later operation reads is freed at once
            if last_use[value] == k and value not in outputs:
                local.pop(value, None)
    counting.add(
        queries=copies * activations.batch,
        stage_evaluations=copies * activations.batch * graph.stages_in(operations),
        forward_equivalents=Fraction(copies * graph.cost_of(operations), graph.cost),
        boxes=graph.boxes_in(operations),
    )
    stage = graph.stage_of[operations[-1]] if operations else 0
    found = [local[v] if v in local else expanded(activations.tensor(v), copies) for v in outputs]
    return [read(graph, tensor, stage) for tensor in found]


def run_probe(
    graph: Graph,
    activations: Activations,
    op: GraphOperation,
    call: Operation,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run one operation on arguments of its own, to measure it; the sweep counts what that costs."""
    state = activations.tape.states.get(op.index)
    if state is None:
        result = call.target(*args, **kwargs)
    else:
        with state.again():
            result = call.target(*args, **kwargs)
    stage = graph.stage_of[op.index]
    if graph.noise is None:
        return result
    noisy = [read(graph, t, stage) if isinstance(t, Tensor) else t for t in flat(result)]
    return noisy[0] if isinstance(result, Tensor) else tuple(noisy)


def count_probes(graph: Graph, op: GraphOperation, value: int, activations: Activations) -> None:
    """Count what the rule of an operation measured for one operand: what the plan predicts, probe by probe."""
    measured = (op.measured or {}).get(value)
    if measured is None:
        return
    batch = activations.batch
    for rows, elements in measured.fixed:
        counting.add(
            queries=rows,
            stage_evaluations=rows,
            forward_equivalents=graph.cost_alone(op.index, value, elements) / batch,
            boxes=graph.boxes_in([op.index]),
        )
    for _ in measured.per_sample:
        counting.add(
            queries=batch,
            stage_evaluations=batch,
            forward_equivalents=Fraction(op.cost, graph.cost),
            boxes=graph.boxes_in([op.index]),
        )


def run_with_parameter(
    graph: Graph, op: GraphOperation, activations: Activations, value: int, parameter: Tensor
) -> dict[int, Tensor]:
    """Run one operation on the batch with one of its parameters replaced.

    Cost: one query per sample.
    """
    results = query(graph, op, activations, {value: parameter.unsqueeze(0)}, 1)
    counting.add(
        queries=activations.batch,
        stage_evaluations=activations.batch,
        forward_equivalents=Fraction(op.cost, graph.cost),
        boxes=graph.boxes_in([op.index]),
    )
    stage = graph.stage_of[op.index]
    return {v: read(graph, t.squeeze(0), stage) for v, t in results.items()}


def arguments_of(activations: Activations, call: Operation) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an operation as they were in the base pass."""
    tape = activations.tape
    return tape.resolve(call.args), {k: tape.resolve(v) for k, v in call.kwargs.items()}

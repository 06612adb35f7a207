"""Slow and obviously right: does a coloring keep outputs apart, and does its pattern cover what outputs depend on?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hzo.errors import ColoringError
from hzo.execution import Activations, contained, counting, run_slice
from hzo.finite_differences import Coloring, Pattern
from hzo.gradients import base_pass, prepare
from hzo.plans import Node, Plan
from hzo.tracing import Chain, Graph


def check_coloring(chain: Chain, x: Any, plan: Plan, *, step: float = 1e-2, elements: int | None = None) -> None:
    """Test, element by element, that what a plan perturbs at once does not meet in one output.

    Structural orthogonality: for every output and every color, over all elements one by one, at most one element of
    the color may influence that output (approximate colorings are excused). Coverage: each element by itself is moved
    by ``step`` up and down, and every output that changes must be one that the pattern allows.

    Args:
        chain, x, plan: as for ``hzo.backward``.
        elements: how many elements of each node to move, evenly spread; None moves all.

    Cost: two queries for each element moved (counted as checks), and elements × outputs look-ups in Python: for small
    networks. Nothing is changed. Source: ours; in the manner of SparseMatrixColorings.jl.

    Raises:
        ColoringError: names the node, the elements and the output.
    """
    chain, plan = prepare(chain, x, plan, {})
    graph = chain.traced
    modules = [chain.model, *graph.opaque_modules]
    with torch.no_grad(), contained(modules):
        activations, _ = base_pass(chain, x)
        for node in plan.nodes:
            if node.probe is not None and node.probe.coloring is not None:
                where = f"{graph.describe(node.target)} from {graph.describe(node.source)}"
                check_orthogonality(node.probe.coloring, where)
                _check_coverage(graph, activations, node, node.probe.coloring, step, elements, where)


def check_orthogonality(coloring: Coloring, where: str = "a coloring") -> None:
    """No two elements of one color share an output, tried for every pair of element and output.

    Raises:
        ColoringError: two that do.
    """
    if coloring.spacing is not None:
        return
    for number, pattern in enumerate(coloring.patterns):
        if pattern.value != coloring.shape:
            raise ColoringError(f"{where}: a pattern over {pattern.value}, and colors over {coloring.shape}")
        for output in _indices(pattern.output):
            seen: dict[tuple[int, ...], tuple[int, ...]] = {}
            for element in _indices(pattern.value):
                if not allows(pattern, output, element):
                    continue
                color = tuple(colors[i] for colors, i in zip(coloring.colors, element, strict=True))
                if color in seen:
                    raise ColoringError(
                        f"{where}: elements {seen[color]} and {element} have the same color {color}, and output "
                        f"{number} may depend on both at {output}"
                    )
                seen[color] = element


def allows(pattern: Pattern, output: tuple[int, ...], element: tuple[int, ...]) -> bool:
    """Whether a pattern lets one place of the output depend on one element of the value."""
    return all(
        matrix[output[axis]] >> index & 1
        for index, link in zip(element, pattern.links, strict=True)
        for axis, matrix in link.items()
    )


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return product(*(range(size) for size in shape))


def _check_coverage(
    graph: Graph,
    activations: Activations,
    node: Node,
    coloring: Coloring,
    step: float,
    elements: int | None,
    where: str,
) -> None:
    """Move single elements, and look which outputs change in any sample."""
    value, batch = graph.values[node.value], activations.batch
    rows = value.rows(activations.tensor(node.value), batch)
    count = rows.shape[1]
    stride = 1 if elements is None else max(1, count // elements)
    for flat in range(0, count, stride):
        above, below = (_run_moved(graph, activations, node, rows, flat, h) for h in (step, -step))
        element = _unravel(flat, coloring.shape)
        for number, (a, b) in enumerate(zip(above, below, strict=True)):
            pattern = coloring.patterns[number]
            for place in ((a != b) | (a.isnan() != b.isnan())).any(0).nonzero().flatten().tolist():
                output = _unravel(place, pattern.output)
                if not allows(pattern, output, element):
                    raise ColoringError(
                        f"{where}: moving element {element} changes output {number} at {output}, which its pattern "
                        "rules out; a module on the way does not do what its type says. Declare it a black box "
                        "(hzo.blackbox) or plan with assume='nothing'"
                    )


def _run_moved(
    graph: Graph, activations: Activations, node: Node, rows: Tensor, element: int, by: float
) -> list[Tensor]:
    moved = rows.clone()
    moved[:, element] += by
    perturbed = {node.value: graph.values[node.value].rows_to_copies(moved, activations.batch)}
    with counting.as_checks():
        results = run_slice(graph, node.operations, activations, perturbed, node.outputs, 1)
    return [graph.values[v].copies_to_rows(t, activations.batch) for v, t in zip(node.outputs, results, strict=True)]


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, at = divmod(flat, size)
        index.append(at)
    return tuple(reversed(index))

"""Noise, measured: how far identical queries lie apart, and how much of that every stage adds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hzo.execution import Activations, run_slice
from hzo.noise import Noise
from hzo.tracing import Graph

_COPIES = 16  # identical queries of a stage
_LONG, _LONG_COPIES = 8, 64  # long segments, in which the noise of many stages adds up, and queries of each


def of_stages(graph: Graph, activations: Activations) -> tuple[float, ...] | None:
    """Standard deviation of what a query of each stage alone returns; None where everything repeats.

    Cost: 16 queries of every stage a sample.
    """
    if graph.noise is None and all(op.deterministic for op in graph.operations):
        return None
    found = []
    for k in range(len(graph.stages)):
        scattered = _scatter(graph, activations, k, k, _COPIES)
        elements = sum(t[0].numel() for t in scattered.values())
        found.append(float(sum(t.var(0).sum() for t in scattered.values()) / max(elements, 1)) ** 0.5)
    return tuple(found) if any(found) else None


def split_noise(
    graph: Graph, activations: Activations, total: tuple[float, ...], cotangents: Mapping[int, Mapping[int, Tensor]]
) -> Noise:
    """Which part of the noise each stage adds (process), and which comes with reading a result (readout).

    Along a segment from the input to boundary j, what is read varies along the cotangent there by ρ_j + Σ π_s; along
    the last stage alone by ρ_j + π_j. The share of π in the noise of a stage is taken to be the same for all.
    Cost: 64 queries of 8 long segments a sample.
    """
    stops = [stage.stop for stage in graph.stages]
    squares = [
        std**2 * sum(float(g.double().square().sum()) for g in cotangents.get(stop, {}).values())
        for std, stop in zip(total, stops, strict=True)
    ]
    last = len(stops) - 1
    ends = sorted({max(1, round(last * k / _LONG)) for k in range(1, _LONG + 1)} & set(range(1, last + 1)))
    added = possible = uncertain = 0.0
    relative = 2 / ((_LONG_COPIES - 1) * activations.batch)  # squared error of a variance from so many numbers
    for end in ends:
        at = cotangents.get(stops[end], {})
        along = [_variance_along(_scatter(graph, activations, first, end, _LONG_COPIES), at) for first in (0, end)]
        added += along[0] - along[1]
        uncertain += relative * (along[0] ** 2 + along[1] ** 2)
        possible += sum(squares[:end])
    share = min(1.0, max(0.0, added / possible)) if possible > 0 else 0.0
    # What so few queries might show by chance is no process noise; and of readout noise, without which a short segment
    # would seem to have none at all, as much is left as may have gone unseen.
    unsure = 2 * uncertain**0.5 / possible if possible > 0 else 0.0
    share = min(share, max(0.0, 1 - unsure)) if share > unsure else 0.0
    return Noise(
        readout=tuple(std * (1 - share) ** 0.5 for std in total), process=tuple(std * share**0.5 for std in total)
    )


def _scatter(graph: Graph, activations: Activations, first: int, last: int, copies: int) -> dict[int, Tensor]:
    """By value, (copies, B, m): what identical queries of the stages first..last return of the boundary behind them."""
    start, stop = graph.stages[first].start, graph.stages[last].stop
    operations = [op.index for op in graph.operations[start:stop] if op.batched]
    written = {v for k in operations for v in graph.operations[k].writes}
    outputs = [v for v in graph.live[stop] if v in written and graph.values[v].floating]
    if not operations or not outputs:
        return {}
    results = run_slice(graph, operations, activations, {}, outputs, copies)
    found = {}
    for v, tensor in zip(outputs, results, strict=True):
        rows = graph.values[v].copies_to_rows(tensor, activations.batch)
        found[v] = rows.view(copies, activations.batch, -1).double()
    return found


def _variance_along(scattered: Mapping[int, Tensor], cotangents: Mapping[int, Tensor]) -> float:
    """Summed over samples, the variance of what a query returns along the cotangent."""
    products = [
        (t * cotangents[v].reshape(t.shape[1:]).double()).sum(-1) for v, t in scattered.items() if v in cotangents
    ]
    return float(torch.stack(products).sum(0).var(0).sum()) if products else 0.0

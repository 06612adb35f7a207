"""What an adjoint of a declared module is: how it carries a cotangent back, from what it promises.

No adjoint reads a weight. What it must know of the Jacobian it measures: it runs the module on small inputs of its own
(probes), which are queries and counted as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hzo.execution import Activations, arguments_of, counting, run_probe
from hzo.tape.record import flat
from hzo.tracing import Graph, GraphOperation

Shape = tuple[int, ...]


@dataclass(frozen=True)
class DeclaredCall:
    """One operation in the base pass, the cotangent of its output, and the means to measure it.

    Attributes:
        operand: the activation that goes in. cotangent: of the only output, in the accumulation dtype.
        measure: ``measure(probe)`` runs the module on another input, and counts it.
        copied: ``copied(numbers)`` the same, uncounted: for reindexing alone.
    """

    graph: Graph
    op: GraphOperation
    operand: Tensor
    cotangent: Tensor
    measure: Callable[[Tensor], Tensor]
    copied: Callable[[Tensor], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype."""
        return self.cotangent.dtype


@dataclass(frozen=True)
class Adjoint:
    """A way to carry a cotangent back through one declared module.

    Attributes:
        promise: what it takes for granted, in the words of the documentation.
        apply: the cotangent of the operand.
        accepts: whether it covers this operation, for this operand; decided from shapes and options alone.
        probes: shapes of the inputs that ``apply`` measures with, in order.
    """

    promise: str
    apply: Callable[[DeclaredCall, int], Tensor]
    accepts: Callable[[Graph, GraphOperation, int], bool] = lambda _graph, _op, _value: True
    probes: Callable[[Graph, GraphOperation, int], list[Shape]] = lambda _graph, _op, _value: []


def call_of(
    graph: Graph, op: GraphOperation, activations: Activations, value: int, cotangents: Mapping[int, Tensor]
) -> DeclaredCall:
    """A declared module as it ran, its cotangent, and the means to measure it."""
    (cotangent,) = cotangents.values()
    call = activations.operation(op.index)
    args, kwargs = arguments_of(activations, call)

    def run(probe: Tensor) -> Tensor:
        result: Tensor = flat(run_probe(graph, activations, op, call, (args[0], (probe,), *args[2:]), kwargs))[0]
        return result

    def measure(probe: Tensor) -> Tensor:
        rows = probe.shape[0]
        counting.add(
            queries=rows,
            stage_evaluations=rows,
            forward_equivalents=graph.cost_alone(op.index, value, probe.numel()) / activations.batch,
            boxes=graph.boxes_in([op.index]),
        )
        return run(probe)

    return DeclaredCall(graph, op, activations.tensor(value), cotangent, measure, run)


def is_only_input(op: GraphOperation, value: int) -> bool:
    """Whether a module was called with this one tensor and no other."""
    return op.module is not None and len(op.args[1]) == 1 and op.args[1][0].value == value


def impulse_size(dtype: torch.dtype) -> float:
    """An affine map takes any step: a large one keeps what an offset rounds away small beside the response."""
    return 1.0 if dtype.itemsize >= 4 else 16.0

"""What an adjoint rule is: how one operation carries a cotangent back, from what it promises and what was observed.

No rule reads a weight. What a rule must know of the Jacobian it takes from activities of the base pass, or measures:
it runs the operation on small inputs of its own (probes), which are queries and counted as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hzo.tracing import Graph, Operation, Ref, leaves, map_arguments

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One operation in the base pass, the cotangent of its output, and the means to measure it.

    Attributes:
        args, kwargs: as in the base pass. outputs: what it returned.
        cotangents: of the outputs by value, in the accumulation dtype.
        measure: ``measure(value, probe)`` runs the operation with the activity ``value`` replaced by a probe.
    """

    graph: Graph
    op: Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    cotangents: Mapping[int, Tensor]
    measure: Callable[[int, Tensor], Tensor]

    @property
    def cotangent(self) -> Tensor:
        """Of the only output."""
        (only,) = self.cotangents.values()
        return only

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype."""
        return next(iter(self.cotangents.values())).dtype

    def activity(self, value: int) -> Tensor:
        """The base activity of an operand, in its own dtype."""
        pairs = zip(leaves((self.op.args, self.op.kwargs)), leaves((self.args, self.kwargs)), strict=True)
        found: Tensor = next(actual for template, actual in pairs if template == Ref(value))
        return found

    def again(self, value: int, instead: Tensor) -> Any:
        """What the same function says of another tensor in the place of an operand: for reindexing alone."""
        templates = leaves((self.op.args, self.op.kwargs))
        args, kwargs = map_arguments(
            lambda leaf: instead if next(templates) == Ref(value) else leaf, (self.args, self.kwargs)
        )
        return self.op.target(*args, **kwargs)


@dataclass(frozen=True)
class Adjoint:
    """A rule for one operation.

    Attributes:
        promise: what the rule takes for granted, in the words of the documentation.
        accepts: whether the rule covers this call, for this operand; decided from shapes and options alone.
        apply: the cotangent of the operand.
        with_parameters: the same, and the gradients of the module's own parameters, where one kernel gives both; they
            are the closed parameter rules' and assume what these do.
        reads: which activities ``apply`` reads; of others it sees only shape and dtype, their elements are NaN.
        probes: shapes of the inputs that ``apply`` measures with, in order.
    """

    promise: str
    apply: Callable[[Call, int], Tensor]
    accepts: Callable[[Graph, Operation, int], bool] = lambda graph, op, value: True
    probes: Callable[[Graph, Operation, int], list[Shape]] = lambda graph, op, value: []
    with_parameters: Callable[[Call, int], tuple[Tensor, dict[str, Tensor]]] | None = None
    reads: Literal["all", "inputs", "output", "shapes"] = "all"


def slots_of(op: Operation, value: int) -> list[int | str]:
    """Top-level positions and keywords of the call that hold the value."""
    places: list[tuple[int | str, Any]] = [*enumerate(op.args), *op.kwargs.items()]
    return [slot for slot, leaf in places if isinstance(leaf, Ref) and leaf.value == value]


def is_first_operand(graph: Graph, op: Operation, value: int) -> bool:
    """Whether the value is the call's first argument, or its ``input``, and nothing else."""
    return slots_of(op, value) in ([0], ["input"])


# torch takes NumPy's names as well.
_ALIASES = {"dim": "axis", "keepdim": "keepdims"}


def argument(op: Operation, position: int, name: str, default: Any = None) -> Any:
    """An option of a call, however it was given; the template, not the tensor."""
    return given(op.args, op.kwargs, position, name, default)


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any = None) -> Any:
    """The same of actual arguments."""
    for key in (name, _ALIASES.get(name, name)):
        if key in kwargs:
            return kwargs[key]
    return args[position] if len(args) > position else default


def only_options(op: Operation, *names: str) -> bool:
    """Whether a call has no keywords but these, under either name."""
    return set(op.kwargs) <= {*names, *(_ALIASES[name] for name in names if name in _ALIASES)}

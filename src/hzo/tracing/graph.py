"""What a model does, recorded: operations in order, the values between them, and the stages that group them.

``trace`` (recorder/tracer.py) makes a ``Graph`` by running a model; nothing here runs one. Positions count operations:
position ``p`` lies before operation ``p``, and the boundary there is the set of values that are alive: made before
``p`` and read at or after it. Stages are contiguous groups of operations. A value is *batched* when it has a
dimension that grows with the batch; values without one are constants or derived from parameters alone, and play the
role of parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hzo.noise import NoiseSource
from hzo.tracing.arguments import Attribute, Ref, leaves, map_arguments


@dataclass(frozen=True)
class Value:
    """A tensor of the graph, as seen when the model was traced.

    ``batch_dim`` is the dimension that grows with the batch (its size is a multiple of the batch size), or None.
    """

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_dim: int | None
    producer: int  # operation that writes it; -1 for an input of the model
    batch: int  # batch size of the trace
    finite: bool = True  # a mask of minus infinities is not, and cannot be perturbed

    @property
    def batched(self) -> bool:
        return self.batch_dim is not None

    @property
    def floating(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def per_sample(self) -> int:
        """Elements that belong to one sample."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel // self.batch if self.batched else numel

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape with the batch size divided out."""
        return tuple(size // self.batch if d == self.batch_dim else size for d, size in enumerate(self.shape))

    def without_memory(self) -> Tensor:
        """A tensor of this shape and dtype, for decisions that need no more."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def rows(self, tensor: Tensor, batch: int) -> Tensor:
        """``tensor`` as a matrix with one row per sample."""
        if self.batch_dim is None:
            raise AssertionError("a value without a batch dimension has no rows")
        return (tensor.movedim(self.batch_dim, 0) if self.batch_dim else tensor).reshape(batch, -1)

    def from_rows(self, rows: Tensor, batch: int) -> Tensor:
        """The inverse of ``rows``."""
        d = self.batch_dim or 0
        moved = rows.reshape(self.shape[d] // self.batch * batch, *self.shape[:d], *self.shape[d + 1 :])
        return moved.movedim(0, d) if d else moved


@dataclass(frozen=True)
class ParameterUse:
    """An operand to differentiate by, shared by all samples: a trainable parameter, or a value derived from such.

    ``slot`` is the module's name for it, or the position or keyword of a function's operand; None where it is nested
    deeper or occurs twice, so that no closed rule applies.
    """

    slot: int | str | None
    name: str
    where: Attribute | Ref


@dataclass(frozen=True)
class Operation:
    """One call of a module or function, with what was learned about it by running it.

    Attributes:
        target: the module or function; ``args`` and ``kwargs`` hold ``Ref``, ``Attribute`` and ``Extent`` leaves.
        reads: values among the arguments; writes: values it makes, arguments changed in place included.
        mutates: positions (among all leaves of args, kwargs) of tensors that the call changes in place.
        random: draws from the random state. stateful: the buffers that the call changes.
        deterministic: gave the same result twice. coupled: samples of a batch influence each other.
        cost: operations per sample (multiply and add of matrix products and convolutions, one per element else).
    """

    index: int
    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    parameters: tuple[ParameterUse, ...]
    batched: bool
    mutates: tuple[int, ...] = ()
    random: bool = False
    stateful: tuple[Attribute, ...] = ()
    deterministic: bool = True
    coupled: bool = False
    cost: int = 0

    @property
    def module(self) -> nn.Module | None:
        return self.target if isinstance(self.target, nn.Module) else None

    @property
    def described(self) -> tuple[Any, ...]:
        """What tells this operation from another, without weights and addresses: kind, links and what was learned."""
        module = self.module
        kind = getattr(self.target, "__qualname__", "") if module is None else type(module).__qualname__
        options = "" if module is None else module.extra_repr()
        constants = [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, (bool, int, float, str))]
        uses = [(use.name, use.slot) for use in self.parameters]
        promises = getattr(module, "hzo_promises", None)
        learned = (self.random, self.deterministic, self.coupled, self.mutates)
        return (self.name, kind, options, constants, self.reads, self.writes, uses, repr(promises), learned)


@dataclass(frozen=True)
class Stage:
    """A contiguous group of operations ``[start, stop)`` under one name."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced model: operations in the order in which they ran, and everything that links them."""

    operations: tuple[Operation, ...]
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    output: Any  # the model's output with values in place of tensors
    stages: tuple[Stage, ...]
    batch: int  # of the samples that the trace ran, to which all shapes refer
    nominal_batch: int  # of the input that was handed over, to which predicted totals refer
    signature: tuple[Any, ...]  # what must not change for the trace to stay valid
    noise: NoiseSource | None = None  # added to what runs, for experiments
    differentiated: tuple[int, ...] = ()  # inputs that require a gradient, as trainable parameters do

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(leaf.value for leaf in leaves(self.output) if isinstance(leaf, Ref)))

    @cached_property
    def cost(self) -> int:
        """Operations of one forward pass of one sample."""
        return max(1, sum(op.cost for op in self.operations if op.batched))

    @cached_property
    def stage_of(self) -> tuple[int, ...]:
        """The stage of every operation."""
        return tuple(k for k, stage in enumerate(self.stages) for _ in range(stage.start, stage.stop))

    @cached_property
    def last_read(self) -> tuple[int, ...]:
        """For every value the position up to which it is alive: its last reader, or the end for an output."""
        last = [value.producer for value in self.values]
        for op in self.operations:
            for value in op.reads:
                last[value] = op.index
        for value in self.outputs:
            last[value] = len(self.operations)
        return tuple(last)

    @cached_property
    def live(self) -> tuple[tuple[int, ...], ...]:
        """For every position the batched values that are alive there."""
        alive: list[list[int]] = [[] for _ in range(len(self.operations) + 1)]
        for value in self.values:
            if value.batched:
                for position in range(value.producer + 1, self.last_read[value.index] + 1):
                    alive[position].append(value.index)
        return tuple(tuple(values) for values in alive)

    @cached_property
    def requires(self) -> tuple[bool, ...]:
        """For every value whether something trainable lies upstream, so that its cotangent can be of use."""
        needed = [value.index in self.differentiated for value in self.values]
        for op in self.operations:
            upstream = bool(op.parameters) or any(needed[value] for value in op.reads)
            for value in op.writes:
                needed[value] = upstream and self.values[value].floating
        return tuple(needed)

    def slice(self, value: int, start: int, stop: int, outputs: Sequence[int]) -> tuple[int, ...]:
        """The operations in [start, stop) through which ``value`` influences ``outputs``: what a query must run."""
        reached = {value}
        forward = []
        for op in self.operations[start:stop]:
            if op.batched and any(v in reached for v in op.reads):
                forward.append(op)
                reached.update(op.writes)
        wanted = set(outputs)
        kept = []
        for op in reversed(forward):
            if any(v in wanted for v in op.writes):
                kept.append(op.index)
                wanted.update(op.reads)
        return tuple(reversed(kept))

    def reached(self, value: int, operations: Sequence[int], outputs: Sequence[int]) -> tuple[int, ...]:
        """Those of ``outputs`` that the operations of a slice write."""
        written = {v for k in operations for v in self.operations[k].writes}
        return tuple(v for v in outputs if v in written and v != value)

    def stages_in(self, operations: Sequence[int]) -> int:
        """Stage evaluations that one sample costs when these operations run; a part of a stage counts as one."""
        return len({self.stage_of[k] for k in operations})

    def boxes_in(self, operations: Sequence[int]) -> tuple[str, ...]:
        """The names of the black boxes among these operations."""
        names = (getattr(self.operations[k].module, "hzo_box", None) for k in operations)
        return tuple(name for name in names if name is not None)

    def cost_of(self, operations: Sequence[int]) -> int:
        """Operations that one sample costs when these run."""
        return sum(self.operations[k].cost for k in operations)

    def arguments_without_memory(self, op: Operation) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with tensors that take no memory in place of values."""

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return self.values[leaf.value].without_memory()
            return leaf.get() if isinstance(leaf, Attribute) else leaf

        args, kwargs = map_arguments(fill, (op.args, op.kwargs))
        return args, kwargs

    def cost_alone(self, operation: int, value: int, elements: int) -> Fraction:
        """Forward passes of one sample that an operation costs when its operand ``value`` has so many elements."""
        whole = max(1, self.values[value].per_sample)
        return Fraction(self.operations[operation].cost * elements, whole * self.cost)

    def describe(self, position: int) -> str:
        """Where a position lies, in words for messages and tables."""
        for k, stage in enumerate(self.stages):
            if position == stage.start:
                return f"boundary {k}"
            if stage.start < position < stage.stop:
                return f"inside stage {k} ({stage.name}), before {self.operations[position].name}"
        return f"boundary {len(self.stages)}"

    @cached_property
    def fingerprint(self) -> str:
        """A digest of operations, shapes and dtypes: equal for equal chains, whatever their weights or batch size."""
        text = repr(
            (
                [op.described for op in self.operations],
                [(value.sample_shape, str(value.dtype), value.batch_dim) for value in self.values],
                self.stages,
                *([self.differentiated] if self.differentiated else []),
            )
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def handed_on(self) -> tuple[bool, ...]:
        """For every value whether it outlives the stage that makes it: what that stage's process noise is added to."""
        return tuple(
            value.producer >= 0
            and self.last_read[value.index] >= self.stages[self.stage_of[value.producer]].stop
            and value.batched
            for value in self.values
        )

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Positions of the stage boundaries 0..L."""
        return (0, *(stage.stop for stage in self.stages))

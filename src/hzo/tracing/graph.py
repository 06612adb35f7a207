"""What a model does, as a graph: the operations of its tape in order, the values between them, and the stages.

``trace`` (tracing/recorder) makes a ``Graph`` by recording a model; nothing here runs one. Operations and values have
the numbers of the tape. Positions count operations: position ``p`` lies before operation ``p``, and the boundary there
is the set of values that are alive: made before ``p`` and read at or after it. Stages are contiguous groups of
operations. A value is *batched* when it depends on the model's inputs; all others are parameters, what is derived from
parameters alone, and constants.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hzo.noise import NoiseSource
from hzo.tape import Ref
from hzo.tape.marks import marks_of
from hzo.tape.opaque import Opaque
from hzo.tracing.arguments import leaves, output_leaves
from hzo.tracing.promises import declared

_STRAIGHT_THROUGH = ("aten.fake_quantize_", "aten._fake_quantize_")


@dataclass(frozen=True)
class GraphValue:
    """A tensor of the graph, as seen when the model was traced.

    Attributes:
        batched: whether it depends on the model's inputs.
        batch_dim: the dimension that holds the samples (its size is a multiple of the batch size); None where samples
            are mixed in it. outer: how often it runs through all samples: 1 where one stands behind the other.
        producer: operation that writes it; -1 for what was there before. batch: batch size of the trace.
        finite: a mask of minus infinities is not, and cannot be perturbed.
    """

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool
    batch_dim: int | None
    producer: int
    batch: int
    finite: bool = True
    outer: int = 1

    @property
    def floating(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def numel(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel

    @property
    def per_sample(self) -> int:
        """Elements that belong to one sample; of a value in which samples are mixed, its share."""
        return -(-self.numel // self.batch) if self.batched else self.numel

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape with the batch size divided out."""
        return tuple(size // self.batch if d == self.batch_dim else size for d, size in enumerate(self.shape))

    @property
    def row_order(self) -> tuple[int, ...]:
        """The dimensions as they stand in a row: what is left of the batch dimension comes first."""
        first = self.batch_dim or 0
        return (first, *(d for d in range(len(self.shape)) if d != first))

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a sample, its dimensions as they stand in a row."""
        return tuple(self.sample_shape[d] for d in self.row_order)

    def rows(self, tensor: Tensor, batch: int) -> Tensor:
        """``tensor`` as a matrix with one row per sample."""
        return self.copies_to_rows(tensor.unsqueeze(0), batch)

    def from_rows(self, rows: Tensor, batch: int) -> Tensor:
        """The inverse of ``rows``."""
        return self.rows_to_copies(rows, batch).squeeze(0)

    def copies_to_rows(self, tensor: Tensor, batch: int) -> Tensor:
        """Copies of the value along a new first dimension as rows, the samples of the first copy first."""
        if self.batch_dim is None:
            raise AssertionError("a value in which samples are mixed has no rows")
        d = self.batch_dim + 1
        if self.outer > 1:
            tensor = split_samples(tensor, d, self.outer, batch).movedim(d + 1, 1)
            tensor = tensor.movedim((d + 1, d + 2), (2, 3))
            return tensor.reshape(len(tensor) * batch, tensor[0].numel() // batch)
        moved = tensor.movedim(d, 1) if self.batch_dim else tensor
        return moved.reshape(len(moved) * batch, moved[0].numel() // batch)

    def rows_to_copies(self, rows: Tensor, batch: int) -> Tensor:
        """The inverse of ``copies_to_rows``: (copies, *shape) from (copies × batch, n)."""
        d = self.batch_dim or 0
        size = self.shape[d] // self.batch
        copies, before, after = rows.shape[0] // batch, self.shape[:d], self.shape[d + 1 :]
        if self.outer > 1:
            split = rows.reshape(copies, batch, self.outer, size // self.outer, *before, *after)
            return split.movedim((2, 1, 3), (d + 1, d + 2, d + 3)).flatten(d + 1, d + 3)
        moved = rows.reshape(copies, size * batch, *before, *after)
        return moved.movedim(1, d + 1) if d else moved

    def sample(self, tensor: Tensor, number: int, batch: int) -> Tensor:
        """One sample, of ``sample_shape``."""
        d = self.batch_dim or 0
        return split_samples(tensor, d, self.outer, batch).select(d + 1, number).flatten(d, d + 1)

    def joined(self, samples: Tensor) -> Tensor:
        """The value that holds these samples, (batch, *sample_shape)."""
        d = self.batch_dim or 0
        shape = samples.shape
        split = samples.reshape(*shape[: d + 1], self.outer, shape[d + 1] // self.outer, *shape[d + 2 :])
        return split.movedim(0, d + 1).flatten(d, d + 2)


def split_samples(tensor: Tensor, dim: int, outer: int, batch: int) -> Tensor:
    """A dimension as three: how often it runs through the samples, the samples, and what belongs to each."""
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], outer, batch, shape[dim] // (outer * batch), *shape[dim + 1 :])


@dataclass(frozen=True)
class ParameterUse:
    """An operand to differentiate by, shared by all samples: a trainable parameter, or a value derived from such.

    ``name`` is the parameter's; empty for a derived value.
    """

    value: int
    name: str


@dataclass(frozen=True)
class Measured:
    """How large the small test inputs (probes) are by which a layer's weight is measured for one of its operands.

    Attributes:
        rows, elements: of the probes whose size does not depend on the batch.
        per_sample: rows and elements, for each sample, of those whose size does.
    """

    fixed: tuple[tuple[int, int], ...] = ()
    per_sample: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class GraphOperation:
    """One call of the tape, with what was learned about it by running it.

    Attributes:
        target, args, kwargs: as on the tape of the trace. results: the values it makes, None for what is no tensor.
        reads, writes: values among the arguments and among the results.
        batched: whether it depends on the model's inputs.
        rule: how it is carried back: "rule", "slope", "decomposition", "custom Function", "queries" or, of an opaque
            operation, the promise that was declared ("" where there is none).
        measured: by operand, what its rule measures.
        random: draws from the random state whenever it runs. stateful: moves buffers. Both only of opaque operations
            and of kernels that draw inside.
        deterministic: gave the same result twice. coupled: samples of a batch influence each other.
        cost: operations per sample (multiply and add of matrix products and convolutions, one per element else).
    """

    index: int
    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int | None, ...]
    reads: tuple[int, ...]
    parameters: tuple[ParameterUse, ...]
    batched: bool
    rule: str = "rule"
    measured: dict[int, Measured] | None = None
    random: bool = False
    stateful: bool = False
    deterministic: bool = True
    coupled: bool = False
    cost: int = 0

    @cached_property
    def writes(self) -> tuple[int, ...]:
        return tuple(v for v in self.results if v is not None)

    @property
    def module(self) -> nn.Module | None:
        """The module that an opaque operation runs."""
        target = self.target
        return target.function if isinstance(target, Opaque) and isinstance(target.function, nn.Module) else None

    @property
    def pointwise(self) -> bool:
        """Whether PyTorch says that a result's element depends on the operands' elements of the same place alone."""
        return torch.Tag.pointwise in getattr(self.target, "tags", ())

    @property
    def own_backward(self) -> bool:
        """Whether it is a custom autograd Function, whose backward need not be the derivative of its forward, or one of
        PyTorch's own that is known to differ: fake quantization is a staircase, and passes gradients straight through.
        """
        return self.rule == "custom Function" or str(self.target).startswith(_STRAIGHT_THROUGH)

    @property
    def described(self) -> tuple[Any, ...]:
        """What tells this operation from another, without weights, addresses and sizes."""
        module = self.module
        options = "" if module is None else module.extra_repr()
        constants = [leaf for leaf in leaves((self.args, self.kwargs)) if type(leaf) in (bool, str)]
        uses = [(use.name, use.value) for use in self.parameters]
        promises = declared(module)
        learned = (self.random, self.deterministic, self.coupled)
        return (self.name, str(self.target), options, constants, self.reads, self.writes, uses, repr(promises), learned)


@dataclass(frozen=True)
class Stage:
    """A contiguous group of operations ``[start, stop)`` under one name."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced model: operations in the order in which they ran, and everything that links them."""

    operations: tuple[GraphOperation, ...]
    values: tuple[GraphValue, ...]
    inputs: tuple[int, ...]
    output: Any  # the model's output with references to values in place of tensors
    stages: tuple[Stage, ...]
    batch: int  # of the samples that the trace ran, to which all shapes refer
    nominal_batch: int  # of the input that was handed over, to which predicted totals refer
    signature: tuple[Any, ...]  # what must not change for the trace to stay valid
    names: dict[int, str]  # of the trainable leaves, by value
    trainable: dict[str, Tensor]  # these leaves, by name
    constants: dict[int, Tensor]  # contents of leaves that are neither parameters nor inputs
    opaque_stages: frozenset[int] = frozenset()  # by identity, callables that ran out of the recorder's sight
    noise: NoiseSource | None = None  # added to what runs, for experiments
    differentiated: tuple[int, ...] = ()  # inputs that require a gradient, as trainable parameters do

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(leaf.value for leaf in output_leaves(self.output) if isinstance(leaf, Ref)))

    def passable(self, position: int) -> bool:
        """Whether a position differs from the one before it; behind an operation on parameters alone it does not."""
        return position == 0 or self.operations[position - 1].batched

    @cached_property
    def cost(self) -> int:
        """Operations of one forward pass of one sample."""
        return max(1, sum(op.cost for op in self.operations if op.batched))

    @cached_property
    def stage_of(self) -> tuple[int, ...]:
        """The stage of every operation."""
        return tuple(k for k, stage in enumerate(self.stages) for _ in range(stage.start, stage.stop))

    def stage_before(self, position: int) -> int:
        """The stage of the operation before a position; the first for the beginning."""
        return self.stage_of[max(position - 1, 0)] if self.operations else 0

    @cached_property
    def last_read(self) -> tuple[int, ...]:
        """For every value the position up to which it is alive: its last reader, or the end for an output. Branches
        that end nowhere are not counted."""
        wanted = set(self.outputs)
        last = [value.producer for value in self.values]
        for op in reversed(self.operations):
            if wanted.intersection(op.writes):
                wanted.update(op.reads)
                for value in op.reads:
                    last[value] = max(last[value], op.index)
        for value in self.outputs:
            last[value] = len(self.operations)
        return tuple(last)

    @cached_property
    def live(self) -> tuple[tuple[int, ...], ...]:
        """For every position the batched values that are alive there; a constant leaf is alive nowhere."""
        alive: list[list[int]] = [[] for _ in range(len(self.operations) + 1)]
        for value in self.values:
            if value.batched and (value.producer >= 0 or value.index in self.inputs):
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

    def operations_between(self, value: int, start: int, stop: int, outputs: Sequence[int]) -> tuple[int, ...]:
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
        marks = (marks_of(self.operations[k].module) for k in operations)
        return tuple(m.box for m in marks if m is not None and m.box is not None)

    def pooled(self, operations: Sequence[int]) -> bool:
        """Whether workers run a black box among these operations: they take what is asked at once, and then idle."""
        marks = (marks_of(self.operations[k].module) for k in operations)
        return any(m is not None and m.pooled for m in marks)

    @cached_property
    def derived_from(self) -> dict[int, tuple[str, ...]]:
        """Of every value derived from parameters alone, such as a transposed weight, the names of these parameters."""
        found: dict[int, tuple[str, ...]] = {}
        for op in self.operations:
            if not op.batched and op.parameters:
                names = tuple(dict.fromkeys(name for use in op.parameters for name in self._names(use, found)))
                found.update(dict.fromkeys(op.writes, names))
        return found

    def names_of(self, use: ParameterUse) -> tuple[str, ...]:
        """The names of the parameters that a use stands for: its own, or of what it is derived from."""
        return self._names(use, self.derived_from)

    @staticmethod
    def _names(use: ParameterUse, derived: dict[int, tuple[str, ...]]) -> tuple[str, ...]:
        return (use.name,) if use.name else derived.get(use.value, ())

    @cached_property
    def opaque_modules(self) -> tuple[nn.Module, ...]:
        """The modules that run as one operation: all that queries may move."""
        found = (op.module for op in self.operations)
        return tuple(dict.fromkeys(module for module in found if module is not None))

    def cost_of(self, operations: Sequence[int]) -> int:
        """Operations that one sample costs when these run."""
        return sum(self.operations[k].cost for k in operations)

    def cost_alone(self, operation: int, value: int, elements: int) -> Fraction:
        """Forward passes of one sample that an operation costs when its operand ``value`` has so many elements."""
        whole = max(1, self.values[value].per_sample)
        return Fraction(self.operations[operation].cost * elements, whole * self.cost)

    def describe(self, position: int) -> str:
        """Where a position lies, in words for messages and tables."""
        k = bisect_left(self._starts, position)  # the first of the stages that begin here: some may be empty
        if k < len(self.stages) and self.stages[k].start == position:
            return f"boundary {k}"
        stage = self.stages[k - 1]
        if position < stage.stop:
            return f"inside stage {k - 1} ({stage.name}), before {self.operations[position].name}"
        return f"boundary {len(self.stages)}"

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(stage.start for stage in self.stages)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of operations, shapes and dtypes: equal for equal chains, whatever their weights or batch size."""
        text = repr(
            (
                [op.described for op in self.operations],
                [
                    (value.sample_shape, str(value.dtype), value.batch_dim, value.outer)
                    for value in self.values
                    if value.batched
                ],
                self.stages,
                *([self.differentiated] if self.differentiated else []),
            )
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def calls(self) -> tuple[str, ...]:
        """Every call in words: what it makes of which values, for one sample, and the parameters that it reads."""
        return tuple(self._call(op) for op in self.operations)

    def _call(self, op: GraphOperation) -> str:
        made = ", ".join(self._value(v) for v in op.writes)
        read = ", ".join(f"%{v}" for v in op.reads if self.values[v].batched)
        names = ", ".join(use.name for use in op.parameters if use.name)
        return (
            f"{op.target} of {read or 'no sample'}{' and ' + names if names else ''}, which makes {made or 'nothing'}"
        )

    def _value(self, value: int) -> str:
        about = self.values[value]
        shape = "×".join(map(str, about.sample_shape)) or "a number"
        return f"%{value} ({shape}, {str(about.dtype).removeprefix('torch.')})"

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

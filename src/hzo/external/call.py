"""One call of a single part: what was given, what came out, and the same again at other inputs.

A call's *leaves* are tensors: those among its arguments, then trainable parameters of the part, then numbers of its
state that an earlier call left. Leaves with the batch in dimension 0 have a row for each sample; others are shared by
all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hzo.errors import (
    CoupledSamplesError,
    FailedSamplesWarning,
    InputError,
    NondeterministicError,
    NonFiniteError,
    QueryError,
    TraceError,
)
from hzo.execution import contained, counting, full_float32, with_parameters
from hzo.external.guard import Guarded, divided, rows_of
from hzo.external.randomness import Randomness, randomness
from hzo.external.signature import Structure, flatten
from hzo.external.state import Saved, StateKey, floating
from hzo.external.steps import Bounds, Steps
from hzo.finite_differences import Pattern, Scheme
from hzo.tape.history import grad_fn, requires_grad

OnFailure = Literal["pass", "raise", "zero"]


@dataclass(frozen=True)
class Settings:
    """How a box treats its part; the options of ``hzo.blackbox``.

    Attributes:
        links: for shapes of a sample, in and out, the dependence that was promised, as a ``Pattern`` wants it.
        inferred: promises are hzo's own, of what held at one input, and are tried in every backward pass.
    """

    steps: Steps
    bounds: Bounds
    elementwise: bool = False
    affine: bool = False
    symmetric: bool = False
    reindexing: bool = False
    links: Callable[[Sequence[int], Sequence[int]], tuple[Mapping[int, tuple[int, ...]], ...]] | None = None
    scheme: Scheme = "central"
    mu: float | None = None
    draws: int = 1
    memory: int | None = None
    integers: Literal["floating", "kept"] = "floating"
    on_failure: OnFailure = "pass"
    batch_dim: Any = "found"
    max_error: float | None = None
    check_promises: bool = True
    inferred: bool = False

    def pattern(self, value: Sequence[int], output: Sequence[int]) -> Pattern | None:
        """Which elements of an output may depend on which of a value, of one sample; None where nothing is promised."""
        if self.links is None:
            return None
        found = self.links((1, *value), (1, *output))
        return Pattern((1, *value), (1, *output), found) if any(found) else None


@dataclass(frozen=True)
class Layout:
    """Which leaves and outputs have the batch in dimension 0, and how many samples that is; 1 where none has."""

    batch: int
    leaves: tuple[bool, ...]
    outputs: tuple[bool, ...]

    @property
    def batched(self) -> bool:
        return any(self.leaves) and any(self.outputs)


@dataclass
class BoxCall:
    """One forward pass of a part, and what its backward pass needs of it."""

    guard: Guarded
    stages: nn.Module
    settings: Settings
    structure: Structure
    constants: list[Any]  # the leaves of the arguments; None in place of tensors
    positions: list[int]  # of the tensors among them
    names: list[str]  # for each leaf: argument, parameter, or state
    parameters: tuple[str, ...]
    state_keys: tuple[StateKey, ...] = ()
    known: dict[Any, Any] = field(default_factory=dict)  # layouts and steps that were found, shared by calls of a box
    watched: bool = True  # look for trainable tensors inside

    # What the forward pass leaves.
    layout: Layout = field(default_factory=lambda: Layout(1, (), ()))
    result: Structure | None = None
    result_constants: list[Any] = field(default_factory=list)
    result_positions: list[int] = field(default_factory=list)
    base: list[Tensor] = field(default_factory=list)  # (B, m): outputs as they came, then the state; real
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of these, whole
    complex: list[bool] = field(default_factory=list)
    made: list[torch.dtype] = field(default_factory=list)  # as they were handed out
    failed: Tensor | None = None  # (B,): samples that came out as NaN or infinity
    left: tuple[StateKey, ...] = ()  # the places of its state that it changed and a gradient may flow through
    moved_on: tuple[StateKey, ...] = ()  # all places that it changed
    stuck: bool = False  # it changed what no gradient can follow
    start: Saved | None = None
    end: Saved | None = None
    random: Randomness | None = None
    draws: bool = False  # it drew random numbers from a global generator
    seconds: float = 0.0
    autocast: tuple[str, torch.dtype | None] = ("cpu", None)
    training: dict[nn.Module, bool] = field(default_factory=dict)
    seed: int = 0
    consumed: bool = False  # a backward pass has been through it
    unlike: list[Tensor] | None = None  # by how much two equal calls differed, though not enough to be an error
    on_tape: bool = False
    replay: BoxCall | None = None  # the last run of it that is not its first
    slices: list[BoxCall] = field(default_factory=list)  # under vmap, the calls that stand for this one
    whole: BoxCall | None = None  # under several, the one into whose batch all slices went

    @property
    def count(self) -> int:
        return len(self.positions)

    @property
    def tensors_alone(self) -> bool:
        """Whether it was called with tensors by position and nothing else."""
        args, kwargs = self.structure.build(list(range(len(self.constants))))
        return not kwargs and len(args) == self.count and all(type(arg) is int for arg in args)

    def again(self) -> BoxCall:
        """A call of the same part with the same structure, which has not run yet."""
        return BoxCall(
            self.guard, self.stages, self.settings, self.structure, self.constants, self.positions, self.names,
            self.parameters, self.state_keys, self.known, self.watched,
        )  # fmt: skip

    def adopt(self, other: BoxCall) -> None:
        """Results are structured as those of another call."""
        self.result, self.result_constants = other.result, other.result_constants
        self.result_positions, self.moved_on, self.left, self.stuck = (
            other.result_positions, other.moved_on, other.left, other.stuck
        )  # fmt: skip
        self.layout = other.layout

    def part(self, start: int, stop: int) -> BoxCall:
        """The call that some samples of this one would have been."""
        made = replace(self, layout=replace(self.layout, batch=stop - start), slices=[])
        pairs = list(zip(self.base, self.layout.outputs, strict=True))
        made.base = [b[start:stop] if apart else b for b, apart in pairs]
        made.shapes = [
            (stop - start, *shape[1:]) if apart else shape
            for shape, apart in zip(self.shapes, self.layout.outputs, strict=True)
        ]
        made.failed = None if self.failed is None else self.failed[start:stop]
        return made

    # -- the forward pass ---

    @full_float32()
    def forward(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the part; tensors that it returns, then numbers of its state that it changed."""
        leaves = [t.detach() for t in leaves]
        device = leaves[0].device
        self.autocast = device.type, torch.get_autocast_dtype(device.type) if _autocast(device.type) else None
        self.training = {module: module.training for module in self.stages.modules()}
        batch, sample = self._candidates(leaves)
        key = self._key(leaves)
        layout = self.known.get(key)
        if layout is not None:
            batch, sample = layout.batch, layout.leaves
        self._check_bounds(leaves)
        self.random = randomness([device])
        began = perf_counter()
        with self._parameters(leaves):
            with self.guard.remembered():
                outputs, out = self._ask(leaves, batch, sample, watched=layout is None and self.watched)
            self.seconds = perf_counter() - began
            self._settle(leaves, batch, sample, outputs, out)
        self.start, self.end = self.guard.remembers.start, self.guard.remembers.end
        self.draws = self.guard.runs_here and randomness([device]) != self.random
        counting.add(base_evaluations=batch)
        state = self._state_left()
        if layout is None:
            if self.guard.pool is not None and self.guard.pool.elsewhere:
                self._check_keeps_nothing(leaves, batch, sample)
            layout = self._find_layout(leaves, [*outputs, *state], batch, sample)
            self.known[key] = layout
        else:
            flags = [t.dim() > 0 and t.shape[0] == batch for t in (*outputs, *state)]
            for t, was, now in zip(outputs, layout.outputs, flags, strict=False):
                if layout.batched and was and not now:
                    raise self._without_batch(t, batch)
            if len(flags) != len(layout.outputs):
                layout = replace(layout, outputs=tuple(f and layout.batched for f in flags))
        self.layout = layout
        self.result, self.result_constants, self.result_positions = out
        everything = [*outputs, *state]
        self.shapes = [tuple(t.shape) for t in everything]
        self.complex = [t.is_complex() for t in everything]
        self.base = [_real(t).reshape(layout.batch if apart else 1, -1)
                     for t, apart in zip(everything, layout.outputs, strict=True)]  # fmt: skip
        self.failed = self._failures(outputs)
        if self.settings.mu is not None:
            self.seed = int(torch.randint(2**62, (), device="cpu"))
        found = self._handed_out(leaves, outputs)
        self.made = [t.dtype for t in (*found, *state)]
        return (*found, *(t.clone() for t in state))

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Floating in the dtype of the input: NumPy code that computes in another one fits into the model."""
        if tensor.is_complex():
            return tensor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
        if tensor.is_floating_point() or self.settings.integers == "floating":
            return tensor.to(dtype)
        return tensor

    def _check_bounds(self, leaves: Sequence[Tensor]) -> None:
        """An error where an argument lies outside of what the part is said to be defined for."""
        if self.settings.bounds.given is None:
            return
        moving = [k for k in range(self.count) if leaves[k].is_floating_point()]
        names = [self.names[k].removeprefix("input ") for k in moving]
        # Bounds of elements are of a sample's shape, or of the whole where there is none.
        shapes = [tuple(leaves[k].shape) for k in moving]
        for k, (low, high) in zip(moving, self.settings.bounds.of(names, shapes), strict=True):
            leaf = leaves[k].double()
            for bound, outside in ((low, torch.lt), (high, torch.gt)):
                if bound is None:
                    continue
                # In the input's own dtype: a float32 that was clamped to 0.1 is larger than 0.1.
                edge = torch.as_tensor(bound, dtype=torch.float64, device=leaf.device).to(leaves[k].dtype).double()
                wrong = outside(leaf, edge)
                if bool(wrong.any()):
                    edges = " to ".join("no bound" if b is None else f"{b}" for b in (low, high))
                    raise InputError(
                        f"{self.names[k]} of {self.guard} holds {float(leaf[wrong][0]):.6g}, outside its bounds, "
                        f"{edges}; clamp it before the part, or widen bounds="
                    )

    def plain(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the part returns, without what a backward pass would need."""
        batch, sample = self._candidates(leaves)
        layout = self.known.get(self._key(leaves))
        if layout is not None:
            batch, sample = layout.batch, layout.leaves
        self.random = randomness([leaves[0].device])
        with self._parameters(leaves):
            with self.guard.remembered():
                outputs, out = self._ask(leaves, batch, sample)
            self._settle(leaves, batch, sample, outputs, out)
        flags = tuple(any(sample) and t.dim() > 0 and t.shape[0] == batch for t in outputs)
        self.layout = layout or (Layout(batch, tuple(sample), flags) if any(flags) else
                                 Layout(1, tuple(False for _ in leaves), flags))  # fmt: skip
        self.result, self.result_constants, self.result_positions = out
        self.failed = self._failures(outputs)
        return self._handed_out(leaves, outputs)

    def _handed_out(self, leaves: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        dtype, found = self.dtype_of(leaves), []
        for tensor, apart in zip(outputs, self.layout.outputs, strict=False):
            made = self._cast(tensor, dtype).clone()  # what becomes of it must not reach what is kept
            if self.failed is not None and self.settings.on_failure == "zero":
                if apart and self.layout.batched:
                    made[self.failed] = 0
                else:
                    made.zero_()
            found.append(made)
        return tuple(found)

    def dtype_of(self, leaves: Sequence[Tensor]) -> torch.dtype:
        for t in leaves[: self.count]:
            if t.is_complex():
                return t.dtype.to_real()
            if t.is_floating_point():
                return t.dtype
        return torch.get_default_dtype()

    def _candidates(self, leaves: Sequence[Tensor]) -> tuple[int, tuple[bool, ...]]:
        """The batch, and which leaves seem to have it: those as long as the first argument."""
        first = next((t for t in leaves[: self.count] if t.dim()), None)
        if first is None or self.settings.batch_dim is None:
            return 1, tuple(False for _ in leaves)
        size = first.shape[0]
        if size == 0:
            raise InputError(f"{self.guard} got a batch without samples")
        parameters = range(self.count, self.count + len(self.parameters))
        return size, tuple(t.dim() > 0 and t.shape[0] == size and k not in parameters for k, t in enumerate(leaves))

    def _key(self, leaves: Sequence[Tensor]) -> Any:
        shapes = tuple((tuple(t.shape), t.dtype) for t in leaves)
        modes = tuple(self.training.values())
        return str(self.structure.spec), shapes, modes, self.state_keys

    def _state_left(self) -> list[Tensor]:
        if self.start is None or self.end is None:
            return []
        state = self.guard.state
        certain, counters = self.guard.changed(self.start, self.end)
        self.moved_on = (*certain, *(counters if self.guard.remembers.counters else ()))
        if certain and self.guard.pool is not None:
            state.load(self.start)
            raise InputError(
                f"{self.guard} keeps a state ({state.names(certain)}), and in an executor its calls run in any order; "
                "give the state to it and have it returned: f(x, state) -> (y, state)"
            )
        numbers = state.numbers(self.end, certain)
        self.left = tuple(key for key, value in numbers.items() if floating(value))
        # Whole numbers that Python counts with carry no gradient, here as for autograd.
        self.stuck = (bool(certain) and not self.left) or len(self.left) < len(numbers)
        return [torch.as_tensor(numbers[key]).detach().clone() for key in self.left]

    def _check_keeps_nothing(self, leaves: Sequence[Tensor], rows: int, sample: Sequence[bool]) -> None:
        """A state that is kept in other processes is not seen here, but it shows when a worker answers twice."""
        size = self.guard.batched if type(self.guard.batched) is int else 1 if self.guard.batched is True else rows
        cut = [rows_of(t, 0, size) if flag else t for t, flag in zip(leaves, sample, strict=True)]
        counting.add(check_evaluations=2 * size)
        with counting.doing("the test that a worker remembers nothing"):
            results = self.guard.run_twice(*self.arguments(cut), size)
            one, two = (self._joined([(r, size)], size, leaves[0].device, False)[0] for r in results)
        if len(one) != len(two) or not all(_close(a, b, 1e-4) for a, b in zip(one, two, strict=True)):
            raise self._two_results()

    def _failures(self, outputs: Sequence[Tensor]) -> Tensor | None:
        """(B,): which samples came out as NaN or infinity; None where none did.

        Raises:
            NonFiniteError: all did, or one did and that is not to be passed on.
        """
        failed = None
        for tensor, apart in zip(outputs, self.layout.outputs, strict=False):
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            finite = tensor.isfinite()
            if bool(finite.all()):
                continue
            rows = (
                ~finite.reshape(tensor.shape[0], -1).all(1) if apart else torch.ones(1, dtype=torch.bool, device="cpu")
            )
            rows = rows.to(tensor.device)
            if self.layout.batched and not apart:
                continue  # a summary of the batch: not any one sample's affair
            failed = rows if failed is None else failed | rows
        if failed is None:
            return None
        mode = self.settings.on_failure
        if mode == "zero":
            _warn_of_failure(self.guard, failed, self.layout.batched)
            return failed
        nothing = not any(bool(t.isfinite().any()) for t in outputs if t.is_floating_point() or t.is_complex())
        if mode == "raise" or nothing:
            named = named_samples(failed) + ": it " if self.layout.batched and not bool(failed.all()) else ""
            raise NonFiniteError(
                f"{self.guard}, in {counting.being_done()}, {named}returned NaN or infinity; check it at this input, "
                "or leave such samples out: hzo.blackbox(f, on_failure='zero')"
            )
        return failed

    # -- what is a sample ---

    def _without_batch(self, output: Tensor, batch: int) -> InputError:
        return InputError(
            f"{self.guard}, in {counting.being_done()}, returned shape {tuple(output.shape)} for {batch} samples; "
            "expected the batch in dimension 0. Does it take the samples of a forward pass and no other number? Then "
            "say so: hzo.blackbox(f, batched=False); batch_dim=None where its first dimension is no batch"
        )

    def _find_layout(
        self, leaves: Sequence[Tensor], outputs: Sequence[Tensor], batch: int, sample: Sequence[bool]
    ) -> Layout:
        """Decide what has the batch in front, and make sure that samples are apart.

        Raises:
            CoupledSamplesError: they are not, though the part was called with a batch.
        """
        apart = tuple(any(sample) and t.dim() > 0 and t.shape[0] == batch for t in outputs)
        nothing = Layout(1, tuple(False for _ in leaves), tuple(False for _ in outputs))
        if not any(apart):
            if self.settings.batch_dim == 0:
                raise self._without_batch(outputs[0], batch)
            return nothing
        trials = [tuple(sample)]
        others = [k for k, flag in enumerate(sample) if flag][1:]
        if len(others) > 1:
            trials += [tuple(flag and j != k for j, flag in enumerate(sample)) for k in others]
        if others:
            trials.append(tuple(flag and j not in others for j, flag in enumerate(sample)))
        error: Exception | None = None
        for flags in trials:
            try:
                layout = Layout(batch, flags, apart)
                self._check_apart(leaves, outputs, layout)
                return layout
            except CoupledSamplesError as found:
                error = error or found
            except (QueryError, InputError) as found:  # a shared tensor that was repeated as if it had samples
                error = error or found
        assert error is not None
        flat = all(t.dim() <= 1 for t in (*leaves[: self.count], *outputs))
        if isinstance(error, CoupledSamplesError) and flat and self.settings.batch_dim == "found":
            return nothing  # a vector of parameters, that happens to be as long as the result
        unsure = isinstance(error, (QueryError, InputError)) and self.settings.batch_dim == "found"
        if unsure and self.guard.batched is True and not self._apart_in_one_size(leaves, outputs, trials[0], apart):
            return nothing  # it takes one number of rows, and they are no samples
        if type(error) is QueryError and self.guard.batched is True:
            raise QueryError(
                f"{error}. Does it take the samples of a forward pass and no other number? Then say so: "
                "hzo.blackbox(f, batched=False), or batched=32; or batch_dim=None where it has no batch at all. If it "
                "remembers its last batch in a place that hzo cannot see: state=(save, load)"
            ) from error
        raise error

    def _apart_in_one_size(
        self, leaves: Sequence[Tensor], outputs: Sequence[Tensor], flags: tuple[bool, ...], apart: tuple[bool, ...]
    ) -> bool:
        """Whether rows are samples of a part that takes no other number of them, nor fails for those of its input."""
        try:
            self._check_apart(
                leaves,
                outputs,
                Layout(next(t.shape[0] for t, flag in zip(outputs, apart, strict=True) if flag), flags, apart),
                single=True,
            )
        except (CoupledSamplesError, QueryError):  # a matrix without an inverse, say, for two rows that are the same
            return False
        return True

    @torch.no_grad()
    def _check_apart(
        self, leaves: Sequence[Tensor], outputs: Sequence[Tensor], layout: Layout, single: bool | None = None
    ) -> None:
        """Run other samples together, without the largest one: each must come out as before.

        In another order, or without the first and the last: where rows are times (a filter, a sum that runs on), what
        comes later shows nowhere before.

        Args:
            single: in as many samples as before.
        """
        batch = layout.batch
        single = not self._folds(layout) if single is None else single
        if single and batch == 1:
            return
        floats = [t for t, flag in zip(leaves, layout.leaves, strict=True) if flag and floating(t)]
        sizes = sum(
            (t.abs().double().reshape(batch, -1).sum(1).cpu() for t in floats), start=torch.zeros(batch, device="cpu")
        )
        largest = int(sizes.nan_to_num(0).argmax())
        kept = torch.tensor([k for k in range(batch) if k != largest] or [0], device="cpu")
        if single:
            rows = torch.arange(batch, device="cpu")
            replaced = [largest, 0, batch - 1] if batch > 3 else [largest]
            rows[replaced] = next(k for k in range(batch) if k not in replaced)
        else:
            rows = torch.cat([kept.flip(0), kept])
        given = []
        for t, flag in zip(leaves, layout.leaves, strict=True):
            moved = t[rows.to(t.device)] if flag else t
            if flag and batch == 1 and floating(t):
                moved = torch.cat([t * 0.9, t])
            given.append(moved)

        def ask(leaves: Sequence[Tensor], count: int) -> list[Tensor]:
            ((values, state),) = self._ask_all([leaves], count, layout.leaves)
            counting.add(check_evaluations=count)
            return [*values, *state]

        same = torch.ones(len(rows), dtype=torch.bool, device="cpu")
        if single:
            same[replaced] = False
        elif batch == 1:
            same[0] = False

        def apart() -> bool:
            found = ask(given, len(rows))
            if len(found) != len(outputs):
                raise self._another_result(len(found), len(outputs))
            return all(
                self._unchanged(before, after, rows, same)
                for before, after, flag in zip(outputs, found, layout.outputs, strict=True)
                if flag
            )

        def deterministic() -> bool:
            return all(_close(a, b, 1e-4) for a, b in zip(ask(leaves, batch), outputs, strict=True))

        with counting.doing("the test that samples are apart"), self.queries(leaves):
            if apart():
                return
            if not deterministic():
                if not (self._count_on() and deterministic()):
                    raise self._two_results()
                if apart():
                    return
        raise CoupledSamplesError(
            f"{self.guard.name} lets the samples of a batch influence each other: a sample's result changed with "
            "the samples around it, and queries perturb all samples at once. Put it into eval mode if it is a "
            "BatchNorm or the like; keep samples apart inside; or say that the part has no batch: hzo.blackbox(f, "
            "batch_dim=None), which perturbs every element of every sample by itself"
        )

    def _unchanged(self, before: Tensor, after: Tensor, rows: Tensor, same: Tensor) -> bool:
        """Whether samples came out among others as they had before."""
        if after.dim() == 0 or after.shape[0] != len(rows):
            raise self._without_batch(after, len(rows))
        expected, got = before[rows][same], after[same]
        if expected.shape != got.shape:
            raise self._another_shape(got, tuple(expected.shape), True)
        if bool(expected.isfinite().all()) and not bool(got.isfinite().all()):
            raise NonFiniteError(
                f"{self.guard}, in {counting.being_done()}, returned NaN or infinity; check it at this input"
            )
        return _close(got, expected, 1e-4)

    def _another_result(self, got: int, expected: int) -> InputError:
        return InputError(
            f"{self.guard}, in {counting.being_done()}, returned {got} tensors, and {expected} before; make what it "
            "returns depend on its input's shape alone"
        )

    def _another_shape(self, got: Tensor, expected: tuple[int, ...], apart: bool) -> InputError:
        shapes = (tuple(got.shape), expected)
        now, before = (shape[1:] for shape in shapes) if apart else shapes
        return InputError(
            f"{self.guard}, in {counting.being_done()}, returned samples of shape {[now]}, and {[before]} before, for "
            "inputs of one shape; make its output's shape depend on its input's alone"
        )

    # -- once more, at other inputs ---

    def _folds(self, layout: Layout) -> bool:
        """Whether several perturbed batches may be put into one call."""
        return (
            layout.batched and self.guard.batched is not False and not (self.draws or self.moved_on or self.state_keys)
        )

    @property
    def folds(self) -> bool:
        return self._folds(self.layout)

    @property
    def most_copies(self) -> int | None:
        """Batches in one call, for the time that it may take."""
        limit = self.guard.timeout
        if limit is None or self.guard.batched is not True or self.seconds <= 0:
            return None
        return max(1, int(limit / 2 / self.seconds))

    @contextmanager
    def queries(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the part runs as it did in the forward pass, and what it changes is put back in the end."""
        device, dtype = self.autocast
        with ExitStack() as stack:
            # Autograd runs a backward pass outside the user's autocast.
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=dtype is not None))
            stack.enter_context(torch.no_grad())
            stack.enter_context(full_float32())
            stack.enter_context(contained([self.stages]))
            for module, training in self.training.items():
                module.training = training
            stack.enter_context(self._parameters(leaves))
            stack.enter_context(self.guard.queries_from(self.start))
            if self.draws:
                stack.callback(randomness([leaves[0].device]).put_back)
            yield

    def evaluate(self, leaves: Sequence[Tensor], copies: int = 1) -> list[Tensor]:
        """(copies × B, m) of every output and of the state, real, for leaves of so many batches."""
        return self.evaluate_all([leaves], self.layout.batch * copies)[0]

    def evaluate_all(self, many: Sequence[Sequence[Tensor]], rows: int | None = None) -> list[list[Tensor]]:
        """(rows, m) of every output for several calls that do not wait for each other; ``rows``: None for the batch."""
        layout = self.layout
        rows = layout.batch if rows is None else rows
        found = []
        for outputs, state in self._ask_all(many, rows, layout.leaves):
            tensors = [*outputs, *state]
            if len(tensors) != len(self.base):
                raise self._another_result(len(outputs), len(self.result_positions))
            got = []
            for tensor, apart, shape in zip(tensors, layout.outputs, self.shapes, strict=True):
                if apart and (tensor.dim() == 0 or tensor.shape[0] != rows):
                    raise self._without_batch(tensor, rows)
                if tuple(tensor.shape[1:] if apart else tensor.shape) != (shape[1:] if apart else shape):
                    raise self._another_shape(tensor, shape, apart)
                got.append(_real(tensor).reshape(rows if apart else 1, -1))
            found.append(got)
        return found

    def sample_shapes(self, outputs: Sequence[int], apart: bool) -> list[tuple[int, ...]]:
        """Of these outputs, of one sample each or whole, complex numbers as pairs."""
        return [
            (
                *(self.shapes[o][1:] if apart and self.layout.outputs[o] else self.shapes[o]),
                *((2,) if self.complex[o] else ()),
            )
            for o in outputs
        ]

    def check_repeats(self, leaves: Sequence[Tensor]) -> None:
        """Run the part once more: differences of a result that has changed since would mean nothing.

        Raises:
            NondeterministicError: it has.
        """
        counting.add(base_evaluations=self.layout.batch)
        guard = self.guard
        with counting.doing("the test that it is deterministic"):
            again = self.evaluate(leaves)
            if self._as_before(again):
                same = all(torch.equal(a, b) for a, b in zip(again, self.base, strict=True))
                self.unlike = None if same else [_gap(a, b) for a, b in zip(again, self.base, strict=True)]
                return
            if any(
                bool(b.isfinite().all()) and not bool(a.isfinite().all()) for a, b in zip(again, self.base, strict=True)
            ):
                raise NonFiniteError(
                    f"{guard}, in {counting.being_done()}, returned NaN or infinity, and numbers before; check it at "
                    "this input"
                )
            if self._count_on() and self._as_before(self.evaluate(leaves)):
                return
        raise self._two_results()

    def _count_on(self) -> bool:
        """Take whole numbers that the part counts in for state; whether there are any."""
        guard = self.guard
        if guard.remembers.counters or self.start is None or self.end is None:
            return False
        counters = guard.changed(self.start, self.end)[1]
        if counters:
            guard.remembers.counters = True
            self.moved_on = (*self.moved_on, *counters)
        return bool(counters)

    def _two_results(self) -> NondeterministicError:
        guard = self.guard
        return NondeterministicError(
            f"the black box {guard.name} gave two results for the same input, and differences of its results would "
            "mean nothing. Does it keep a state that hzo cannot see (in another process, a library, a global "
            "variable)? Give the state to it and have it returned, f(x, state) -> (y, state), or say how it is saved "
            "and put back: hzo.blackbox(f, state=(save, load)). Only where results differ by the noise of a "
            "measurement, new in every reading, say so: noise='measured' has steps and repeats planned for it"
        )

    def _as_before(self, again: Sequence[Tensor]) -> bool:
        return all(
            _close(b, a, 1e-2 * float(torch.finfo(a.dtype).eps) ** (1 / 3))
            for a, b in zip(self.base, again, strict=True)
        )

    # -- asking ---

    def _settle(
        self, leaves: Sequence[Tensor], batch: int, sample: Sequence[bool], outputs: Sequence[Tensor], out: _Around
    ) -> None:
        """What the forward pass changed is state or scratch."""
        if not self.guard.moves_on:
            return
        size = self.guard.batched

        def again() -> list[Tensor]:
            counting.add(check_evaluations=batch)
            now = randomness([leaves[0].device])
            assert self.random is not None
            self.random.put_back()
            try:
                return _with_constants(*self._ask(leaves, batch, sample))
            finally:
                now.put_back()

        calls = -(-batch // size) if type(size) is int else 1
        self.guard.check_split(calls, again, _with_constants(outputs, out))

    def _ask(
        self, leaves: Sequence[Tensor], rows: int, sample: Sequence[bool], watched: bool = False
    ) -> tuple[list[Tensor], _Around]:
        """Tensors that the part returns, and what stands around them."""
        results = self._results([leaves], rows, sample, watched)[0]
        return self._joined(results, rows, leaves[0].device, watched)

    def _ask_all(
        self, many: Sequence[Sequence[Tensor]], rows: int, sample: Sequence[bool]
    ) -> list[tuple[list[Tensor], list[Tensor]]]:
        device = many[0][0].device
        if not (self.draws or self.state_keys or self.moved_on or self.parameters):
            with self.guard.remembered():
                answers = self._results(many, rows, sample, False)
            return [(self._joined(results, rows, device, False)[0], []) for results in answers]
        found = []
        for leaves in many:
            if self.draws and self.random is not None:
                self.random.put_back()
            with self.guard.remembered(), self._parameters(leaves):
                self._move_state(leaves)
                results = self._results([leaves], rows, sample, False)[0]
                state = []
                if self.left:
                    after = self.guard.state.save()
                    numbers = self.guard.state.numbers(after, self.left)
                    state = [torch.as_tensor(numbers.get(key, torch.nan)).detach().clone() for key in self.left]
            found.append((self._joined(results, rows, device, False)[0], state))
        return found

    def _move_state(self, leaves: Sequence[Tensor]) -> None:
        for key, tensor in zip(self.state_keys, leaves[len(leaves) - len(self.state_keys) :], strict=True):
            assert self.start is not None
            self.guard.state.move(self.start, key, tensor)

    def _results(
        self, many: Sequence[Sequence[Tensor]], rows: int, sample: Sequence[bool], watched: bool
    ) -> list[list[tuple[Any, int]]]:
        """For each list of leaves the results of the calls that it was split into, with their sizes."""
        exact = type(self.guard.batched) is int  # the last call is padded
        size = int(self.guard.batched) if exact else self._share(many[0], rows, len(many), sample)
        calls, ends = [], []
        for leaves in many:
            for at in range(0, rows, size):
                count = size if exact else min(size, rows - at)
                cut = [rows_of(t, at, count) if flag and size != rows else t
                       for t, flag in zip(leaves, sample, strict=True)]  # fmt: skip
                calls.append((*self.arguments(cut), count))
            ends.append(len(calls))
        try:
            found = self.guard.run_all(calls, watched=watched)
        except QueryError:
            if self.settings.on_failure != "zero" or not any(sample):
                raise
            return [self._one_by_one(leaves, rows, sample) for leaves in many]
        starts, sizes = [0, *ends[:-1]], [count for *_, count in calls]
        return [list(zip(found[a:b], sizes[a:b], strict=True)) for a, b in zip(starts, ends, strict=True)]

    def _share(self, leaves: Sequence[Tensor], rows: int, calls: int, sample: Sequence[bool]) -> int:
        """Samples of one call: all, unless there are workers without one, and samples are known to be apart."""
        pool = self.guard.pool
        if pool is None or pool.divides is None or self.guard.batched is not True or not any(sample):
            return rows
        layout = self.layout if self.layout.batched else self.known.get(self._key(leaves))
        if layout is None or not layout.batched or not all(layout.outputs):
            return rows
        return divided(rows, calls, pool.divides)

    def _one_by_one(self, leaves: Sequence[Tensor], rows: int, sample: Sequence[bool]) -> list[tuple[Any, int]]:
        """Halves of a batch that fails, down to the samples that do: these have no result."""
        most = int(self.guard.batched) if type(self.guard.batched) is int else rows
        found: list[tuple[Any, int]] = []
        for start in range(0, rows, most):
            found += self._halved(leaves, start, min(start + most, rows), most, sample)
        if all(result is _FAILED for result, _ in found):
            cut = [rows_of(t, 0, most) if flag else t for t, flag in zip(leaves, sample, strict=True)]
            self.guard.run(*self.arguments(cut), most)  # raises what it raised before
        return found

    def _halved(
        self, leaves: Sequence[Tensor], start: int, stop: int, most: int, sample: Sequence[bool]
    ) -> list[tuple[Any, int]]:
        """Where a part takes one number of samples only, the last one stands for those that are missing."""
        count = stop - start
        size = count if self.guard.batched is True else most
        cut = [rows_of(t[start:stop], 0, size) if flag else t for t, flag in zip(leaves, sample, strict=True)]
        try:
            return [(_first(self.guard.run(*self.arguments(cut), size), size, count), count)]
        except QueryError:
            if count == 1:
                return [(_FAILED, 1)]
            middle = (start + stop) // 2
            return [
                *self._halved(leaves, start, middle, most, sample),
                *self._halved(leaves, middle, stop, most, sample),
            ]

    def _joined(
        self, results: Sequence[tuple[Any, int]], rows: int, device: torch.device, watched: bool
    ) -> tuple[list[Tensor], _Around]:
        parts: list[tuple[list[Tensor] | None, int]] = []
        first = None
        for result, size in results:
            if result is _FAILED:
                parts.append((None, size))
                continue
            leaves, structure = flatten(result)
            leaves = [_as_numpy(leaf) for leaf in leaves]
            if watched:
                self._check_trainable(leaves)
            places = self._numbers(leaves)
            tensors = [self.guard.tensor(leaves[k], device) for k in places]
            if first is None:
                first = leaves, structure, places
            parts.append((tensors, size))
        assert first is not None
        leaves, structure, places = first
        if not places:
            came = type(results[0][0]).__name__
            raise InputError(f"{self.guard}, in {counting.being_done()}, returned a {came}; expected tensors or arrays")
        constants = [None if k in places else leaf for k, leaf in enumerate(leaves)]
        out = structure, constants, places
        model = next(tensors for tensors, _ in parts if tensors is not None)
        if len(parts) == 1:
            size = parts[0][1]
            return [t[:rows] if size != rows and t.dim() and t.shape[0] == size else t for t in model], out
        joined = []
        for k, like in enumerate(model):
            pieces = []
            for part, size in parts:
                failed = like.new_full((size, *like.shape[1:]), torch.nan if floating(like) else 0)
                made = failed if part is None else part[k]
                if made.dim() == 0 or made.shape[0] != size:
                    raise self._without_batch(made, size)
                pieces.append(made)
            joined.append(torch.cat(pieces)[:rows])
        return joined, out

    def _numbers(self, leaves: Sequence[Any]) -> list[int]:
        """The leaves of a result that become tensors: arrays and floating numbers; whole ones where nothing else is."""
        arrays = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) or _of_numpy(leaf)]
        found = sorted([*arrays, *(k for k, leaf in enumerate(leaves) if isinstance(leaf, (float, complex)))])
        if found or self.settings.integers == "kept":
            return list(dict.fromkeys(found))
        return [k for k, leaf in enumerate(leaves) if isinstance(leaf, (bool, int))]

    def _check_trainable(self, leaves: Sequence[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor) and requires_grad(leaf):
                shapes = [tuple(t.shape) for t in _trainable_behind(leaf)]
                which = f"of shape {shapes[0]} " if shapes else ""
                raise TraceError(
                    f"{self.guard} uses a trainable tensor {which}that it has not registered, whose gradient would be "
                    "lost; make f a module that holds it (nn.Module), give it as an argument, or say that its gradient "
                    "comes from elsewhere: hzo.blackbox(f, parameters='ignored')"
                )

    def arguments(self, leaves: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the part, with these tensors in place."""
        values = list(self.constants)
        for position, tensor in zip(self.positions, leaves, strict=False):
            values[position] = tensor
        args, kwargs = self.structure.build(values)
        return tuple(args), kwargs

    def outputs(self, tensors: Sequence[Any]) -> Any:
        """The result of the part, with these tensors in place."""
        values = list(self.result_constants)
        for position, tensor in zip(self.result_positions, tensors, strict=False):
            values[position] = tensor
        assert self.result is not None
        return self.result.build(values)

    @contextmanager
    def _parameters(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """With parameters as they are among the leaves, whoever holds others since."""
        if not self.parameters:
            yield
            return
        now = dict(self.stages.named_parameters())
        given = leaves[self.count : self.count + len(self.parameters)]
        with with_parameters(self.stages, {id(now[n]): p for n, p in zip(self.parameters, given, strict=True)}):
            yield


def _first(result: Any, size: int, count: int) -> Any:
    """The first samples of a result of ``size`` ones."""
    if size == count:
        return result
    leaves, structure = flatten(result)
    leaves = [_as_numpy(leaf) for leaf in leaves]
    arrays = [isinstance(leaf, Tensor) or (_of_numpy(leaf) and leaf.ndim > 0) for leaf in leaves]
    return structure.build(
        [
            leaf[:count] if array and leaf.shape[:1] == (size,) else leaf
            for leaf, array in zip(leaves, arrays, strict=True)
        ]
    )


_FAILED = object()
_Around = tuple[Structure, list[Any], list[int]]
"""What stands around the tensors of a result: its structure, its other leaves, the places of the tensors."""


def _with_constants(outputs: Sequence[Tensor], out: _Around) -> list[Tensor]:
    """The tensors of a result, then its other numbers: flags, counts."""
    return [*outputs, *(torch.as_tensor(leaf) for leaf in out[1] if isinstance(leaf, (bool, int)))]


def _as_numpy(leaf: Any) -> Any:
    """Arrays and tables of other libraries (JAX's, pandas') as NumPy's."""
    foreign = not isinstance(leaf, (Tensor, type)) and hasattr(leaf, "__array__")
    return leaf.__array__() if foreign and type(leaf).__module__ != "numpy" else leaf


def _of_numpy(leaf: Any) -> bool:
    return type(leaf).__module__ == "numpy" and getattr(getattr(leaf, "dtype", None), "kind", "") in tuple("fciub")


def _autocast(device: str) -> bool:
    return torch.is_autocast_enabled(device)


def _gap(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).abs().nan_to_num(0.0, 0.0, 0.0)


def _real(tensor: Tensor) -> Tensor:
    """Floating: complex numbers as pairs, whole numbers as they are."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.is_floating_point() else tensor.double()


def _close(a: Tensor, b: Tensor, slack: float) -> bool:
    """Equal up to rounding, relative to the largest number; NaN equals NaN."""
    if a.shape != b.shape:
        return False
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    finite = b[b.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    wide = torch.promote_types(a.dtype, torch.float32)
    slack = max(slack, 4 * float(torch.finfo(a.dtype).eps) if torch.finfo(a.dtype).eps > 1e-4 else slack)
    return torch.allclose(a.to(wide), b.to(wide), rtol=slack, atol=slack * scale, equal_nan=True)


def named_samples(failed: Tensor) -> str:
    """'sample 2', 'samples 2, 5 and 7', numbered from 0."""
    which = [str(int(k)) for k in failed.nonzero().flatten()[:8]]
    more = int(failed.sum()) - len(which)
    if more > 0:
        return f"samples {', '.join(which)} and {more} more"
    return f"sample {which[0]}" if len(which) == 1 else f"samples {', '.join(which[:-1])} and {which[-1]}"


def _warn_of_failure(guard: Guarded, failed: Tensor, batched: bool) -> None:
    which = f"{named_samples(failed)} of {failed.numel()}" if batched else "a call"
    warnings.warn(
        f"{guard}, in {counting.being_done()}: {which} came out as NaN or infinity and is left out of the gradient; "
        "box.failed tells which, to leave them out of the loss",
        FailedSamplesWarning,
        stacklevel=2,
    )


def _trainable_behind(tensor: Tensor) -> list[Tensor]:
    found, todo, seen = [], [grad_fn(tensor)], set()
    if todo[0] is None:
        return [tensor]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.append(variable)
        todo += [parent for parent, _ in node.next_functions]
    return sorted(found, key=lambda t: -prod(t.shape))

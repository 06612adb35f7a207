"""The base pass: the model, and the loss behind it, as one recording; the loss carried back by rules to the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo.errors import NonFiniteError, PlanError
from hzo.execution import Activations, counting, undone_on_error
from hzo.finite_differences import accumulation_dtype
from hzo.losses import fitting_loss
from hzo.reverse import RecordedStep, as_data, check_input, sweep_end
from hzo.tape import Recorder, Tape
from hzo.tape.operations import Ref
from hzo.tracing import Chain, Graph, batch_size, call_arguments
from hzo.tracing.recorder import OutOfSight, RecordedRun, recorded, rerun


class OtherGraphError(PlanError):
    """The model did something else than when it was traced."""


@dataclass(frozen=True)
class BasePass:
    """An ordinary forward pass with its loss, from which the queries of a plan start.

    Attributes:
        activations: what the model left. output: what it returned, without a history.
        loss: the mean loss. at_end: cotangents of the output's values, in the accumulation dtype.
        direct: what the loss adds by itself to values that do not depend on the inputs: parameters, and what is derived
            from them. beside: gradients of the loss's own parameters, with these.
        given: the caller's inputs, by value.
    """

    activations: Activations
    output: Any
    loss: Tensor
    at_end: dict[int, Tensor] = field(default_factory=dict)
    direct: dict[int, Tensor] = field(default_factory=dict)
    beside: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    given: dict[int, Tensor] = field(default_factory=dict)


class _Release:
    """Frees, while a model is recorded, the activations that its plan reads no more, as long as the model does what it
    did when it was traced."""

    def __init__(self, graph: Graph, recorder: Recorder, batch: int, steps: Sequence[Iterable[int]]) -> None:
        self.graph, self.recorder, self.steps = graph, recorder, steps
        self.activations = Activations(batch, recorder.tape)
        self.done = 0
        self.leaves: dict[int, Tensor] = {}  # those of what was freed that no operation makes again

    def after_calls(self) -> None:
        """Free what the schedule says behind every operation that has run since."""
        operations = self.recorder.tape.operations
        while self.done < min(len(operations), len(self.steps)):
            if operations[self.done].writes != self.graph.operations[self.done].results:
                self.recorder.after_calls = None
                return
            gone = self.steps[self.done]
            self.done += 1  # first: to release calls PyTorch, which calls this
            held = [(v, t) for v in gone if (t := self.recorder.tape.tensors[v]) is not None]
            self.leaves.update((v, t) for v, t in held if self.recorder.tape.values[v].producer < 0)
            self.activations.release(self.graph, gone)
            self.recorder.drop([t for _, t in held])

    def take_back(self) -> None:
        """Compute again what was freed: the model does something else, and this schedule is not its own."""
        tape = self.recorder.tape
        gone = {v for step in self.steps[: self.done] for v in step}
        for leaf, content in self.leaves.items():
            tape.tensors[leaf] = content
        for op in tape.operations[: self.done]:
            if gone.isdisjoint(op.writes):
                continue
            made = rerun(tape, op, tape.resolve(op.args), {k: tape.resolve(a) for k, a in op.kwargs.items()})
            for v, tensor in zip(op.writes, made, strict=True):
                if v in gone and v is not None:
                    tape.tensors[v] = tensor


@contextmanager
def _running(
    module: nn.Module, x: Any, graph: Graph | None, steps: Sequence[Iterable[int]] = (), **how: Any
) -> Iterator[tuple[RecordedRun, _Release | None]]:
    args, kwargs = call_arguments(x)
    batch = batch_size(args, kwargs)
    check_input(x)
    altered = None if graph is None or graph.noise is None else _noise(graph)
    release: list[_Release] = []

    def after_calls(recorder: Recorder) -> Callable[[], None]:
        assert graph is not None
        release.append(_Release(graph, recorder, batch, steps))
        return release[0].after_calls

    with recorded(module, args, kwargs, altered=altered, after_calls=after_calls if steps else None, **how) as run:
        if run.recorder.after_calls is not None:
            run.recorder.after_calls()
            run.recorder.after_calls = None
        yield run, release[0] if release else None


def _noise(graph: Graph) -> Callable[[Recorder, int, Tensor], Tensor]:
    """What every stage adds to what it hands on, as the graph says."""

    def altered(_: Recorder, index: int, tensor: Tensor) -> Tensor:
        if index >= len(graph.operations) or graph.noise is None:
            return tensor
        writes = graph.operations[index].writes
        return graph.noise.processed(tensor, graph.stage_of[index]) if writes and graph.handed_on[writes[0]] else tensor

    return altered


@torch.no_grad()
def base_pass(chain: Chain, x: Any, steps: Sequence[Iterable[int]] = ()) -> tuple[Activations, Any]:
    """Run a chain once, as an ordinary forward pass does, and keep what queries will need; also what it returned.

    Args:
        steps: for every operation the values to release after it (``Schedule.base_pass``).

    Cost: one forward pass (``base_evaluations``). Buffers and random state move as in one ordinary forward pass.

    Raises:
        PlanError: the model does something else than when it was traced.
    """
    graph = chain.traced
    batch = batch_size(*call_arguments(x))
    with _running(chain.model, x, graph, steps, opaque=graph.opaque_stages) as (run, release):
        check_same(graph, run.tape, run.end, batch)
        if release is not None:
            release.leaves.clear()
        output = run.output
    counting.add(base_evaluations=batch * len(graph.stages))
    return _activations(graph, run, batch), output


def _activations(graph: Graph, run: RecordedRun, batch: int) -> Activations:
    tape = run.tape
    run.recorder.release()
    kept = len(graph.values)  # what follows is the loss's
    tape.tensors = [
        None if t is None or v >= kept else t.detach() if t.requires_grad else t for v, t in enumerate(tape.tensors)
    ]
    return Activations(batch, tape, run.recorder)


@dataclass(frozen=True)
class RecordedLoss:
    """A model and its loss as they ran, once.

    Attributes:
        module, run, batch, loss: what ran, and what came out.
        difference: what it did otherwise than the graph that it was expected to follow; None where it followed it.
    """

    module: nn.Module
    run: RecordedRun
    batch: int
    loss: Tensor
    difference: OtherGraphError | None


@torch.no_grad()
def record_loss(
    module: nn.Module,
    x: Any,
    loss_fn: Callable[..., Any],
    y: Any,
    graph: Graph | None = None,
    steps: Sequence[Iterable[int]] = (),
    *,
    follow: bool,
) -> RecordedLoss:
    """Run a model and its loss once.

    Args:
        graph, steps: what it did before, if that is known, and for every operation the values to release after it.
        follow: note what a graph can be made of, where it does something else or nothing is known.

    Raises:
        PlanError: without ``follow``, the model does something else than the graph says.
    """
    y = pytree.tree_map_only(Tensor, as_data, y)
    batch = batch_size(*call_arguments(x))
    opaque = frozenset() if graph is None else graph.opaque_stages
    while True:
        try:
            with _running(module, x, graph, steps, follow=follow, opaque=opaque) as (run, release):
                difference = None
                try:
                    if graph is not None:
                        check_same(graph, run.tape, run.end, batch)
                except OtherGraphError as error:
                    if not follow:
                        raise
                    difference = error
                    if release is not None:
                        release.take_back()
                if release is not None:
                    release.leaves.clear()
                run.recorder.undo.remember_attributes([loss_fn])
                loss = fitting_loss(loss_fn, run.output, y)
            return RecordedLoss(module, run, batch, loss, difference)
        except OutOfSight as found:  # a stage that looks at values: out of the recorder's sight from its beginning
            opaque = opaque | {id(found.stage)}


@torch.no_grad()
def loss_pass(
    chain: Chain, x: Any, loss_fn: Callable[..., Any], y: Any, steps: Sequence[Iterable[int]] = ()
) -> BasePass:
    """A base pass, its loss, and the cotangents that the loss gives to the outputs.

    Raises:
        InputError: the loss is no tensor of numbers. NonFiniteError: names the first call that made NaN or infinity.
        PlanError: the model does something else than when it was traced, a tensor inside it has a hook, or the loss
            reads what the model did not return.
    """
    recording = record_loss(chain.model, x, loss_fn, y, chain.traced, steps, follow=False)
    return carried_to_outputs(chain, x, recording)


@torch.no_grad()
def carried_to_outputs(chain: Chain, x: Any, recording: RecordedLoss) -> BasePass:
    """A base pass out of a recording that does what the chain says. Raises: as ``loss_pass``."""
    graph, run, batch, loss = chain.traced, recording.run, recording.batch, recording.loss
    try:
        seeds, hooks = RecordedStep(run.recorder).seed(loss)
        _refuse_hooks(graph, run)
        with counting.as_loss():
            found = sweep_end(run.tape, run.end, seeds, hooks)
        at_end, direct, beside = _sorted(graph, run.tape, found)
        loss = loss.detach().mean()
    except NonFiniteError as error:
        run.recorder.undo.restore()
        first = _first_not_finite(chain, x)
        if first is None:
            raise
        raise NonFiniteError(f"{first}; {error}") from error
    except BaseException:
        run.recorder.undo.restore()
        raise
    counting.add(base_evaluations=batch * len(graph.stages))
    given = dict(zip(run.inputs, run.given, strict=True))
    return BasePass(_activations(graph, run, batch), run.output, loss, at_end, direct, beside, given)


def _refuse_hooks(graph: Graph, run: RecordedRun) -> None:
    """Hooks on tensors inside the model would change a gradient that no query sees; ``retain_grad`` asks for one."""
    for tensor in run.recorder.seen():
        value = run.tape._index.get(id(tensor))
        if value is None or value >= len(graph.values) or tensor.is_leaf:
            continue
        if tensor.retains_grad:
            producer = graph.values[value].producer
            what = "an input" if producer < 0 else f"what {graph.operations[producer].name} made"
            raise PlanError(
                f"retain_grad() was called inside the model on {what}, and a plan fills .grad of parameters and inputs "
                "alone; hzo.cotangents gives the gradients at the boundaries of stages, or leave out plan and options, "
                "which fills it as autograd does"
            )
        if not tensor._backward_hooks:
            continue
        producer = graph.values[value].producer
        what = "an input" if producer < 0 else f"what {graph.operations[producer].name} made"
        names = ", ".join(getattr(h, "__qualname__", type(h).__name__) for h in tensor._backward_hooks.values())
        raise PlanError(
            f"a hook on the gradient of {what} ({names}) runs inside the model, where a plan estimates across it; "
            "leave out plan and options, which runs hooks as autograd does, or hook the parameters"
        )


def _first_not_finite(chain: Chain, x: Any) -> str | None:
    """The call of the model that made NaN or infinity first: run once more with everything kept."""
    graph = chain.traced
    try:
        with undone_on_error([chain.model]), counting.as_checks():
            activations, _ = base_pass(chain, x)
    except Exception:  # its code does something else the second time: the error names no call then
        return None
    for op in graph.operations:
        held = [activations.tensor(v) for v in op.writes if graph.values[v].floating]
        if not all(bool(t.isfinite().all()) for t in held) and all(graph.values[v].finite for v in op.writes):
            stage = graph.stage_of[op.index]
            return (
                f"{op.name} is the first operation whose result holds NaN or infinity (in stage {stage}, "
                f"{graph.stages[stage].name})"
            )
    return None


def _sorted(
    graph: Graph, tape: Tape, found: dict[int, Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor], list[tuple[Tensor, Tensor]]]:
    at_end: dict[int, Tensor] = {}
    direct: dict[int, Tensor] = {}
    beside: list[tuple[Tensor, Tensor]] = []
    for value, g in found.items():
        about = graph.values[value] if value < len(graph.values) else None
        wide = (g.to_dense() if g.is_sparse else g).to(accumulation_dtype(tape.values[value].dtype))
        if about is None:
            if value in tape.leaves:
                beside.append((tape.leaves[value], wide))
        elif not about.batched:
            direct[value] = wide
        elif value in graph.outputs:
            at_end[value] = wide
        elif graph.requires[value]:
            raise PlanError(
                f"the loss reads what {graph.operations[about.producer].name} made, which the model does not return; "
                "return it beside the output, or leave out plan and options"
            )
    return at_end, direct, beside


def check_same(graph: Graph, tape: Tape, end: int, batch: int) -> None:
    """Whether the model did what it did when it was traced, but for the batch size and numbers.

    Raises:
        PlanError: it did something else; names the first call that differs.
    """
    for op, call in zip(graph.operations, tape.operations[:end], strict=False):
        if op.target != call.target or op.results != call.writes:
            raise _other(graph, op.index, f"{call!r} ran where {op.target}{op.args} had run")
        pointwise = op.pointwise
        if not _alike(
            (op.args, tuple(op.kwargs.items())), (call.args, tuple(call.kwargs.items())), graph.batch, batch, pointwise
        ):
            raise _other(graph, op.index, f"{call!r} ran where the arguments had been {op.args} {op.kwargs}")
        for v in op.writes:
            if not _fits(graph, v, tuple(tape.values[v].shape), batch) or graph.values[v].dtype != tape.values[v].dtype:
                raise _other(graph, op.index, f"{call!r} made {tape.values[v]!r} where {graph.values[v].shape} was")
    if len(graph.operations) != end:
        raise _other(graph, min(end, len(graph.operations)), f"{end} calls ran where {len(graph.operations)} had run")
    _check_same_leaves(graph, tape, end)


def _check_same_leaves(graph: Graph, tape: Tape, end: int) -> None:
    """Whether what is trained stands where it stood, and what was one parameter is one. Which of several alike stands
    in a place may change: layers are run in random order, an expert is chosen by its number."""
    now = {v for v, leaf in tape.leaves.items() if v < len(graph.values) and leaf.requires_grad} - set(graph.inputs)
    before = {v for v in graph.names if v < len(graph.values)}
    stand: dict[str, Tensor] = {}
    for v, name in graph.names.items():
        if v in now and stand.setdefault(name, tape.leaves[v]) is not tape.leaves[v]:
            before.discard(v)
    if now != before:
        different = now ^ before
        index = next((op.index for op in graph.operations if not different.isdisjoint(op.reads)), end)
        raise _other(graph, index, "another set of tensors is trained")


def _other(graph: Graph, index: int, what: str) -> OtherGraphError:
    return OtherGraphError(
        f"this plan was made for another chain, input shape, dtype or mode: at {graph.describe(index)} {what}; make "
        "one for this: chain = hzo.trace(model, x); plan = hzo.plan(chain)"
    )


def _fits(graph: Graph, value: int, shape: tuple[int, ...], batch: int) -> bool:
    about = graph.values[value]
    return len(about.shape) == len(shape) and all(
        b * graph.batch == a * batch if d == about.batch_dim else a == b or b * graph.batch == a * batch
        for d, (a, b) in enumerate(zip(about.shape, shape, strict=True))
    )


def _alike(a: Any, b: Any, traced: int, batch: int, pointwise: bool) -> bool:
    """Arguments that a plan cannot tell apart: whole numbers may grow with the batch, other numbers may change."""
    if type(a) is tuple:
        return type(b) is tuple and len(a) == len(b) and all(
            _alike(p, q, traced, batch, pointwise) for p, q in zip(a, b, strict=True)
        )  # fmt: skip
    if type(a) is Ref or type(b) is Ref:
        return a is b
    if type(a) is int and type(b) is int:
        return pointwise or a == b or a * batch == b * traced
    if isinstance(a, float) and isinstance(b, float):
        return True
    return type(a) is type(b) and (isinstance(a, nn.Module) or bool(a == b))

"""Running a model under the recorder, stage by stage: what the trace, a gradient and every check begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo.errors import InputError, TapeError, TraceError
from hzo.tape import Recorder, Tape, ref
from hzo.tape.history import History, requires_grad
from hzo.tape.marks import marks_of
from hzo.tape.opaque import call_opaque
from hzo.tape.surroundings import recording
from hzo.tracing import Stages, map_output, output_leaves, requires_gradient, tensors_in, untouched


@dataclass
class RecordedRun:
    """A model as it ran: the recorder, where stages end, and what came out.

    Attributes:
        inputs: the values of the inputs; given: the tensors that the caller handed over, in the same order.
        output: what the model returned, as tensors; references: the same with values in place of tensors.
        end, values: the numbers of operations and values of the model; what follows is the loss.
        opaque: stages that had to be run out of the recorder's sight.
        written: inputs that the model wrote to in place, each as handed over and as the model left its copy.
    """

    recorder: Recorder
    inputs: tuple[int, ...] = ()
    given: tuple[Tensor, ...] = ()
    stages: list[tuple[str, int]] = field(default_factory=list)
    output: Any = None
    references: Any = None
    end: int = 0
    values: int = 0
    opaque: frozenset[int] = frozenset()
    written: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def tape(self) -> Tape:
        """What was recorded."""
        return self.recorder.tape


@contextmanager
def recorded(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    follow: bool = False,
    opaque: frozenset[int] = frozenset(),
    altered: Callable[[Recorder, int, Tensor], Tensor] | None = None,
    after_calls: Callable[[Recorder], Callable[[], None]] | None = None,
) -> Iterator[RecordedRun]:
    """Run a model under a recorder that stays active inside the ``with`` block, for a loss.

    All that depends on a floating-point input is recorded, whether or not anything trainable lies before it. Where the
    block raises, what the model wrote to is put back.

    Args:
        follow: mark what depends on the inputs, for a trace. opaque: stages, by identity, to run out of sight.
        altered: what an operation hands on in place of its result.
        after_calls: makes, for the recorder, what is called when operations have run.
    """
    recorder = Recorder(keep=True)
    recorder.history = History(recorder.tape)
    recorder.undo.remember_attributes(module.modules())
    names = {id(m): name for name, m in module.named_modules()}
    recorder.opaque = lambda inner: _opaque_name(inner, names, opaque)
    if altered is not None:
        recorder.altered = lambda index, tensor: altered(recorder, index, tensor)
    if after_calls is not None:
        recorder.after_calls = after_calls(recorder)
    given = tuple(tensors_in((args, kwargs)))
    copies = [_unattached(t) for t in given]
    versions = [copy._version for copy in copies]
    fresh = iter(copies)
    args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(fresh), (args, kwargs))
    run = RecordedRun(recorder, given=given, opaque=opaque)
    try:
        with recording(recorder):
            if follow:
                recorder.follow(copies)
            run.inputs = tuple(_input(recorder, t, copy) for t, copy in zip(given, copies, strict=True))
            _run_stages(module, run, args, kwargs)
            yield run
            run.written = _written(given, copies, versions)
    except BaseException:
        recorder.undo.restore()
        raise


def _written(
    given: Sequence[Tensor], copies: Sequence[Tensor], versions: Sequence[int]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Which inputs were written to in place.

    Raises:
        TraceError: one of them shares its memory with another input, which the model saw as two.
    """
    found = [k for k, (copy, version) in enumerate(zip(copies, versions, strict=True)) if copy._version != version]
    for k in found:
        if sum(t.untyped_storage().data_ptr() == given[k].untyped_storage().data_ptr() for t in given) > 1:
            raise TraceError(
                f"the model writes in place to input {k} (counted from 0), whose memory another input shares; hand "
                "over copies (x.clone()), or leave out plan and options"
            )
    return tuple((given[k], copies[k].detach()) for k in found)


def write_back(run: RecordedRun) -> None:
    """Give inputs that the model wrote to in place what it wrote there, as an ordinary call of the model does."""
    for given, copy in run.written:
        with torch.no_grad(), torch.inference_mode(given.is_inference()):
            given.copy_(copy)


def _unattached(tensor: Tensor) -> Tensor:
    """A copy that the model may write to; one of floating-point numbers has a history, as activations do."""
    copy = tensor.detach()
    if not copy.is_floating_point() or copy.is_inference():
        copy = copy.clone()
    if not copy.is_floating_point():
        return copy
    with torch.enable_grad():
        return copy.requires_grad_().clone()


def _input(recorder: Recorder, tensor: Tensor, copy: Tensor) -> int:
    history = recorder.history
    assert history is not None
    differentiated = requires_gradient(tensor)
    value = recorder.new_value(copy, requires_grad(copy), -1, False)
    if differentiated:
        recorder.tape.leaves[value] = tensor
        history.claim(copy, True)
    elif requires_grad(tensor):
        history.given.add(value)
    return value


def _opaque_name(module: nn.Module, names: dict[int, str], opaque: frozenset[int]) -> str | None:
    """The name of a module that is one operation: declared, marked, or one that had to be; None for any other."""
    marks = marks_of(module)
    if marks is None and id(module) not in opaque:
        return None
    box = None if marks is None else marks.box
    return box or names.get(id(module)) or type(module).__name__


def stages_of(module: nn.Module) -> list[tuple[str, Callable[..., Any]]] | None:
    """The stages that a model names itself, or None."""
    if isinstance(module, Stages):
        return [(f"{k}:{getattr(s, '__name__', type(s).__name__)}", s) for k, s in enumerate(module.callables)]
    if type(module) is nn.Sequential and len(module) and untouched(module):
        # Not named_children, which leaves out a child that stands there a second time.
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        return [(f"{name}:{type(child).__name__}", child) for name, child in children]
    return None


class OutOfSight(Exception):  # noqa: N818  # no error: the run begins anew
    """A stage whose result autograd does not see, although its input requires a gradient."""

    def __init__(self, stage: Callable[..., Any], why: str) -> None:
        super().__init__(why)
        self.stage = stage


def _run_stages(module: nn.Module, run: RecordedRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    stages = stages_of(module)
    named = stages is not None
    result: Any = None
    for name, stage in stages or [(type(module).__name__, module)]:
        result = _run_stage(run, name, stage, args, kwargs, named)
        run.stages.append((name, len(run.tape.operations)))
        spread = isinstance(result, tuple) and isinstance(module, Stages)
        args, kwargs = (tuple(result) if spread else (result,)), {}
    run.output = result
    run.references = map_output(lambda t: ref(run.recorder.read(t)) if isinstance(t, Tensor) else t, result)
    run.end, run.values = len(run.tape.operations), len(run.tape.values)
    name, _ = run.stages[-1]
    run.stages[-1] = (name, run.end)  # reading what was written to through a view is an operation


def _run_stage(
    run: RecordedRun, name: str, stage: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], named: bool
) -> Any:
    try:
        if id(stage) in run.opaque and not isinstance(stage, nn.Module):
            return call_opaque(run.recorder, stage, name, args, kwargs)
        result = stage(*args, **kwargs)
    except TraceError:
        raise
    except RuntimeError as error:
        # NumPy refuses tensors that require a gradient.
        if named and id(stage) not in run.opaque and "that requires grad" in str(error):
            raise OutOfSight(stage, str(error)) from error
        if isinstance(error, TapeError):
            raise TraceError(f"{name}: {error}") from error
        if "that requires grad" not in str(error):
            raise
        raise TraceError(
            f"{name}: the forward pass reads values out of a tensor, so what it does cannot be seen; make the part "
            f"that does so a stage of its own: hzo.Chain([f1, f2, ...]), or wrap it in hzo.blackbox ({error})"
        ) from error
    if named and id(stage) not in run.opaque and _lost(args, kwargs, result):
        raise OutOfSight(stage, "its result does not carry a gradient")
    return result


def _lost(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Whether floating-point numbers go in with a gradient and come out without any."""
    before = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
    after = [t for t in output_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
    return any(map(requires_grad, before)) and bool(after) and not any(map(requires_grad, after))


def check_tensors(module: nn.Module) -> None:
    """Raise where parameters have no shape yet."""
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        raise InputError("the model has parameters without a shape yet (LazyLinear, ...); run it once: model(x)")

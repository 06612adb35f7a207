"""What surrounds a recording: autograd and the libraries above it, told to let the tape see what they do.

Each context below changes one thing that would hide calls from the tape, and puts it back. Those that replace a
function of PyTorch's for all threads act only in threads that record.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.autograd.function import Function, FunctionCtx, FunctionMeta, _HookMixin, _SingleLevelFunction
from torch.nn.modules import module
from torch.utils import module_tracker
from torch.utils.hooks import RemovableHandle

from hzo.distributed import refuse_running
from hzo.errors import DistributedError, TapeError
from hzo.tape import recurrent
from hzo.tape.custom import CustomFunction, NodeHooks, UnseenCall
from hzo.tape.history import grad_fn, is_leaf, requires_grad
from hzo.tape.marks import is_declared
from hzo.tape.opaque import call_opaque, hooks_allowed
from hzo.tape.record import Recorder, current_recorder

_lock = threading.RLock()
_recording = [0]  # threads that record at the moment
_told = [0]  # of these, threads whose code is told of histories as without a plan
_watching = [0]  # of these, threads in which modules may be one operation
_originals: dict[str, Any] = {}
_replaced: list[tuple[Any, str, Any]] = []  # whose attributes, and what stood there
_hooks_of_all: list[RemovableHandle] = []  # modules
_INHERITED = object()  # stands for an attribute that a class has from another
_C_APPLY: Any = vars(torch._C._FunctionBase)["apply"]
_APPLY_IS_C = vars(Function)["apply"] is _C_APPLY  # since PyTorch 2.14


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Inside, what autograd would differentiate is recorded: grad mode on, autograd keeping numbers of values only."""
    saved: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if hooks_allowed():
        saved = torch.autograd.graph.saved_tensors_hooks(*_hooks(recorder))
    told: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if recorder.history is not None:
        told = _shared(_told, _tell_without_a_plan, _tell_the_truth)
    watched: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if recorder.opaque is not None:
        watched = _shared(_watching, _watch_calls, _unwatch_calls)
    seen = _shared(_recording, _replace, _put_back)
    with seen, told, watched, torch.inference_mode(False), torch.enable_grad(), _eager(), _own_casts(), saved, recorder:
        yield


def _hooks(recorder: Recorder) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Autograd's nodes keep these functions, and the tape keeps tensors with nodes: a reference back would never go."""
    behind = weakref.ref(recorder)
    pack = recorder.packer()

    def unpack(index: int) -> Tensor:
        found = behind()
        if found is None:
            raise TapeError(
                "a tensor that was recorded by hzo has no history for autograd once the recording is gone; take its "
                "gradient by the tape (tape.backward), or compute it again outside hzo.record()"
            )
        return found.unpack(index)

    pack.of_tape = True
    return pack, unpack


@contextlib.contextmanager
def _shared(users: list[int], put: Callable[[], None], put_back: Callable[[], None]) -> Iterator[None]:
    """Replacements that stand for all threads, as long as any of them (``users`` counts these) is inside."""
    with _lock:
        if users[0] == 0:
            put()
        users[0] += 1
    try:
        yield
    finally:
        with _lock:
            users[0] -= 1
            if users[0] == 0:
                put_back()


def _replacements() -> list[tuple[Any, str, Any]]:
    """Whose attribute, its name, and what stands there while anybody records."""
    return [
        # Where it can be, beneath Function.apply, which may have been taken before: f = MyFunction.apply.
        (Function if _APPLY_IS_C else _SingleLevelFunction, "apply", classmethod(_apply)),
        *((FunctionMeta, name, _WatchedMethod(name)) for name in ("forward", "setup_context") if _APPLY_IS_C),
        (FunctionCtx, "set_materialize_grads", _set_materialize_grads),
        (_HookMixin, "_register_hook", staticmethod(_refuse_hook_of_node)),
        (torch._C._autograd, "_push_saved_tensors_default_hooks", _push_hooks),
        (torch.autograd.graph, "disable_saved_tensors_hooks", _without_hooks),
        (module, "BackwardHook", _recorded_hook(module.BackwardHook)),  # type: ignore[attr-defined]
        (Tensor, "register_hook", _register_hook),
        (nn.parallel.DistributedDataParallel, "forward", _wrapped_forward),
        *((torch._VF, name, _step_by_step(name)) for name in _RECURRENT),
        (torch._C._nn, "pad", _pad),
        (torch, "cond", _cond),
        (module_tracker, "register_multi_grad_hook", _unhooked),
        (module, "_has_any_global_hook", _has_hook_of_others),
    ]


def _replace() -> None:
    for owner, name, replacement in _replacements():
        original = vars(owner).get(name, _INHERITED) if isinstance(owner, type) else getattr(owner, name)
        _replaced.append((owner, name, original))
        if original is not _INHERITED:
            _originals[name] = original
        setattr(owner, name, replacement)
    _hooks_of_all.append(module.register_module_forward_pre_hook(_before_call))
    module._global_forward_pre_hooks.move_to_end(_hooks_of_all[0].id, last=False)  # type: ignore[attr-defined]
    # TorchScript's executor would differentiate by itself what it has seen often enough.
    _originals["optimized"] = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    for scripted in _SCRIPTED:
        _originals[scripted.__name__] = scripted.__call__
        scripted.__call__ = _interpreted(scripted.__call__)


def _put_back() -> None:
    _hooks_of_all.pop().remove()
    while _replaced:
        owner, name, original = _replaced.pop()
        if original is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    torch._C._set_graph_executor_optimize(_originals["optimized"])
    for scripted in _SCRIPTED:
        scripted.__call__ = _originals[scripted.__name__]


def _tell_without_a_plan() -> None:
    """What tensors say of their history is what they would say without a plan, as long as any thread needs that. Only
    then: every question of this kind takes a call in Python."""
    for name, attribute in _TOLD.items():
        setattr(Tensor, name, attribute)


def _tell_the_truth() -> None:
    for name in _TOLD:
        delattr(Tensor, name)


def _asked(tensor: Tensor) -> tuple[bool, bool] | None:
    """Of what PyTorch gives a history: is it mere data in the user's eyes, or a leaf; None where neither may be."""
    recorder = current_recorder() if requires_grad(tensor) else None
    if recorder is None or recorder.history is None:
        return None
    data = recorder.stands_in(tensor)
    leaf = recorder.history.is_claimed(tensor)
    return (data, leaf) if data or leaf else None


def _asked_requires_grad(tensor: Tensor) -> bool:
    asked = _asked(tensor)
    return requires_grad(tensor) if asked is None else not asked[0]


def _asked_is_leaf(tensor: Tensor) -> bool:
    return is_leaf(tensor) if _asked(tensor) is None else True


def _asked_grad_fn(tensor: Tensor) -> Any:
    return grad_fn(tensor) if _asked(tensor) is None else None


def _set_requires_grad(tensor: Tensor, wanted: bool = True) -> Tensor:
    """``requires_grad_``: what stands in for data requires a gradient already."""
    recorder = current_recorder()
    if recorder is None or recorder.history is None or _asked(tensor) is None:
        return torch._C.TensorBase.requires_grad_(tensor, wanted)
    recorder.history.claim(tensor, wanted)
    return tensor


def _assign_requires_grad(tensor: Tensor, wanted: bool) -> None:
    _set_requires_grad(tensor, wanted)


_TOLD: dict[str, Any] = {
    "requires_grad": property(_asked_requires_grad, _assign_requires_grad),
    "is_leaf": property(_asked_is_leaf),
    "grad_fn": property(_asked_grad_fn),
    "requires_grad_": _set_requires_grad,
}

_SCRIPTED: tuple[Any, ...] = (torch._C.ScriptFunction, torch._C.ScriptMethod)


def _interpreted(run: Callable[..., Any]) -> Callable[..., Any]:
    """TorchScript that its executor has optimized, and differentiates by itself, forgets that: it is interpreted, so
    that its calls are seen. Autograd compiles it again after some runs."""

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if current_recorder() is not None and _optimized(self):
            self._debug_flush_compilation_cache()
        return run(self, *args, **kwargs)

    return called


def _optimized(scripted: Any) -> bool:
    """Whether an executor has a plan of its own; not known of methods that are no ``forward``."""
    if isinstance(scripted, torch._C.ScriptMethod):
        if scripted.name != "forward":
            return True
        scripted = scripted.owner
    try:
        scripted.get_debug_state()
    except RuntimeError:  # as PyTorch says that there is none
        return False
    return True


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Models that were compiled run as eager; nothing is imported for those that were not."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def _own_casts() -> Iterator[None]:
    """Weights that autocast has cast before have a history from before: cast anew inside, and again behind it."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``Function.apply``: a custom Function is one operation, and its backward is its rule."""
    apply = _C_APPLY.__get__(None, cls)
    recorder = current_recorder()
    if recorder is None or torch._C._are_functorch_transforms_active():  # transforms come by again beneath them
        return apply(*args, **kwargs)
    if cls is torch.utils.checkpoint.CheckpointFunction:
        return _checkpointed(args[0], *args[2:])
    if not torch.is_grad_enabled():
        return apply(*args, **kwargs)
    before = {id(a): recorder.read(a) for a in args if isinstance(a, Tensor) and requires_grad(a)}
    outer, recorder.applying = recorder.applying, cls
    try:
        result = apply(*args, **kwargs)
    finally:
        recorder.applying = outer
    if before:
        CustomFunction.record(recorder, args, before, result)
    return result


class _WatchedMethod:
    """A method of custom Functions, on their metaclass: ``forward``, or ``setup_context`` of those that have their own.

    An ``apply`` of C that was taken before the recording calls these: they tell the tape what it was given.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, cls: Any, _: Any = None) -> Any:
        if cls is None:
            return self
        method = self._of(cls, self.name)
        recorder = current_recorder()
        splits = self._of(cls, "setup_context") is not _SingleLevelFunction.__dict__["setup_context"].__func__
        if recorder is None or recorder.paused or splits is not (self.name == "setup_context"):
            return method

        def told(*args: Any, **kwargs: Any) -> Any:
            node: Any = args[0] if args else None
            if recorder.applying is cls or getattr(node, "_forward_cls", None) is not cls or not node.next_functions:
                return method(*args, **kwargs)  # seen already; the user's own call; or one without a derivative
            given = args[1] if splits else args[1:]
            values = UnseenCall.arguments(recorder, given)
            result = method(*args, **kwargs)
            UnseenCall.note(recorder, node, given, values, args[2] if splits else result)
            return result

        return told

    @staticmethod
    def _of(function: Any, name: str) -> Any:
        for owner in function.__mro__:
            if name in vars(owner):
                return vars(owner)[name].__get__(None, function)
        raise AttributeError(f"{function.__name__} has no {name}")

    def __set__(self, cls: Any, value: Any) -> None:  # as libraries do that write a Function for each operator
        with _lock:
            delattr(FunctionMeta, self.name)
            try:
                setattr(cls, self.name, value)
            finally:
                setattr(FunctionMeta, self.name, self)


def _checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """Reentrant checkpointing: the tape needs no second run. Where no input has a gradient, nothing inside has one."""
    with torch.set_grad_enabled(any(isinstance(a, Tensor) and a.requires_grad for a in args)):
        return function(*args)


def _set_materialize_grads(self: Any, value: bool) -> None:
    """A Function may want to see which of its results have no cotangent; PyTorch has no way to ask it back."""
    _originals["set_materialize_grads"](self, value)
    self.hzo_materialize = value


def _refuse_hook_of_node(hooks: Any, hook: Callable[..., Any]) -> Any:
    """``grad_fn.register_hook``: PyTorch hands the hook to autograd's engine, which never runs."""
    if current_recorder() is not None:
        name = getattr(hook, "__qualname__", type(hook).__name__)
        raise TapeError(
            f"the hook {name} hangs on a node of autograd (grad_fn.register_hook, or Module.register_backward_hook), "
            "whose engine never runs here; register it on the tensor (tensor.register_hook), or by "
            "Module.register_full_backward_hook"
        )
    return _originals["_register_hook"].__func__(hooks, hook)


def _push_hooks(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
    """Where saved tensors would go to another place or be computed again (``save_on_cpu``, checkpointing), the tape
    keeps them as it keeps others: hooks of the user's that pack them are not asked."""
    recorder = current_recorder()
    if recorder is not None and not recorder.hooks_off and not hasattr(pack, "of_tape"):
        pack, unpack = _hooks(recorder)
    _originals["_push_saved_tensors_default_hooks"](pack, unpack)


@contextlib.contextmanager
def _without_hooks(message: str) -> Iterator[None]:
    """Transforms of torch.func do not support hooks on saved tensors: they run without the tape's."""
    recorder = current_recorder()
    if recorder is None:
        with _originals["disable_saved_tensors_hooks"](message):
            yield
        return
    torch._C._autograd._pop_saved_tensors_default_hooks()
    outer, recorder.hooks_off = recorder.hooks_off, True  # autograd does not tell what it saves
    recorder.hooks_were_off = True
    try:
        with _originals["disable_saved_tensors_hooks"](message):
            yield
    finally:
        recorder.hooks_off = outer
        torch._C._autograd._push_saved_tensors_default_hooks(*_hooks(recorder))


def _register_hook(self: Tensor, hook: Callable[[Tensor], Any]) -> Any:
    """A hook of a tensor runs when the sweep comes by, whoever has forgotten the tensor by then."""
    recorder = current_recorder()
    if recorder is not None:
        recorder.hooked.append(self)
    return _originals["register_hook"](self, hook)


def _wrapped_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    _note_wrapper(self)
    return _originals["forward"](self, *args, **kwargs)


def _note_wrapper(model: nn.Module) -> None:
    """A model spread over processes says so to the recording: its gradients would be averaged by hooks of autograd."""
    recorder = current_recorder()
    if recorder is None or not model.require_backward_grad_sync:
        return
    if recorder.history is not None:
        name = type(model).__name__
        raise DistributedError(
            f"a module wrapped in {name} ran inside of a model that is planned for, and its gradients are averaged "
            "over the processes by hooks of autograd; wrap the whole model, or have hzo work inside of the wrapper: "
            f"{name}(hzo.module(part)), then loss.backward()"
        )
    recorder.wrappers.append(model)


def refuse_transforms() -> None:
    """What hzo does looks at values, which tensors under a transform of ``torch.func`` do not show.

    Raises:
        TapeError: called inside of ``torch.vmap``, ``torch.func.grad`` or their like.
    """
    if maybe_current_level() is not None:
        raise TapeError(
            "hzo.record, hzo.backward and hzo.trace do not run inside torch.func or torch.vmap; put the transform "
            "inside of the block: with hzo.record() as tape: loss = torch.vmap(f)(x).mean()"
        )


_HOOKS_BESIDE = ("_global_backward_pre_hooks", "_global_backward_hooks", "_global_forward_hooks")
_SHARDING = {
    "torch.distributed.fsdp",
    "deepspeed",
    "torch.distributed._composable.replicate",
}  # where wrappers are from


_OF_TORCH = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def _before_call(called: nn.Module, _: Any) -> None:
    """Before a module's own hooks run: what it holds is noted, for a step that fails; a wrapper is refused, whose hooks
    wait for other processes.

    A hook of PyTorch's for all modules: writing to ``nn.Module`` itself would make Python forget, twice a step, what it
    knows of every class of modules.
    """
    recorder = current_recorder()
    if recorder is None:
        return
    _note(recorder, called)
    if recorder.opaque is None and torch.is_grad_enabled() and is_declared(called):
        raise TapeError(
            f"{type(called).__name__} was declared as one operation (hzo.declare), which hzo.record() does not know; "
            "call hzo.backward(model, loss_fn, x, y), which plans for it, or make it a black box: hzo.blackbox"
        )


def others_watch_calls() -> bool:
    """Whether a hook other than the recording's runs before the forward of every module."""
    return len(module._global_forward_pre_hooks) > len(_hooks_of_all)


def _has_hook_of_others() -> bool:
    """Compiled modules warn of hooks for all modules, which run twice for them; the recording's own may."""
    return others_watch_calls() or any(getattr(module, name) for name in _HOOKS_BESIDE)


def _note(recorder: Recorder, called: nn.Module) -> None:
    recorder.undo.remember_called(called)
    if isinstance(called, _OF_TORCH):
        if isinstance(called, nn.DataParallel):
            refuse_running(called)
        else:  # whose forward may have been replaced
            _note_wrapper(called)
    if _SHARDING & sys.modules.keys():
        refuse_running(called)


def _called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``Module.__call__``: a module that is one operation runs out of the recorder's sight."""
    recorder = current_recorder()
    if recorder is not None and recorder.opaque is not None:
        name = recorder.opaque(self)
        if name is not None:
            _note(recorder, self)
            return call_opaque(recorder, self, name, args, kwargs)
    return _originals["__call__"](self, *args, **kwargs)


def _watch_calls() -> None:
    """Modules may be one operation, as long as any thread records for a plan."""
    _originals["__call__"] = nn.Module.__call__
    nn.Module.__call__ = _called  # type: ignore[method-assign]


def _unwatch_calls() -> None:
    nn.Module.__call__ = _originals["__call__"]  # type: ignore[method-assign]


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """Circular padding as copies of both edges put together, where PyTorch writes them into a new tensor in place."""
    sizes = [size for size in reversed(x.shape[2:]) for _ in range(2)]
    plain = len(pad) == len(sizes) and all(0 <= p <= size for p, size in zip(pad, sizes, strict=True))
    if mode != "circular" or not plain or current_recorder() is None:  # what does not fit raises there
        padded: Tensor = _originals["pad"](x, pad, mode, value)
        return padded
    for k in range(len(pad) // 2):
        before, behind = pad[2 * k : 2 * k + 2]
        dim, size = x.dim() - 1 - k, x.shape[-1 - k]
        if before or behind:
            x = torch.cat([x.narrow(dim, size - before, before), x, x.narrow(dim, 0, behind)], dim)
    return x


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    """``torch.cond`` runs as eager, too: PyTorch would compile it."""
    if current_recorder() is None:
        return _originals["cond"](pred, true_fn, false_fn, operands)
    return true_fn(*operands) if pred else false_fn(*operands)


def _unhooked(tensors: Sequence[Tensor], hook: Callable[..., Any], **how: Any) -> Any:
    """What counts by module (``FlopCounterMode``) learns by hooks where the backward pass stands, which never runs."""
    if current_recorder() is None:
        return _originals["register_multi_grad_hook"](tensors, hook, **how)
    return RemovableHandle(OrderedDict())


_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell")


def _step_by_step(name: str) -> Callable[..., Any]:
    """A recurrent layer out of the operators it is made of, where no operator computes it that has a rule.

    oneDNN's LSTM has one. Its weights are measured by what it returns, which takes float32; transforms of torch.func
    do not know it. Other LSTMs, GRUs, and cells of both have one operation a step besides the products with weights.
    Plans, which run slices of the graph at other states, see all operators.
    """

    def layer(*args: Any, **kwargs: Any) -> Any:
        original = _originals[name]
        recorder = current_recorder()
        if recorder is None:
            return original(*args, **kwargs)
        plain = not torch.is_autocast_enabled("cpu") and maybe_current_level() is None
        onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
        whole = name == "lstm" and args[0].dtype == torch.float32 and plain
        by_cells = plain and not recorder.keeps_all and torch.is_grad_enabled() and recurrent.fits(name, args, kwargs)
        if by_cells and not (whole and onednn and recurrent.onednn_takes(args)):
            return recurrent.RUNS[name](*args)
        torch._C._set_mkldnn_enabled(onednn and (whole or name != "lstm"))  # of these it has the LSTM alone
        torch._C._set_cudnn_enabled(False)
        try:
            return original(*args, **kwargs)
        finally:
            torch._C._set_mkldnn_enabled(onednn)
            torch._C._set_cudnn_enabled(cudnn)

    return layer


@cache
def _recorded_hook(original: type[Any]) -> type[Any]:
    """Backward hooks of modules hang on a Function of PyTorch's; the tape keeps them with its operation."""

    class RecordedBackwardHook(original):  # type: ignore[misc]
        def _apply_on_tensors(self, fn: Callable[[Any], None], args: Any) -> Any:
            recorder = current_recorder()
            if recorder is None:
                return super()._apply_on_tensors(fn, args)
            return super()._apply_on_tensors(lambda node: fn(NodeHooks.of(node)), args)

    return RecordedBackwardHook

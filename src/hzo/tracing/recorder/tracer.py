"""``trace``: from a model and an input to a chain.

The model is recorded twice, with the batch and with one sample more (recording.py), and the two become one graph
(merge_recordings.py). Then every operation is run by itself to learn what the engine must know of it
(operation_properties.py): whether it repeats, whether it keeps samples apart, which buffers it moves, what it costs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from hzo._options import function
from hzo.distributed import refuse_all_wrappers
from hzo.errors import InputError, TraceError
from hzo.execution import contained, counting
from hzo.tracing import Chain, Stages, tensors_in, untouched
from hzo.tracing.recorder.merge_recordings import link
from hzo.tracing.recorder.operation_properties import inspect_operations
from hzo.tracing.recorder.recording import ReadsValuesError, Recorder, Recording

_ONE_AT_A_TIME = threading.RLock()  # a recording patches nn.Module while it lasts
_SAMPLES = 4  # enough to tell samples apart; what is learned holds for any number of them
_OPTIONS = (bool, float, str)


def trace(model: nn.Module | Chain | Callable[..., Any], x: Any) -> Chain:
    """Record how ``model`` computes, as a chain of stages.

    The children of an ``nn.Sequential`` and the callables of a ``hzo.Chain`` are the stages, and are looked into.
    Any other module is cut at every boundary where a single tensor is alive. A stage that looks at values (NumPy,
    data-dependent branches) becomes one opaque operation, whose parameters are perturbed.

    Args:
        model: a module, or a chain made by hand.
        x: a tensor with the batch first; a tuple is passed as positional, a dict as keyword arguments. A leaf that
            requires a gradient gets one, as a parameter does.

    Cost: about six forward passes of at most four samples, counted as ``check_evaluations``. Buffers, random state and
    training flags are as before. Source: ours.

    Raises:
        TraceError: what the model does depends on the data or in an unknown way on the batch size.
        InputError: empty or unequal batches.
        NondeterministicError: see ``hzo.plan``, which decides.
    """
    if not isinstance(model, Chain):
        function("the model", model)
    module = model.model if isinstance(model, Chain) else model if isinstance(model, nn.Module) else Stages([model])
    refuse_all_wrappers(
        module,
        "trace the model inside of it (model.module). A plan made of that goes with the wrapped model: "
        "hzo.backward(model, loss_fn, x, y, plan=plan) averages",
    )
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        raise InputError("the model has parameters without a shape yet (LazyLinear, ...); run it once: model(x)")
    _refuse_hidden(module)
    args, kwargs = call_arguments(x)
    nominal = batch_size(args, kwargs)
    batch = min(nominal, _SAMPLES)
    # Inputs are the first values of a recording.
    differentiated = tuple(k for k, t in enumerate(tensors_in((args, kwargs))) if requires_gradient(t))
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t[:batch], (args, kwargs))
    larger = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t[:1]]), (args, kwargs))
    # Outside inference mode, whose tensors do not say when they are written to.
    trial = counting.doing(counting.TRIAL_RUN)
    with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad(), contained([module]), trial:
        opaque: frozenset[int] = frozenset()
        first, opaque = record(module, args, kwargs, opaque)
        second, opaque = record(module, larger[0], larger[1], opaque)
        graph = link(module, first, second, batch, named=stages_of(module) is not None)
        graph = replace(graph, nominal_batch=nominal, signature=signature(module, x), differentiated=differentiated)
        graph = inspect_operations(graph, [t.detach() for t in tensors_in((args, kwargs))])
    return Chain(module, graph)


def _refuse_hidden(module: nn.Module) -> None:
    """Parts whose inside cannot be seen, and which would need more than one look."""
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TraceError(
                f"{name or 'the model'} is TorchScript, whose inside a plan cannot see; use the Python module that "
                "it was made of, make it a black box (hzo.blackbox), or take the gradient without a plan "
                "(hzo.backward(model, ...))"
            )


def call_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with ``x``: a tuple or list as positional, a dict as keyword arguments."""
    if isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence):
        return tuple(x), {}
    if isinstance(x, dict):
        return (), x
    return (x,), {}


def requires_gradient(tensor: Tensor) -> bool:
    """Whether an input is asked for a gradient: a leaf, as for autograd; what hangs on another graph counts as data."""
    return tensor.requires_grad and tensor.is_leaf and tensor.is_floating_point()


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The size of dimension 0, which all input tensors share."""
    if any(isinstance(given, PackedSequence) for given in (*args, *kwargs.values())):
        raise InputError(
            "a PackedSequence holds no batch in dimension 0, which a plan needs; pack inside the model, or take the "
            "gradient without a plan (hzo.backward(model, ...) or hzo.record())"
        )
    tensors = tensors_in((args, kwargs))
    if not tensors:
        raise InputError("expected a tensor with the batch first among the model's inputs, got none")
    sizes = {tuple(t.shape[:1]) for t in tensors}
    if len(sizes) != 1 or () in sizes:
        shapes = [tuple(t.shape) for t in tensors]
        raise InputError(f"expected inputs with one batch size in dimension 0, got shapes {shapes}")
    (size,) = sizes.pop()
    if size == 0:
        raise InputError("got a batch of zero samples; a gradient needs at least one")
    return int(size)


def signature(module: nn.Module, x: Any) -> tuple[Any, ...]:
    """What a trace depends on: modules and their modes, trainable parameters, inputs but for their batch size."""
    args, kwargs = call_arguments(x)
    flat, structure = pytree.tree_flatten((args, kwargs))
    inputs = tuple(
        (tuple(t.shape[1:]), t.dtype, str(t.device), requires_gradient(t)) if isinstance(t, Tensor) else repr(t)
        for t in flat
    )
    # What a forward pass branches on in Python is recorded as it was; whole numbers are left out, as calls are counted.
    modules = tuple(
        (id(m), untouched(m), *((k, v) for k, v in vars(m).items() if type(v) in _OPTIONS)) for m in module.modules()
    )
    # Which parameters are one and the same matters, not which tensors hold their values: those may be swapped.
    first: dict[int, int] = {}
    trainable = tuple(
        (first.setdefault(id(p), k), p.requires_grad, p.dtype, tuple(p.shape))
        for k, (_, p) in enumerate(module.named_parameters(remove_duplicate=False))
    )
    device = tensors_in((args, kwargs))[0].device.type if tensors_in((args, kwargs)) else "cpu"
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (str(structure), inputs, modules, trainable, autocast)


def record(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opaque: frozenset[int]
) -> tuple[Recording, frozenset[int]]:
    """Record one forward pass; stages that read values are recorded again as opaque calls."""
    while True:
        recorder = Recorder(module, opaque)
        # Clones, since a model may change its input in place.
        copy_args, copy_kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        inputs = tensors_in((copy_args, copy_kwargs))
        recorder.recording.inputs = tuple(recorder.new_value(t, varying=True) for t in inputs)
        with contained([module]):
            again = run_stages(module, recorder, copy_args, copy_kwargs)
        if again is None:
            return recorder.recording, opaque
        opaque = opaque | {again}


def stages_of(module: nn.Module) -> list[tuple[str, Callable[..., Any]]] | None:
    """The stages that a model names itself, or None."""
    if isinstance(module, Stages):
        return [(f"{k}:{getattr(s, '__name__', type(s).__name__)}", s) for k, s in enumerate(module.callables)]
    if type(module) is nn.Sequential and len(module) and untouched(module):
        # Not named_children, which leaves out a child that stands there a second time.
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        return [(f"{name}:{type(child).__name__}", child) for name, child in children]
    return None


def run_stages(module: nn.Module, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Run the model under the recorder. Returns the identity of a stage that must be made opaque, if any."""
    stages = stages_of(module)
    whole = stages is None
    result: Any = None
    for k, (name, stage) in enumerate(stages or [(type(module).__name__, module)]):
        try:
            with recorder.watching():
                if id(stage) in recorder.opaque and not isinstance(stage, nn.Module):
                    with recorder.pause():
                        result = recorder.record(stage, name, args, kwargs, own=True)
                else:
                    result = stage(*args, **kwargs)
        except ReadsValuesError as error:
            if whole or id(stage) in recorder.opaque:
                raise TraceError(f"{name}: {error}") from None
            return id(stage)
        except TraceError as error:
            raise TraceError(f"{name}: {error}") from None
        if recorder.stops_gradients is not None:
            raise TraceError(f"{name}: {recorder.stops_gradients}")
        recorder.recording.stages.append((name, len(recorder.recording.calls)))
        spread = isinstance(result, tuple) and isinstance(module, Stages)
        args, kwargs = (tuple(result) if spread else (result,)), {}
        del k
    recorder.check_buffers()
    recorder.recording.output = pytree.tree_map_only(Tensor, recorder.refer, result)
    return None

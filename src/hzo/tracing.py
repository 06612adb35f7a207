"""``trace``: from a model and an input to a chain.

The model is recorded twice, with the batch and with one sample more. What differs between the two is what depends on
the batch size; what cannot be explained by it cannot be a chain, and is an error. Then every operation is run by
itself to learn what the engine must know of it: whether it repeats, whether it keeps samples apart, which buffers it
moves, what it costs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo import queries
from hzo.chain import Chain, Stages
from hzo.errors import InputError, TraceError
from hzo.graph import (
    Attribute,
    Extent,
    Graph,
    Operation,
    ParameterUse,
    Ref,
    Stage,
    Value,
    leaves,
    map_arguments,
    tensors_in,
)
from hzo.inspection import inspect_operations
from hzo.recording import Call, ReadsValuesError, Recorder, Recording
from hzo.side_effects import contained
from hzo.structure import untouched

_ONE_AT_A_TIME = threading.RLock()  # a recording patches nn.Module while it lasts
_SAMPLES = 4  # enough to tell samples apart; what is learned holds for any number of them
_OPTIONS = (bool, float, str)
_NEW = ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")  # take dtype and device from a tensor, no more
BY_HAND = "give the stages by hand: hzo.Chain([f1, f2, ...]), each a callable from tensor(s) to tensor(s)"


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
    module = model.model if isinstance(model, Chain) else model if isinstance(model, nn.Module) else Stages([model])
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        raise InputError("the model has parameters without a shape yet (LazyLinear, ...); run it once: model(x)")
    args, kwargs = call_arguments(x)
    nominal = batch_size(args, kwargs)
    batch = min(nominal, _SAMPLES)
    # Inputs are the first values of a recording.
    differentiated = tuple(k for k, t in enumerate(tensors_in((args, kwargs))) if requires_gradient(t))
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t[:batch], (args, kwargs))
    larger = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t[:1]]), (args, kwargs))
    # Outside inference mode, whose tensors do not say when they are written to.
    trial = queries.doing(queries.TRIAL_RUN)
    with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad(), contained([module]), trial:
        opaque: frozenset[int] = frozenset()
        first, opaque = record(module, args, kwargs, opaque)
        second, opaque = record(module, larger[0], larger[1], opaque)
        graph = link(module, first, second, batch)
        graph = replace(graph, nominal_batch=nominal, signature=signature(module, x), differentiated=differentiated)
        graph = inspect_operations(graph, [t.detach() for t in tensors_in((args, kwargs))])
    return Chain(module, graph)


def call_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with ``x``: a tuple or list as positional, a dict as keyword arguments."""
    if isinstance(x, (tuple, list)):
        return tuple(x), {}
    if isinstance(x, dict):
        return (), x
    return (x,), {}


def requires_gradient(tensor: Tensor) -> bool:
    """Whether an input is asked for a gradient: a leaf, as for autograd; what hangs on another graph counts as data."""
    return tensor.requires_grad and tensor.is_leaf and tensor.is_floating_point()


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The size of dimension 0, which all input tensors share."""
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
    modules = tuple((id(m), *((k, v) for k, v in vars(m).items() if type(v) in _OPTIONS)) for m in module.modules())
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


def link(module: nn.Module, first: Recording, second: Recording, batch: int) -> Graph:
    """Make a graph of two recordings of batches that differ by one sample."""
    if [c.name for c in first.calls] != [c.name for c in second.calls]:
        raise TraceError(f"the forward pass does different things for {batch} and {batch + 1} samples; {BY_HAND}")
    dependent = [False] * len(first.tensors)  # on the inputs or on the batch size
    derived = [False] * len(first.tensors)  # from a trainable parameter, and not dependent
    for value in first.inputs:
        dependent[value] = True
    operations: list[Operation] = []
    names = {id(p): name for name, p in module.named_parameters()}
    for index, (a, b) in enumerate(zip(first.calls, second.calls, strict=True)):
        args, kwargs = _merge((a.args, a.kwargs), (b.args, b.kwargs), batch, a.name)
        found = list(leaves((args, kwargs)))
        reads = tuple(dict.fromkeys(leaf.value for leaf in found if isinstance(leaf, Ref)))
        depends = a.name not in _NEW and any(dependent[value] for value in reads)
        batched = depends or any(isinstance(leaf, Extent) for leaf in found)
        uses = parameter_uses(a, args, kwargs, names, [v for v in reads if derived[v]])
        for value in a.writes:
            dependent[value] = batched
            derived[value] = not batched and bool(uses)
        operations.append(
            Operation(index, a.name, a.target, args, kwargs, reads, a.writes, uses, batched, a.mutates, a.random)
        )
    producer = {value: op.index for op in operations for value in op.writes}
    values = []
    for index, (t1, t2) in enumerate(zip(first.tensors, second.tensors, strict=True)):
        maker = first.calls[producer[index]].name if index in producer else "the input"
        dim = _batch_dim(t1, t2, batch, maker) if dependent[index] else None
        if dim is not None and t1.is_complex():
            raise TraceError(
                f"{maker} makes a complex tensor, which has no cotangent here; wrap the part in hzo.blackbox"
            )
        values.append(Value(index, tuple(t1.shape), t1.dtype, dim, producer.get(index, -1), batch))
    graph = Graph(tuple(operations), tuple(values), first.inputs, first.output, (), batch, batch, ())
    outputs = pytree.tree_leaves(first.output)
    if not any(isinstance(leaf, Ref) and dependent[leaf.value] for leaf in outputs):
        raise TraceError("the model's output is not computed from its input by torch calls; " + BY_HAND)
    for leaf in outputs:
        trainable = isinstance(leaf, Attribute) and leaf.get().requires_grad
        if trainable or (isinstance(leaf, Ref) and derived[leaf.value]):
            raise TraceError(
                "the model returns a tensor made of parameters alone (a penalty, say), whose gradient would be lost; "
                "let the optimizer decay the weights, or add the penalty's gradient after hzo.backward"
            )
    stages = _named_stages(first) if stages_of(module) is not None else _cut(graph)
    return replace(graph, stages=stages)


def parameter_uses(
    call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], names: dict[int, str], derived: Sequence[int]
) -> tuple[ParameterUse, ...]:
    """The trainable operands of a call: parameters of its module, parameters among its arguments, derived values."""
    uses = []
    if isinstance(call.target, nn.Module):
        for path_and_name, parameter in call.target.named_parameters():
            path, _, attribute = path_and_name.rpartition(".")
            where = Attribute(call.target.get_submodule(path), attribute)
            if parameter.requires_grad:
                name = _name_of(parameter, f"{call.name}.{path_and_name}", names)
                uses.append(ParameterUse(path_and_name, name, where))
    operands: dict[Attribute | Ref, list[int | str | None]] = {}
    for slots, nested in ((enumerate(args), args), (kwargs.items(), kwargs)):
        top: dict[int, int | str] = {id(leaf): slot for slot, leaf in slots}
        for leaf in leaves(nested):
            if isinstance(leaf, Attribute) or (isinstance(leaf, Ref) and leaf.value in derived):
                operands.setdefault(leaf, []).append(top.get(id(leaf)))
    for operand, found in operands.items():
        slot = found[0] if len(found) == 1 and not isinstance(call.target, nn.Module) else None
        if isinstance(operand, Ref):
            uses.append(ParameterUse(slot, "", operand))
        elif operand.get().requires_grad:
            name = _name_of(operand.get(), f"{call.name}.{operand.name}", names)
            uses.append(ParameterUse(slot, name, operand))
    return tuple(uses)


def _name_of(parameter: Tensor, proposed: str, names: dict[int, str]) -> str:
    """The model's name for a parameter; one of our own, and unique, for a layer that the model has not registered."""
    if id(parameter) not in names:
        taken = set(names.values())
        candidates = (proposed, *(f"{proposed}.{k}" for k in range(len(taken) + 1)))
        names[id(parameter)] = next(name for name in candidates if name not in taken)
    return names[id(parameter)]


def _merge(one: Any, other: Any, batch: int, name: str) -> Any:
    """The arguments of one call for any batch size, from those for ``batch`` and ``batch + 1`` samples."""
    others = iter(list(leaves(other)))

    def pair(a: Any) -> Any:
        b = next(others)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape == b.shape and torch.equal(a, b):
                return a
            raise TraceError(f"{name} uses a tensor that changes with the input in a way not seen; {BY_HAND}")
        if type(a) is int and type(b) is int and a != b:
            if a * (batch + 1) == b * batch and a % batch == 0:
                return Extent(a // batch)
            raise TraceError(
                f"{name} gets {a} for {batch} samples and {b} for {batch + 1}, not a multiple of the batch size, so "
                f"samples cannot be told apart; {BY_HAND}"
            )
        if a is b or a == b:
            return a
        raise TraceError(f"{name} gets {a!r} for {batch} samples and {b!r} for {batch + 1}; {BY_HAND}")

    return map_arguments(pair, one)


def _batch_dim(a: Tensor, b: Tensor, batch: int, name: str) -> int:
    """The dimension that grows with the batch; exactly one, by a multiple."""
    differ = [d for d in range(a.dim()) if a.dim() == b.dim() and a.shape[d] != b.shape[d]]
    if len(differ) == 1 and a.shape[differ[0]] * (batch + 1) == b.shape[differ[0]] * batch:
        return differ[0]
    raise TraceError(
        f"{name} gives shape {tuple(a.shape)} for {batch} samples and {tuple(b.shape)} for {batch + 1}: expected one "
        "dimension to grow in proportion. Either samples are mixed (a mean over the batch), or the shape depends on "
        f"values; {BY_HAND}"
    )


def _named_stages(recording: Recording) -> tuple[Stage, ...]:
    stops = [stop for _, stop in recording.stages]
    return tuple(
        Stage(name, start, stop) for (name, stop), start in zip(recording.stages, [0, *stops[:-1]], strict=True)
    )


def _cut(graph: Graph) -> tuple[Stage, ...]:
    """Stages between the boundaries at which a single tensor is alive, the model's inputs aside."""

    def single(position: int) -> bool:
        alive = [v for v in graph.live[position] if graph.values[v].floating and v not in graph.inputs]
        return len(alive) == 1 and graph.operations[position - 1].batched

    end = len(graph.operations)
    cuts = [0, *(p for p in range(1, end) if single(p)), end]
    stages = []
    for start, stop in pairwise(cuts):
        inside: Iterable[str] = dict.fromkeys(op.name for op in graph.operations[start:stop] if op.batched)
        listed = list(inside)
        stages.append(Stage(listed[0] if len(listed) == 1 else f"{listed[0]}…{listed[-1]}", start, stop))
    return tuple(stages)

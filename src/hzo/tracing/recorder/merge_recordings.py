"""Two recordings of one model, of batches that differ by one sample, become a graph.

What differs between them is what depends on the batch size; what cannot be explained by it cannot be a chain, and is an
error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo.errors import TraceError
from hzo.tracing import Attribute, Extent, Graph, Operation, ParameterUse, Ref, Stage, Value, leaves, map_arguments
from hzo.tracing.recorder.recording import Call, Recording

_NEW = ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")  # take dtype and device from a tensor, no more
BY_HAND = "give the stages by hand: hzo.Chain([f1, f2, ...]), each a callable from tensor(s) to tensor(s)"


def link(module: nn.Module, first: Recording, second: Recording, batch: int, *, named: bool) -> Graph:
    """Make a graph of two recordings, of ``batch`` samples and of one more.

    ``named``: the model names its stages, so the recording's are taken; else the graph is cut where it is narrow.
    """
    if [c.name for c in first.calls] != [c.name for c in second.calls]:
        raise TraceError(
            f"the forward pass does different things for {batch} and {batch + 1} samples. If it makes a table at its "
            f"first call and keeps it, run the model once before; otherwise {BY_HAND}"
        )
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
    stages = _named_stages(first) if named else _cut(graph)
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
            if torch._C._functorch.is_functorch_wrapped_tensor(a):
                raise TraceError(
                    f"{name} runs inside torch.vmap or torch.func, where a plan cannot follow it; take the gradient "
                    "without a plan (hzo.backward(model, ...) or hzo.record()), or make the part a black box "
                    "(hzo.blackbox)"
                )
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

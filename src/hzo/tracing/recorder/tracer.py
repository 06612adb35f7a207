"""``trace``: from a model and an input to a chain.

The model is recorded once (run.py), and every operation is run again by itself to learn what plans must know of it:
where its samples stand and whether it keeps them apart (sample_axes.py), what its rule measures, what it costs
(properties.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo._options import function, whole
from hzo.distributed import refuse_all_wrappers
from hzo.errors import HzoError, TraceError
from hzo.execution import contained, counting
from hzo.tape import Ref, Tape
from hzo.tape.surroundings import refuse_transforms
from hzo.tracing import (
    Chain,
    Graph,
    GraphValue,
    Stage,
    Stages,
    batch_size,
    call_arguments,
    check_dense,
    keep,
    output_leaves,
    requires_gradient,
    signature,
)
from hzo.tracing.recorder.properties import finite_values, inspect
from hzo.tracing.recorder.run import OutOfSight, RecordedRun, check_tensors, recorded, stages_of
from hzo.tracing.recorder.sample_axes import batched_values

_ONE_AT_A_TIME = threading.RLock()
_SAMPLES = 4  # enough to tell samples apart; what is learned holds for any number of them
BY_HAND = "give the stages by hand: hzo.Chain([f1, f2, ...]), each a callable from tensor(s) to tensor(s)"


def trace(model: nn.Module | Chain | Callable[..., Any], x: Any, *, samples: int | None = None) -> Chain:
    """Run a model on a batch and record its operations as a chain of stages, for which ``hzo.plan`` can plan.

    The children of an ``nn.Sequential`` and the callables of a ``hzo.Chain`` are the stages, and are looked into.
    Any other module is cut wherever a single tensor carries all that later operations need. A stage that looks at
    values (NumPy) becomes one opaque operation, whose parameters are perturbed.

    Args:
        model: a module, or a chain made by hand.
        x: a tensor with the batch first; a tuple is passed as positional, a dict as keyword arguments. A leaf that
            requires a gradient gets one, as a parameter does.
        samples: how many samples of ``x`` to run; None takes four, or two copies of a single one, and all where the
            model does not take so many.

    Cost: about five forward passes of at most four samples, counted as ``check_evaluations``. Buffers, random state and
    training flags are as before. Source: ours.

    Raises:
        TraceError: what the model does cannot be recorded. InputError: empty or unequal batches.
        NondeterministicError: see ``hzo.plan``, which decides.
    """
    refuse_transforms()
    if not isinstance(model, Chain):
        function("the model", model)
    module = model.model if isinstance(model, Chain) else model if isinstance(model, nn.Module) else Stages([model])
    refuse_all_wrappers(
        module,
        "trace the model inside of it (model.module). A plan made of that goes with the wrapped model: "
        "hzo.backward(model, loss_fn, x, y, plan=plan) averages",
    )
    check_tensors(module)
    check_dense(x)
    if samples is not None:
        whole("samples", samples, "None takes four")
    nominal = batch_size(*call_arguments(x))
    trial = counting.doing(counting.TRIAL_RUN)
    with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad(), contained([module]), trial:
        graph = _graph_of_some(module, x, nominal) if samples is None else _graph(module, x, samples)
    chain = Chain(module, replace(graph, nominal_batch=nominal, signature=signature(module, x)))
    keep(chain)
    return chain


def chain_of(module: nn.Module, run: RecordedRun, about: tuple[Any, ...]) -> Chain:
    """The chain of a model that was recorded for a step, with its loss or without: its user's code does not run again.

    Args:
        run: recorded with ``follow=True``. about: the signature of module and input, from before the run.

    Cost: about four forward passes of the batch, operation by operation, counted as ``check_evaluations``.
    Raises: as ``trace``.
    """
    batch = batch_size(run.given, {})
    trial = counting.doing(counting.TRIAL_RUN)
    with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad(), contained([module]), trial:
        graph = graph_of(module, run, batch)
    return Chain(module, replace(graph, signature=about))


def _graph_of_some(module: nn.Module, x: Any, nominal: int) -> Graph:
    """The graph of so many samples as tell them apart; of one where PyTorch runs other calls for that."""
    samples = max(2, min(nominal, _SAMPLES))
    try:
        graph = _graph(module, x, samples)
    except HzoError:
        raise
    except Exception:
        if nominal == samples:
            raise
        return _graph(module, x, nominal)
    if nominal > 1:
        return graph
    args, kwargs = call_arguments(x)
    with recorded(module, args, kwargs, opaque=graph.opaque_stages) as run:
        pass
    run.recorder.undo.restore()
    made = [(op.target, op.writes) for op in run.tape.operations[: run.end]]
    return graph if made == [(op.target, op.results) for op in graph.operations] else _graph(module, x, 1)


def _graph(module: nn.Module, x: Any, samples: int) -> Graph:
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: _first(t, samples), call_arguments(x))
    opaque: frozenset[int] = frozenset()
    known = {id(p) for p in module.parameters()}
    while True:
        try:
            with recorded(module, args, kwargs, follow=True, opaque=opaque) as run:
                pass
        except OutOfSight as found:
            opaque = opaque | {id(found.stage)}
            continue
        try:  # operations run again on what they read: what the model wrote to is put back behind that
            made = [name for name, p in module.named_parameters() if id(p) not in known]
            if made:
                raise TraceError(
                    f"the model makes parameters in its first forward pass ({', '.join(made[:3])}), which a trace "
                    "undoes; run it once before: model(x)"
                )
            graph = graph_of(module, run, samples)
            counting.add(check_evaluations=len(graph.stages) * samples)
            return graph
        finally:
            run.recorder.undo.restore()


def _first(tensor: Tensor, samples: int) -> Tensor:
    if tensor.shape[0] >= samples:
        found = tensor[:samples]
    else:
        found = torch.cat([tensor] * -(-samples // tensor.shape[0]))[:samples]
    found = found.detach()
    return found.requires_grad_() if requires_gradient(tensor) else found


def leaf_names(module: nn.Module, tape: Tape, count: int) -> dict[int, str]:
    """The names of the trainable leaves among the first values: the model's, or one of our own for any other."""
    names = {id(p): name for name, p in module.named_parameters()}
    found: dict[int, str] = {}
    for value, tensor in tape.leaves.items():
        if value < count and tensor.requires_grad:
            key = id(tensor)
            if key not in names:
                taken = set(names.values())
                candidates = (f"unregistered.{k}" for k in range(len(taken) + 1))
                names[key] = next(name for name in candidates if name not in taken)
            found[value] = names[key]
    return found


def graph_of(module: nn.Module, run: RecordedRun, batch: int) -> Graph:
    """The graph of what was recorded."""
    tape, end, count = copy(run.tape), run.end, run.values
    tape.tensors = [None if t is None else t.detach() for t in tape.tensors[:count]]
    tape.values = tape.values[:count]
    tape.tainted = {v for v in tape.tainted if v < count}
    inputs = set(run.inputs)
    names = {v: name for v, name in leaf_names(module, tape, count).items() if v not in inputs}
    # A parameter that the model writes to without a gradient (max_norm of an embedding) stays a parameter.
    for op in tape.operations[:end]:
        foreign = next((f for v in op.reads() if (f := tape.values[v].foreign) is not None), None)
        if foreign is not None:
            raise TraceError(f"the gradient leads into {foreign}")
    axes = {v: axis for v, axis in batched_values(tape, run.inputs, batch).items() if v not in names}
    operations, names = inspect(tape, end, axes, batch, names)
    finite = finite_values(tape, count)
    values = tuple(
        GraphValue(
            k,
            tuple(v.shape),
            v.dtype,
            k in axes,
            axis.dim if axis else None,
            v.producer,
            batch,
            finite[k],
            axis.outer if axis else 1,
        )
        for k, v in enumerate(tape.values)
        for axis in (axes.get(k),)
    )
    graph = Graph(
        operations=tuple(operations),
        values=values,
        inputs=run.inputs,
        output=run.references,
        stages=(),
        batch=batch,
        nominal_batch=batch,
        signature=(),
        names=names,
        trainable={name: tape.leaves[v] for v, name in names.items()},
        constants=_constants(tape, names, inputs),
        differentiated=tuple(v for v, t in zip(run.inputs, run.given, strict=True) if requires_gradient(t)),
        opaque_stages=run.opaque,
    )
    returned = [leaf for leaf in output_leaves(run.references) if isinstance(leaf, Ref)]
    if not returned:
        raise TraceError(
            f"no tensor was found in what the model returned, a {type(run.output).__name__}; return tensors, in "
            "tuples, lists, dicts, dataclasses or objects with attributes"
        )
    if not any(values[leaf.value].batched for leaf in returned):
        raise TraceError("the model's output is not computed from its input by torch calls; " + BY_HAND)
    # Two runs of the batch with other samples, one more of what a rule measures, and one for the price.
    stages = _named_stages(run) if stages_of(module) is not None else _cut(graph)
    counting.add(check_evaluations=len(stages) * 4 * batch)
    return replace(graph, stages=stages)


def _constants(tape: Tape, names: dict[int, str], inputs: set[int]) -> dict[int, Tensor]:
    return {
        k: t
        for k, (v, t) in enumerate(zip(tape.values, tape.tensors, strict=True))
        if v.producer < 0 and t is not None and not v.weight and k not in names and k not in inputs
    }


def _named_stages(run: RecordedRun) -> tuple[Stage, ...]:
    stops = [stop for _, stop in run.stages]
    return tuple(Stage(name, start, stop) for (name, stop), start in zip(run.stages, [0, *stops[:-1]], strict=True))


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
        listed = list(inside) or ["nothing"]
        stages.append(Stage(listed[0] if len(listed) == 1 else f"{listed[0]}…{listed[-1]}", start, stop))
    return tuple(stages)

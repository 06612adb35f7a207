"""What the baselines share: the loss at a perturbed state, without side effects, counted and checked.

A baseline sees the whole network as one thing. Its queries are full forward passes: a pass over a batch of B
samples counts B queries, one forward equivalent, and B stage evaluations for every stage that the model has:
one for a plain module, ``len(chain)`` for an ``hzo.Chain``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hzo._options import positive, whole
from hzo.distributed import (
    average_accumulated,
    averaged,
    refuse_wrapped_loss,
    refuse_wrappers,
    unwrapped,
    without_collectives,
)
from hzo.errors import InputError, NonFiniteError, StepError
from hzo.execution import counting, full_float32, restore_snapshot, take_snapshot
from hzo.losses import LossFn, check_finite, check_loss
from hzo.reverse import accumulate
from hzo.tape.state import captured
from hzo.tape.surroundings import refuse_transforms
from hzo.tracing import Chain, batch_size, call_arguments, module_of, tensors_in

Model = nn.Module | Chain
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One batch of a training problem: what every baseline is called with, checked.

    Attributes:
        model: as it was given. module: what runs: the chain's, or what a ``DistributedDataParallel`` holds.
        parameters: those with requires_grad, tied ones once.
    """

    model: Model
    module: nn.Module
    stages: int
    loss_fn: LossFn
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    batch: int
    parameters: dict[str, nn.Parameter]


def problem(model: Model, loss_fn: LossFn, x: Any, y: Any, *, by_autograd: bool = False) -> Problem:
    """Check the arguments of a baseline.

    Args:
        by_autograd: whether autograd makes the gradient, whose hooks do the work of wrappers.

    Raises:
        InputError: no tensor in ``x``, an empty batch, a complex parameter where autograd does not make the gradient.
        NonFiniteError: NaN or infinity in ``x``.
        DistributedError: a wrapper that shards parameters.
        TapeError: inside of a transform of ``torch.func``.
    """
    refuse_transforms()
    module = module_of(model)
    if not by_autograd:
        refuse_wrappers(module)
        refuse_wrapped_loss(loss_fn)
        module = unwrapped(module)
    args, kwargs = call_arguments(x)
    batch = batch_size(args, kwargs)
    numbers = [t for t in tensors_in((args, kwargs)) if t.is_floating_point() and not captured(t)]
    if not all(bool(t.isfinite().all()) for t in numbers):
        raise NonFiniteError("the input x holds NaN or infinity; clean the data before training on it")
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, p in parameters.items():
        if not (p.is_floating_point() or by_autograd):
            raise InputError(f"parameter {name} is {p.dtype}; expected a real floating dtype. Freeze it or split it.")
    stages = len(model) if isinstance(model, Chain) else 1
    return Problem(model, module, stages, loss_fn, args, kwargs, y, batch, parameters)


def mean_loss(p: Problem, output: Any, checked: bool = True) -> Tensor:
    """The loss of an output, checked: a scalar, the mean where ``loss_fn`` returns values per sample.

    Args:
        checked: False under ``vmap``, where values cannot be looked at.

    Raises:
        InputError: neither a number, nor a tensor of shape () or (B, ...).
        NonFiniteError: NaN or infinite.
    """
    values = p.loss_fn(output) if p.target is None else p.loss_fn(output, p.target)
    if isinstance(values, (int, float)):
        values = torch.tensor(float(values), dtype=torch.float64)
    if not isinstance(values, Tensor):
        raise InputError(
            f"expected loss_fn to return a tensor or a number, got {type(values).__name__}; return the mean"
        )
    if checked:
        check_loss(values, p.batch)
        check_finite(values, "at the parameters or within a step of them")
    # A count of errors and the like: a loss of whole numbers.
    return (values if values.is_floating_point() else values.double()).mean()


def precise(p: Problem, call: Callable[..., Any], checked: bool = True) -> Callable[[], Tensor]:
    """A function that returns the loss of ``call``, with outputs below single precision raised to it first.

    Queries differ by little: in bfloat16 a loss of 2.3 moves in steps of 0.016, and most differences would be
    zero. A loss with low-precision tensors of its own (class weights) is left alone: it could not take such
    an output.
    """
    own = [*p.loss_fn.parameters(), *p.loss_fn.buffers()] if isinstance(p.loss_fn, nn.Module) else []

    def raised(leaf: Any) -> Any:
        low = isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
        return leaf.float() if low else leaf

    if any(raised(tensor) is not tensor for tensor in own):
        return lambda: mean_loss(p, call(*p.args, **p.kwargs), checked)
    with_target = replace(p, target=tree_map(raised, p.target))
    return lambda: mean_loss(with_target, tree_map(raised, call(*p.args, **p.kwargs)), checked)


@contextmanager
def replayed(modules: Iterable[nn.Module]) -> Iterator[Callable[[Callable[[], T]], T]]:
    """Yield ``run``, which calls what runs the model each time from the same buffers and random state.

    Afterwards both are as the first call left them: as after one ordinary forward pass. If anything raises,
    they and the training flags are as before the first.
    """
    modules = list(modules)
    before = take_snapshot(modules)
    after = None

    def run(function: Callable[[], T]) -> T:
        nonlocal after
        if after is not None:
            restore_snapshot(before)
        result = function()
        if after is None:
            after = take_snapshot(modules)
        return result

    try:
        yield run
    except BaseException:
        restore_snapshot(before)
        raise
    restore_snapshot(after or before)


LossAt = Callable[[], float]
Ordered = Callable[[Callable[[], Any]], Any]


@contextmanager
def queried(p: Problem) -> Iterator[tuple[Tensor, LossAt, Ordered]]:
    """Run the base pass; yield its loss, a function that queries the loss at what parameters then hold, and one that
    runs what it is given from where the base pass began.

    Parameters may be written inside (``parameter.data``, see ``held``); buffers, random state and training
    flags are taken care of. Cost: one base pass; each query one full forward pass.
    """
    evaluate = precise(p, p.module)
    with torch.no_grad(), full_float32(), replayed([p.module]) as run:
        with without_collectives("the model"):
            loss = run(evaluate)
        counting.add(base_evaluations=p.batch * p.stages)

        def loss_at() -> float:
            value = float(run(evaluate))
            count_pass(p)
            return value

        yield loss, loss_at, run


def count_pass(p: Problem, equivalents: int = 1) -> None:
    """Count one pass over the batch at a perturbed state."""
    counting.add(
        queries=p.batch,
        stage_evaluations=p.batch * p.stages,
        loss_evaluations=p.batch,
        forward_equivalents=equivalents,
    )


@contextmanager
def held(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield copies of the parameters, which may be overwritten inside and hold the same bits afterwards.

    From a copy, because adding and subtracting a perturbation leaves rounding behind at every step. The
    copies take no more memory than the gradients that a baseline fills in. Written through ``.data``: a graph
    that autograd holds on these parameters sees the same values afterwards, and may not be told that they
    changed.
    """
    copies = [parameter.data.clone() for parameter in parameters]
    try:
        yield copies
    finally:
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.data.copy_(copy)


def accumulator(parameter: Tensor) -> Tensor:
    """Zeros of the parameter's shape to sum estimates in: float32 for lower precisions."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def draw_seeds(generator: torch.Generator | None, samples: int) -> list[int]:
    """One seed per sample: from ``generator``, or from torch's global random state, which that moves."""
    whole("samples", samples)
    device = generator.device if generator is not None else torch.device("cpu")
    seeds = torch.randint(2**63 - 1, (samples,), generator=generator, device=device)
    return [int(seed) for seed in seeds]


def add_to_grad(p: Problem, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add a gradient to ``.grad``: of the processes' gradients the mean, where the model is spread over them."""
    found = averaged(p.model, [*gradients])
    average_accumulated(p.model, found)
    accumulate(found)


Draw = Callable[[Tensor, torch.Generator], Tensor]


def gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent standard normal numbers."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent signs, each +1 or −1 with probability 1/2."""
    bits = torch.randint(0, 2, like.shape, device=like.device, generator=generator)
    return (2 * bits - 1).to(like.dtype)


def directions(tensors: Sequence[Tensor], draw: Draw, seed: int) -> Iterator[Tensor]:
    """A direction for every tensor, one at a time; the same for the same seed."""
    generators: dict[torch.device, torch.Generator] = {}
    for tensor in tensors:
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
        yield draw(tensor, generators[tensor.device])


def rounding(tensors: Sequence[Tensor]) -> float:
    """The coarsest rounding unit (distance from 1 to the next number) among these tensors."""
    return max((torch.finfo(tensor.dtype).eps for tensor in tensors), default=torch.finfo(torch.float32).eps)


def checked_step(step: float | None, default: float, tensors: Mapping[str, Tensor]) -> float:
    """The step to use: ``step``, or ``default`` where that is None.

    Raises:
        InputError: not a positive finite number.
        StepError: so small that a typical element of some tensor would not change at all.
    """
    step = default if step is None else positive("step", step, "None chooses one from the dtype")
    for name, tensor in tensors.items():
        size = float(tensor.detach().abs().mean()) if tensor.numel() else 0.0
        if step < torch.finfo(tensor.dtype).eps / 4 * size:
            raise StepError(
                f"a step of {step:g} vanishes in {name}: {tensor.dtype}, elements of about "
                f"{size:.2g}. Give a larger step, or the model a wider dtype."
            )
    return step

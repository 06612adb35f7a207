"""What is right, by autograd in float64."""

import copy
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils import _pytree as pytree

import hzo
from hzo.gradients import base_pass
from hzo.tape import Ref
from hzo.tape.record import flat
from hzo.tracing import call_arguments
from hzo.tracing.chain import Chain
from support.cases import CASES, Case, Problem

# Central differences of one node in float64, h = u^(1/3) of the scale: h² of curvature and u/h of rounding are each
# 4e-11 of what is measured. Cancellation and the nodes of a path (up to twenty here) leave four decimal digits.
CENTRAL = 1e-6
# Forward differences, h = u^(1/2): h of curvature and u/h of rounding, 1.5e-8 each.
FORWARD = 1e-4
# A kink inside the step turns one element's slope into a mean of two; see test_gradient for how this shrinks.
KINKS = 1e-4

SEED = 5  # of what dropout draws, in the oracle and in hzo


@contextmanager
def undisturbed(module):
    """Buffers and random state as before: one forward pass of the oracle leaves nothing behind."""
    saved = copy.deepcopy(dict(module.named_buffers()))
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    buffer.copy_(saved[name])


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def mean_loss(loss_fn, output, y):
    return (loss_fn(output) if y is None else loss_fn(output, y)).mean()


def parameters_of(problem):
    """Trainable parameters by name."""
    return {name: p for name, p in problem.module.named_parameters() if p.requires_grad}


def unregistered(chain):
    """Parameters of a traced chain by the chain's names, which cover layers that no module holds."""
    return dict(chain.traced.trainable)


def gradients(problem, parameters=None):
    """Gradients of the mean loss by name, those of parameters without influence left out, and the loss."""
    parameters = parameters or parameters_of(problem)
    args, kwargs = call_arguments(problem.x)
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    with undisturbed(problem.module), torch.enable_grad():
        loss = mean_loss(problem.loss_fn, problem.module(*args, **kwargs), problem.y)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}, loss.detach()


def cotangents(problem, chain):
    """The cotangent of every floating value alive at every stage boundary: run from there on, differentiate."""
    graph = chain.traced
    state = torch.get_rng_state()
    with undisturbed(problem.module):
        activations, output = base_pass(chain, problem.x)
        torch.set_rng_state(state)
        args, kwargs = call_arguments(problem.x)
        again = problem.module(*pytree.tree_map_only(torch.Tensor, torch.clone, args), **kwargs)
        for a, b in zip(pytree.tree_leaves(output), pytree.tree_leaves(again), strict=True):
            assert torch.equal(a, b)  # what was recorded is what the model does
    tape = activations.tape

    def finish(values, position):
        for op in tape.operations[position : len(graph.operations)]:

            def fill(a):
                if type(a) is Ref:
                    return values[a.value]
                return tuple(map(fill, a)) if type(a) is tuple else a

            with tape.states[op.index].again() if op.index in tape.states else nullcontext():
                made = flat(differentiable(op.target)(*fill(op.args), **{k: fill(v) for k, v in op.kwargs.items()}))
            values.update((v, t) for v, t in zip(op.writes, made, strict=True) if v is not None)
        return pytree.tree_map_only(Ref, lambda ref: values[ref.value], graph.output)

    found = []
    for position in graph.boundaries:
        with undisturbed(problem.module):
            live = [v for v in graph.live[position] if graph.values[v].floating]
            leaves = {v: tape.tensors[v].detach().clone().requires_grad_() for v in live}
            with torch.enable_grad():
                loss = mean_loss(
                    problem.loss_fn, finish({**dict(enumerate(tape.tensors)), **leaves}, position), problem.y
                )
                wanted = list(leaves.values())  # none where only integers are alive
                found.append(torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ())
    return found


def differentiable(target):
    """An operator that autograd differentiates; it knows "copy" only in place."""
    if target is torch.ops.aten.copy.default:
        return lambda old, new, non_blocking=False: new.to(old.dtype).expand_as(old).clone()
    return target


def relative_errors(estimates, exact):
    """By name |estimate − exact| / |exact|; where a gradient is zero up to rounding, over the norm of all together."""
    assert set(exact) <= set(estimates)
    whole = torch.stack([g.norm() for g in exact.values()]).norm()
    errors = {}
    for name, estimate in estimates.items():
        reference = exact.get(name, torch.zeros_like(estimate))
        assert estimate.shape == reference.shape
        scale = reference.norm() if reference.norm() > 1e-9 * whole else whole
        errors[name] = float((estimate - reference).norm() / scale)
    return errors


def worst(errors):
    return max(errors.values(), default=0.0)


@dataclass(frozen=True)
class Solved:
    """A case, traced, with what autograd says."""

    case: Case
    problem: Problem
    chain: Chain
    exact: dict[str, torch.Tensor]
    loss: torch.Tensor

    def estimate(self, plan, function=hzo.grad_and_value, **options):
        """What hzo says, with the random numbers of the oracle."""
        torch.manual_seed(SEED)
        return function(self.chain, *list(self.problem)[1:], plan=plan, **options)


@cache
def solve(name):
    """Once a process; tests must leave it as it is."""
    problem = CASES[name].build()
    chain = hzo.trace(problem.model, problem.x)
    torch.manual_seed(SEED)
    exact, loss = gradients(problem, {**parameters_of(problem), **unregistered(chain)})
    return Solved(CASES[name], problem, chain, exact, loss)


def distance(out):
    """A loss that no norm or softmax leaves constant: the distance to a point, sample by sample."""
    out = out.flatten(1)
    return (out - torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)).square().sum(1)


def assert_right(model, x, loss_fn=distance, y=None, tolerance=CENTRAL, **options):
    """Gradients as by autograd, without assumptions and with all."""
    problem = Problem(model, loss_fn, x, y)
    for assume in ("nothing", "structure"):
        torch.manual_seed(SEED)
        found, _ = hzo.grad_and_value(*problem, assume=assume, **options)
        torch.manual_seed(SEED)
        exact, _ = gradients(problem)
        assert worst(relative_errors(found, exact)) <= tolerance


def bisection(n):
    """The recurrence of the paper: T(n) = ⌈n/2⌉ + T(⌊n/2⌋) + T(⌈n/2⌉)."""
    return 0 if n <= 1 else math.ceil(n / 2) + bisection(n // 2) + bisection(math.ceil(n / 2))

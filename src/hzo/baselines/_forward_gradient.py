"""Forward gradient: a directional derivative in forward mode, times its direction."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap

from hzo.baselines import _evaluate as ev
from hzo.baselines import _population as population
from hzo.baselines import _together as together
from hzo.baselines._registry import baseline
from hzo.distributed import without_collectives
from hzo.errors import InputError
from hzo.execution import counting, devices_of, random_state
from hzo.losses import LossFn


# It carries the derivative along, for the work of two passes more.
@baseline("forward-gradient", passes=3, rate=0.0025, second_moment=lambda d: d + 2)
def forward_gradient(
    model: ev.Model,
    loss_fn: LossFn,
    x: Any,
    y: Any = None,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
    executor: Any = None,
) -> Tensor:
    """Gradients without backpropagation; adds the estimate to ``.grad`` and returns the loss.

    Estimates: ``ĝ = (∇L·z) z``, z standard normal; the mean over ``samples`` draws. The directional
    derivative is exact: it comes from forward-mode automatic differentiation, a Jacobian-vector product
    carried along the forward pass. It is the one estimator here that needs derivatives: every operation must
    have a forward-mode rule, a black box has none.

    Expectation: the gradient, exactly.

    Variance: with d parameters and gradient g, one draw has E|ĝ|² = (d + 2)|g|² and Var ĝᵢ = |g|² + gᵢ²; n
    draws have 1/n of the variance.

    Cost: ``samples`` forward passes that carry a derivative along; the first of them serves as the base pass.
    Each counts B queries. In forward equivalents the derivative alone counts 2, since a layer Wa needs Ẇa and
    Wȧ; a draw after the first counts 3, since it runs the forward pass again.

    Args:
        model: module or ``hzo.Chain``.
        loss_fn: called as ``loss_fn(model(x), y)``; returns a scalar, or values whose mean is the loss.
        x: tensor, tuple (``model(*x)``) or dict (``model(**x)``).
        y: target; None calls ``loss_fn(output)``.
        samples: directions averaged.
        generator: draws one seed per direction; default: torch's global random state, which that moves.
        executor: a ``concurrent.futures.Executor``, or a function that makes one for this call: all queries go out at
            once, each to a copy of the model on a worker; what they find is what they find one by one, to the bit.
            Processes: forward mode runs in one thread at a time.

    Raises:
        InputError: an operation has no forward-mode derivative, or cuts it off.

    Source: A. G. Baydin, B. A. Pearlmutter, D. Syme, F. Wood, P. Torr, Gradients without backpropagation,
    arXiv 2202.08587, 2022.
    """
    p = ev.problem(model, loss_fn, x, y)
    parameters = list(p.parameters.values())
    seeds = ev.draw_seeds(generator, samples)
    before = random_state(devices_of(parameters))
    if not parameters:
        with ev.queried(p) as (loss, *_):
            return loss
    with torch.no_grad(), ev.replayed([p.module]) as run:
        with without_collectives("the model"):
            loss, slope = run(partial(_loss_and_slope, p, seeds[0]))
        ev.count_pass(p, 2)
        rest = None
        if executor is not None:
            found = population.ask(p, _loss_and_slope, [(seed,) for seed in seeds[1:]], executor, before)
            rest = [slope for _, slope in found]
        elif len(seeds) > 2:
            rest = _slopes_together(p, seeds[1:], loss, run)
        if rest is None:
            rest = [run(partial(_loss_and_slope, p, seed))[1] for seed in seeds[1:]]
        for _ in rest:
            ev.count_pass(p, 3)
        slopes = [slope, *rest]
        counting.add(base_evaluations=p.batch * p.stages)
    gradients = [ev.accumulator(parameter) for parameter in parameters]
    for seed, slope in zip(seeds, slopes, strict=True):
        for gradient, z in zip(gradients, ev.directions(parameters, ev.gaussian, seed), strict=True):
            gradient.add_(z, alpha=slope / samples)
    ev.add_to_grad(p, zip(parameters, gradients, strict=True))
    return loss


def _slopes_together(p: ev.Problem, seeds: list[int], loss: Tensor, run: ev.Ordered) -> list[float] | None:
    """As ``_loss_and_slope`` for many seeds, many directions in a call of the model; None where it cannot be so."""
    parameters = {name: parameter.detach() for name, parameter in p.parameters.items()}
    step = together.at_once(p) // 2
    if not step:
        return None

    def slope(direction: dict[str, Tensor]) -> Any:
        return jvp(together.functional_loss(p), (parameters,), (direction,))

    slopes: list[float] = []
    for at in range(0, len(seeds), step):
        drawn = [[*ev.directions([*parameters.values()], ev.gaussian, seed)] for seed in seeds[at : at + step]]
        stacked = {name: torch.stack([d[k] for d in drawn]) for k, name in enumerate(parameters)}
        found = run(partial(together.attempted, partial(vmap(slope, randomness="same"), stacked)))
        if found is None or not together.same(found[0], loss):
            return None
        slopes += found[1].tolist()
    return slopes


def _loss_and_slope(p: ev.Problem, seed: int) -> tuple[Tensor, float]:
    """The loss, and its derivative along the direction of a seed."""
    with _one_level:
        return _loss_and_slope_alone(p, seed)


_one_level = threading.Lock()  # levels of forward mode are those of all threads


def _loss_and_slope_alone(p: ev.Problem, seed: int) -> tuple[Tensor, float]:
    directions = ev.directions([*p.parameters.values()], ev.gaussian, seed)
    with forward_ad.dual_level():
        moving = {
            name: forward_ad.make_dual(parameter.detach(), z)  # type: ignore[no-untyped-call]
            for (name, parameter), z in zip(p.parameters.items(), directions, strict=True)
        }

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(p.module, moving, args, kwargs)

        try:
            loss, tangent = forward_ad.unpack_dual(ev.precise(p, call)())  # type: ignore[no-untyped-call]
        except NotImplementedError as error:
            raise InputError(
                f"the forward gradient needs a forward-mode derivative of every operation, and one has none: "
                f"{error} Use spsa or hzo.backward, which need forward passes only."
            ) from error
        if tangent is None:
            raise InputError(
                "the loss carries no forward-mode derivative of the parameters: an operation detaches, or "
                "computes outside of torch. Use spsa or hzo.backward, which need forward passes only."
            )
        return loss.clone(), float(tangent)

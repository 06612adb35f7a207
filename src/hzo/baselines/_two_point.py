"""The estimator that SPSA and MeZO share: differences along random directions in parameter space."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hzo.baselines import _evaluate as ev
from hzo.baselines import _in_place as in_place
from hzo.baselines import _population as population
from hzo.baselines import _together as together
from hzo.execution import devices_of, random_state
from hzo.losses import LossFn


def two_point(
    model: ev.Model,
    loss_fn: LossFn,
    x: Any,
    y: Any,
    *,
    draw: ev.Draw,
    samples: int,
    mu: float | None,
    generator: torch.Generator | None,
    executor: Any,
    moves: bool = False,
    rate: float | None = None,
) -> Tensor:
    """Accumulate the mean over ``samples`` directions z of ``(L(θ + μz) − L(θ − μz)) / 2μ · z``.

    Directions are made from their seed each time they are needed, tensor by tensor, and never kept.

    Args:
        moves: move parameters in place, with little memory beside them; otherwise from a copy, which is faster.
        rate: take a step of that rate at once, and leave ``.grad`` alone.
    """
    p = ev.problem(model, loss_fn, x, y)
    parameters = list(p.parameters.values())
    mu = ev.checked_step(mu, ev.rounding(parameters) ** (1 / 3) / 5, p.parameters)
    seeds = ev.draw_seeds(generator, samples)
    before = random_state(devices_of(parameters))
    versions = [parameter._version for parameter in parameters]
    with ev.queried(p) as (loss, loss_at, run):
        slopes = None
        if executor is not None and parameters:
            members = [(draw, seed, signed) for seed in seeds for signed in (mu, -mu)]
            values = population.ask(p, _loss, members, executor, before)
            slopes = [(a - b) / (2 * mu) for a, b in zip(values[::2], values[1::2], strict=True)]
            for _ in values:
                ev.count_pass(p)
        elif parameters and samples > 1 and rate is None:
            slopes = _slopes_together(p, draw, seeds, mu, loss, run)
        if slopes is None:
            slope = _slope if moves and in_place.can_move(parameters, versions) else _slope_from_copies
            slopes = [slope(parameters, draw, seed, mu, loss_at) for seed in seeds] if parameters else []
    if rate is not None:
        for seed, along in zip(seeds, slopes, strict=bool(parameters)):
            for parameter, z in zip(parameters, ev.directions(parameters, draw, seed), strict=True):
                parameter.data.add_(z, alpha=-rate * along / samples)
        return loss
    gradients = [ev.accumulator(parameter) for parameter in parameters]
    for seed, along in zip(seeds, slopes, strict=bool(parameters)):
        for gradient, z in zip(gradients, ev.directions(parameters, draw, seed), strict=True):
            gradient.add_(z, alpha=along / samples)
    ev.add_to_grad(p, zip(parameters, gradients, strict=True))
    return loss


def _slopes_together(
    p: ev.Problem, draw: ev.Draw, seeds: list[int], mu: float, loss: Tensor, run: ev.Ordered
) -> list[float] | None:
    """As ``_slope`` for many seeds, with many directions in a call of the model; None where it cannot be run so."""
    parameters = [parameter.detach() for parameter in p.parameters.values()]
    slopes: list[float] = []
    step = (together.at_once(p) - 1) // 2
    if not step:  # too large to be moved many times at once
        return None
    for at in range(0, len(seeds), step):
        chosen = seeds[at : at + step]
        moved = {name: [parameter] for name, parameter in zip(p.parameters, parameters, strict=True)}
        for seed in chosen:
            for name, parameter, z in zip(p.parameters, parameters, ev.directions(parameters, draw, seed), strict=True):
                moved[name] += [torch.add(parameter, z, alpha=mu), torch.add(parameter, z, alpha=-mu)]
        stacked = {name: torch.stack(states) for name, states in moved.items()}
        values = run(partial(together.losses_at, p, stacked, loss))
        if values is None:
            return None
        slopes += [(float(a) - float(b)) / (2 * mu) for a, b in zip(values[1::2], values[2::2], strict=True)]
    for _ in range(2 * len(seeds)):
        ev.count_pass(p)
    return slopes


def _loss(p: ev.Problem, draw: ev.Draw, seed: int, signed: float) -> float:
    """The loss at a step along the direction of a seed, by a model that nobody else has."""
    parameters = list(p.parameters.values())
    for parameter, z in zip(parameters, ev.directions(parameters, draw, seed), strict=True):
        parameter.data.add_(z, alpha=signed)
    return float(ev.precise(p, p.module)())


def _slope(parameters: list[torch.nn.Parameter], draw: ev.Draw, seed: int, mu: float, loss_at: ev.LossAt) -> float:
    """The loss's central difference along the direction of one seed, with the parameters moved in place."""
    values = []
    for signed in (mu, -mu):
        with in_place.moved_along(parameters, draw, seed, signed):
            values.append(loss_at())
    return (values[0] - values[1]) / (2 * mu)


def _slope_from_copies(
    parameters: list[torch.nn.Parameter], draw: ev.Draw, seed: int, mu: float, loss_at: ev.LossAt
) -> float:
    """The same with a copy of the parameters: for those that share memory, and models that write to their own."""
    values = []
    with ev.held(parameters) as copies:
        for signed in (mu, -mu):
            moved = zip(parameters, copies, ev.directions(parameters, draw, seed), strict=True)
            for parameter, copy, z in moved:
                torch.add(copy, z, alpha=signed, out=parameter.data)
            values.append(loss_at())
    return (values[0] - values[1]) / (2 * mu)

"""Queries of a population sent to workers at once: each runs a copy of the model at a perturbed state."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hzo.baselines import _evaluate as ev
from hzo.errors import HzoError, InputError
from hzo.execution import RandomState, random_state, set_random_state
from hzo.pools import Pool


@dataclass(frozen=True)
class _Job:
    """What a worker is told.

    Attributes:
        problem: model, loss and batch. query: what to ask of them, for one member of the population.
        random: torch's random state with which the base pass began. draws: whether that moved it.
        process: that of the caller, in which all threads share one random state.
    """

    problem: ev.Problem
    query: Callable[..., Any]
    random: RandomState
    draws: bool
    process: int


def _answer(job: _Job, member: tuple[Any, ...]) -> Any:
    """One query, in a worker; the model there is a copy, and random numbers are those of the base pass."""
    p = job.problem
    if os.getpid() == job.process:  # in a thread
        if job.draws:
            raise InputError(
                "the model draws random numbers (dropout), which threads of one process cannot draw alike; give an "
                "executor of processes"
            )
    else:
        set_random_state(job.random)
    # Always: some ways of sending a tensor to another process send its place in memory.
    module = copy.deepcopy(p.module)
    own = dict(module.named_parameters())
    there = replace(p, model=module, module=module, parameters={name: own[name] for name in p.parameters})
    with torch.no_grad():
        return job.query(there, *member)


def ask(
    p: ev.Problem, query: Callable[..., Any], members: Sequence[tuple[Any, ...]], executor: Any, random: RandomState
) -> list[Any]:
    """``query(problem, *member)`` for each member of a population, in order, on the workers of an executor.

    Args:
        executor: as ``hzo.blackbox`` takes it; one that a function makes is for this call alone.
        random: torch's random state before the base pass.

    Equal to the bit to queries one by one. Counts nothing. Cost: the model is sent with every query, or copied.

    Raises:
        InputError: the model draws random numbers and workers are threads. QueryError, QueryTimeoutError: as of
        ``hzo.blackbox``.
    """
    pool = executor if isinstance(executor, Pool) else Pool(executor)
    now = random_state(torch.device(device) for device in random)
    draws = any(not torch.equal(state, random[device]) for device, state in now.items())
    job = _Job(replace(p, model=p.module), query, random, draws, os.getpid())
    try:
        return pool.ask(_answer, [((job, member), {}) for member in members])
    except HzoError as error:
        error.args = (f"a query of the population: {error}",)
        raise
    finally:
        if pool is not executor:
            pool.close()

"""A step under a plan: the user's own Python runs once, and the plan is one that fits what it did.

A plan that is known is followed while the step is recorded, which releases activations as it goes. Where nothing is
known yet of the model, or it does something else than what is known, its graph and its plan are made of that very
recording: to run the user's code once more, to look at it, would move counters, iterators and whatever else it keeps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from hzo.errors import HzoWarning
from hzo.execution import full_float32, undone_on_error
from hzo.gradients.forward_pass import BasePass, RecordedLoss, carried_to_outputs, record_loss
from hzo.gradients.trace_cache import check_plan, fitting, known_trace, made_with, signature_of, traced_for
from hzo.plans import Plan, Schedule, schedule
from hzo.tape import Tape
from hzo.tracing import Chain, batch_size, call_arguments, keep, module_of
from hzo.tracing.recorder import chain_of, write_back


class PlannedPass(NamedTuple):
    """A step as it ran: the chain that it followed, its plan, when the plan needs what, and the base pass."""

    chain: Chain
    plan: Plan
    steps: Schedule
    base: BasePass


@contextmanager
def planned_pass(
    model: Chain | nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any,
    plan: Plan | None,
    options: Mapping[str, Any],
) -> Iterator[PlannedPass]:
    """Run a model and its loss once, under the plan given or one made with ``options``.

    Where this or the ``with`` block raises, buffers, random state and training flags are as before.

    Raises:
        PlanError: the plan was made for another chain, shape, dtype or mode, or options stand beside it; the model does
            something else than the plan that was given says.
        See ``hzo.trace`` and ``loss_pass`` for what they raise.
    """
    check_plan(plan, options)
    about = signature_of(model, x)
    chain = known_trace(model, x, about, strict=plan is not None)
    noisy = isinstance(model, Chain) and model.graph is not None and model.graph.noise is not None
    alone = batch_size(*call_arguments(x)) == 1
    if chain is not model and (noisy or (chain is None and plan is not None and alone)):
        chain = traced_for(model, x, strict=plan is not None)  # of two copies of a single sample
    module = module_of(model)
    with undone_on_error([module, *(() if chain is None else chain.traced.opaque_modules)]), ExitStack() as stack:
        followed = None if chain is None else _followed(chain, fitting(chain, plan, options))
        # The base pass, too: forward differences are taken from it.
        stack.enter_context(full_float32(followed is None or followed.plan.queries > 0))
        recording = record_loss(
            module,
            x,
            loss_fn,
            y,
            *(() if followed is None else (followed.chain.traced, followed.steps.base_pass)),
            follow=chain is None or (not noisy and (plan is None or alone)),
        )
        with _undone_on_error(recording):
            if followed is None:
                followed = _made(recording, about, plan, options)
            elif recording.difference is not None:
                # The model does something else with these numbers than with those it was traced with. Given a plan
                # that is an error, but for one sample alone: PyTorch copies and broadcasts less for it.
                followed = _made(recording, about, None, options if plan is None else made_with(plan))
                _warn_of_cost(plan, followed.plan)
            base = carried_to_outputs(followed.chain, x, recording)
            if chain is not followed.chain:  # nothing was released while it ran
                for values in followed.steps.base_pass:
                    base.activations.release(followed.chain.traced, values)
            yield PlannedPass(followed.chain, followed.plan, followed.steps, base)
            write_back(recording.run)


class _Followed(NamedTuple):
    chain: Chain
    plan: Plan
    steps: Schedule


def _followed(chain: Chain, plan: Plan) -> _Followed:
    return _Followed(chain, plan, schedule(chain.traced, plan))


def _made(recording: RecordedLoss, about: tuple[Any, ...], plan: Plan | None, options: Mapping[str, Any]) -> _Followed:
    """What a recording follows that nothing was known of, or that did something new."""
    chain = chain_of(recording.module, recording.run, about)
    keep(chain)
    return _followed(chain, fitting(chain, plan, options))


def _warn_of_cost(given: Plan | None, made: Plan) -> None:
    if given is None:
        return
    predicted = given.cost.stage_evaluations + given.cost.measurements  # of one sample
    if predicted != made.stage_evaluations:
        warnings.warn(
            "PyTorch runs other calls for one sample than this plan was made for: it was planned anew, and "
            f"takes {made.stage_evaluations} stage evaluations where the plan says {predicted} for one "
            "sample. Plan for one sample, hzo.plan(hzo.trace(model, x)), or leave a last single sample out",
            HzoWarning,
            stacklevel=11,
        )


@contextmanager
def _undone_on_error(recording: RecordedLoss) -> Iterator[None]:
    """What the recorded step has moved goes back where something raises behind it."""
    try:
        yield
    except BaseException:
        recording.run.recorder.undo.restore()
        _restore_opaque(recording.run.tape)
        raise


@torch.no_grad()
def _restore_opaque(tape: Tape) -> None:
    """The buffers of modules that ran as one operation, which plain functions may hide from their model."""
    for state in reversed(tape.states.values()):
        for buffer, before in state.buffers:
            buffer.copy_(before)

"""Backpropagation: the yardstick, and the one place here that runs autograd backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo.baselines import _evaluate as ev
from hzo.baselines._registry import baseline
from hzo.distributed import wraps_shares
from hzo.errors import InputError
from hzo.execution import counting
from hzo.losses import LossFn


@baseline("backprop", reverse=True)
def backprop(model: ev.Model, loss_fn: LossFn, x: Any, y: Any = None) -> Tensor:
    """Ordinary backpropagation, ``loss.backward()``: adds the gradient to ``.grad`` and returns the loss.

    Exact up to rounding. Cost: one forward pass (counted as the base pass), and a reverse sweep of about two
    forward passes that is no query and is not counted. It needs a derivative of every operation, and the
    activations of all.

    Args:
        model: module or ``hzo.Chain``.
        loss_fn: called as ``loss_fn(model(x), y)``; returns a scalar, or values whose mean is the loss.
        x: tensor, tuple (``model(*x)``) or dict (``model(**x)``).
        y: target; None calls ``loss_fn(output)``.

    Raises:
        InputError: the loss has no derivative with respect to any trainable parameter.

    Source: D. E. Rumelhart, G. E. Hinton, R. J. Williams, Learning representations by back-propagating
    errors, Nature 323, 1986.
    """
    p = ev.problem(model, loss_fn, x, y, by_autograd=True)
    # A wrapper that gathers parameters has them swapped in the middle of its step: there is nothing to put back.
    with ev.replayed([] if wraps_shares(p.module) else [p.module]) as run, torch.enable_grad():
        loss = run(lambda: ev.mean_loss(p, p.module(*p.args, **p.kwargs)))
        counting.add(base_evaluations=p.batch * p.stages)
        if p.parameters:
            if not loss.requires_grad:
                raise InputError(
                    "backprop needs a loss that depends on a trainable parameter through operations with a "
                    "derivative; this one does not. Use spsa or hzo.backward, which need forward passes only."
                )
            loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()

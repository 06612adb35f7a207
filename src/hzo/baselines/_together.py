"""Many directions in one call of the model, by ``torch.func.vmap``, where model and loss allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from hzo.baselines import _evaluate as ev
from hzo.losses import check_finite
from hzo.tracing import tensors_in

_BYTES = 2**28  # of moved parameters and what they make, at a time
_SLACK = 1e-3  # by which a loss may differ from that of the base pass and still be the same one


def at_once(p: ev.Problem) -> int:
    """How many states of a model fit into a quarter of a gigabyte, where activations take what 64 inputs take."""
    weights, inputs = (sum(t.numel() * t.element_size() for t in ts) for ts in (p.parameters.values(), _inputs(p)))
    return _BYTES // max(1, weights + 64 * inputs)


def _inputs(p: ev.Problem) -> list[Tensor]:
    return tensors_in((p.args, p.kwargs))


def losses_at(p: ev.Problem, moved: dict[str, Tensor], loss: Tensor) -> Tensor | None:
    """The losses at several states of the parameters; None where this model cannot be run so.

    Args:
        moved: for each parameter its states, stacked. The first one is that of the base pass.
        loss: of the base pass, by which it is seen whether the model does the same here.

    Counts nothing. Cost: one call of the model.

    Raises:
        NonFiniteError: as the loss would one by one.
    """
    found: Tensor | None = attempted(lambda: vmap(functional_loss(p), randomness="same")(moved))
    if found is None or not same(found[0], loss):
        return None
    check_finite(found, "at the parameters or within a step of them")
    return found


def functional_loss(p: ev.Problem) -> Callable[[dict[str, Tensor]], Tensor]:
    """The loss as a function of the parameters, unchecked: what ``vmap`` and ``jvp`` are applied to."""

    def loss_at(parameters: dict[str, Tensor]) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(p.module, parameters, args, kwargs)

        return ev.precise(p, call, checked=False)()

    return loss_at


def attempted(run: Callable[[], Any]) -> Any:
    """What runs under ``vmap``, or None: where it does not, one by one says what is wrong."""
    try:
        return run()
    except Exception:  # of whatever kind: the model was not written for this
        return None


def same(found: Tensor, loss: Tensor) -> bool:
    """Whether losses are that of the base pass."""
    loss = loss.expand(found.shape)
    return torch.allclose(found.double(), loss.double(), rtol=_SLACK, atol=_SLACK, equal_nan=True)

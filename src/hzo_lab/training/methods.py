"""The one place that knows which function makes the gradient for a method's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import hzo
from hzo.baselines import BASELINES
from hzo.errors import InputError
from hzo_lab.training.config import TrainConfig


class Gradient(Protocol):
    """Adds a batch's gradient to ``.grad`` and returns the loss; draws what is random from ``generator``."""

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """A way to make gradients, bound to a model.

    Attributes:
        passes: forward passes that a gradient is worth beyond its queries; see ``REVERSE_SWEEP``.
        plan: what HZO does, printable; chain: the network that it was made for. None for the others.
    """

    name: str
    gradient: Gradient
    passes: int = 0
    plan: hzo.Plan | None = None
    chain: hzo.Chain | None = None


# A sweep by adjoints asks few queries or none, and is not free: by custom it is taken as two forward passes, backprop's
# as well as HZO's where a plan applies adjoints. Only a budget counts it; forward equivalents do not.
REVERSE_SWEEP = 2

# Bytes for the perturbed copies of a chunk. Fixed, not a share of what happens to be free: chunks of another
# size round otherwise, and a run that is resumed is to give the same bits.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2 * 2**30}


def make_plan(config: TrainConfig, chain: hzo.Chain) -> hzo.Plan:
    """The plan that a configuration asks for; its values are checked by both."""
    options: dict[str, Any] = {"tree": config.tree, "assume": config.assume, "scheme": config.scheme}
    return hzo.plan(chain, **options)


def refuse_untestable(method: str) -> None:
    """Raise where what a method gives is right only on average, and can be tested against no single loss."""
    if method != "hzo" and not BASELINES[method].reverse:
        raise InputError(
            f"{method} gives estimates that are right on average, and no gradient that could be tested against the "
            "loss: leave out --check, or train by hzo or backprop."
        )


def bind_method(
    config: TrainConfig, model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor
) -> Method:
    """Bind ``config.method`` to a model; ``x`` is a batch of the size that it will be trained with."""
    if config.method == "hzo":
        chain = hzo.trace(model, x)
        plan = make_plan(config, chain)
        memory = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cpu"])

        def by_hzo(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
            return hzo.backward(chain, loss_fn, x, y, plan=plan, memory=memory)

        return Method("hzo", by_hzo, passes=REVERSE_SWEEP if plan.adjoints else 0, plan=plan, chain=chain)

    known = BASELINES.get(config.method)
    if known is None:
        raise InputError(f"expected a method of the names hzo, {', '.join(BASELINES)}, got {config.method!r}.")
    draws = known.passes is not None

    def by_baseline(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        random = {"samples": config.directions, "generator": generator} if draws else {}
        loss: Tensor = known.estimate(model, loss_fn, x, y, **random)
        return loss

    return Method(config.method, by_baseline, passes=REVERSE_SWEEP if known.reverse else 0)

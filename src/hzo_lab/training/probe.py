"""What a method's gradient is worth on one batch, without leaving a trace in the run: by backprop, and by the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

import hzo
from hzo.execution import contained
from hzo.losses import LossFn
from hzo.verification import GradientCheck
from hzo_lab.records import generator, separate_random_numbers
from hzo_lab.training.methods import Method, refuse_untestable


@contextmanager
def without_trace(model: nn.Module, seed: int) -> Iterator[None]:
    """Gradients made inside are gone afterwards; buffers and random numbers are put back."""
    own = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with contained([model]), separate_random_numbers(seed):
            for parameter, _ in own:
                parameter.grad = None
            yield
    finally:
        for parameter, gradient in own:
            parameter.grad = gradient


def cosine_to_backprop(method: Method, model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, *, seed: int) -> float:
    """Cosine between the gradient of all parameters by ``method`` and by backprop on one batch; both see one
    random state, so that dropout drops the same units."""
    ours = _gradient(method, model, x, y, seed)
    with separate_random_numbers(seed):
        return hzo.compare_gradients(model, loss_fn, x, y, gradient=ours).overall


def check_method(
    method: Method, model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, *, seed: int
) -> GradientCheck:
    """Whether the loss agrees with the method's gradient, by forward passes.

    Raises:
        InputError: the method draws random directions, and what it gives is right only on average.
    """
    refuse_untestable(method.name)
    if method.chain is not None:
        with separate_random_numbers(seed):
            return hzo.check_gradient(method.chain, loss_fn, x, y, plan=method.plan)
    ours = _gradient(method, model, x, y, seed)
    with separate_random_numbers(seed):
        return hzo.check_gradient(model, loss_fn, x, y, gradient=ours)


def _gradient(method: Method, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> dict[str, Tensor]:
    with without_trace(model, seed):
        method.gradient(x, y, generator(seed, "probe"))
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

"""``backward`` and ``grad_and_value``: a model, a loss function and a batch, recorded and differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo.errors import InputError, NonFiniteError
from hzo.reverse.step import RecordedStep, accumulate, record


def call_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with ``x``: a tuple or list as positional, a dict as keyword arguments."""
    if isinstance(x, (tuple, list)):
        return tuple(x), {}
    if isinstance(x, dict):
        return (), x
    return (x,), {}


def recorded_loss(
    model: Callable[..., Any], loss_fn: Callable[..., Any], x: Any, y: Any, keep: bool = False
) -> tuple[RecordedStep, Tensor]:
    """The model's loss on a batch, recorded.

    Raises:
        InputError: the loss is no tensor of floating-point numbers. NonFiniteError: NaN or infinity in the input.
    """
    for tensor in pytree.tree_leaves(x):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NonFiniteError("the input x holds NaN or infinity; clean the data before training on it")
    args, kwargs = call_arguments(x)
    modules = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
    with record(*modules, keep=keep) as step:
        output = model(*args, **kwargs)
        loss = loss_fn(output) if y is None else loss_fn(output, y)
        if not isinstance(loss, Tensor):
            raise InputError(
                f"expected loss_fn to return a tensor (one number, or one a sample), got {type(loss).__name__}; a score "
                "without a derivative goes through hzo.smoothed"
            )
    return step, loss


def backward(
    model: Callable[..., Any], loss_fn: Callable[..., Any], x: Any, y: Any = None, *, scale: float | Tensor = 1.0
) -> Tensor:
    """See ``hzo.backward``."""
    step, loss = recorded_loss(model, loss_fn, x, y)
    try:
        factor = float(scale)
        gradients = step.gradients(loss)
        accumulate([(leaf, g * factor if factor != 1 else g) for leaf, g in gradients])
    except BaseException:
        step.undo()
        raise
    return loss.detach().mean()


def grad_and_value(
    model: nn.Module, loss_fn: Callable[..., Any], x: Any, y: Any = None
) -> tuple[dict[str, Tensor], Tensor]:
    """See ``hzo.grad_and_value``."""
    step, loss = recorded_loss(model, loss_fn, x, y)
    try:
        gradients = {id(leaf): g for leaf, g in step.gradients(loss)}
    except BaseException:
        step.undo()
        raise
    named = {name: p for name, p in model.named_parameters() if id(p) in gradients}
    if isinstance(loss_fn, nn.Module):
        named |= {f"loss_fn.{name}": p for name, p in loss_fn.named_parameters() if id(p) in gradients}
    return {name: gradients[id(p)].to(p.dtype).contiguous() for name, p in named.items()}, loss.detach().mean()

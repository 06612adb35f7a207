"""A model, a loss function and a batch, recorded and differentiated: what ``hzo.backward`` is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo.distributed import averaged, refuse_wrappers, unwrapped
from hzo.errors import InputError, NonFiniteError
from hzo.reverse.step import Gradients, RecordedStep, record
from hzo.tracing import call_arguments


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
    x, y = pytree.tree_map_only(Tensor, as_data, (x, y))
    refuse_wrappers(model)
    model = unwrapped(model)
    args, kwargs = call_arguments(x)
    modules = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
    with record(*modules, keep=keep) as step:
        output = model(*args, **kwargs)
        loss = loss_fn(output) if y is None else loss_fn(output, y)
        if not isinstance(loss, Tensor):
            raise InputError(
                f"expected loss_fn to return a tensor (one number, or one a sample), got {type(loss).__name__}; a "
                "score without a derivative goes through hzo.smoothed"
            )
    return step, loss


def as_data(tensor: Tensor) -> Tensor:
    """What hangs on a history from before is data here; autograd cannot take tensors made in inference mode."""
    tensor = tensor if tensor.is_leaf or not tensor.requires_grad else tensor.detach()
    return tensor.clone() if tensor.is_inference() else tensor


def gradients_of(
    model: Callable[..., Any], loss_fn: Callable[..., Any], x: Any, y: Any = None
) -> tuple[Gradients, Tensor]:
    """Every leaf that the loss depends on, with its gradient, and the mean loss without a history.

    On an error everything that the model changed is put back.
    """
    step, loss = recorded_loss(model, loss_fn, x, y)
    try:
        return averaged(model, step.gradients(loss)), loss.detach().mean()
    except BaseException:
        step.undo()
        raise


def named(gradients: Gradients, model: nn.Module, loss_fn: Any) -> dict[str, Tensor]:
    """Gradients by the names of parameters: of the model, and of the loss where that is a module (``loss_fn.…``)."""
    found = {id(leaf): g for leaf, g in gradients}
    names = [*model.named_parameters()]
    if isinstance(loss_fn, nn.Module):
        names += [(f"loss_fn.{name}", p) for name, p in loss_fn.named_parameters()]
    return {name: torch.empty_like(p, requires_grad=False).copy_(found[id(p)]) for name, p in names if id(p) in found}

"""A model, a loss function and a batch, recorded and differentiated: what ``hzo.backward`` is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo._options import function
from hzo.distributed import averaged, refuse_wrapped_loss, refuse_wrappers, unwrapped
from hzo.errors import InputError, NonFiniteError
from hzo.reverse.step import LeafGradients, RecordedStep, record
from hzo.tape.state import captured
from hzo.tape.surroundings import refuse_transforms
from hzo.tracing import call_arguments


def recorded_loss(
    model: Callable[..., Any], loss_fn: Callable[..., Any], x: Any, y: Any, keep: bool = False
) -> tuple[RecordedStep, Tensor]:
    """The model's loss on a batch, recorded.

    Raises:
        InputError: the loss is no tensor of floating-point numbers. NonFiniteError: NaN or infinity in the input.
    """
    check_model_and_input(model, loss_fn, x)
    x, y = pytree.tree_map_only(Tensor, as_data, (x, y))
    refuse_wrappers(model)
    refuse_wrapped_loss(loss_fn)
    model = unwrapped(model)
    args, kwargs = call_arguments(x)
    modules = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
    with record(*modules, keep=keep) as step:
        step.remember(model, loss_fn)
        loss = loss_of(loss_fn, _output(model, x, args, kwargs), y)
    return step, loss


def loss_of(loss_fn: Callable[..., Any], output: Any, y: Any) -> Tensor:
    """Call a loss: ``loss_fn(output, y)``, or ``loss_fn(output)`` where there is no target.

    Raises:
        InputError: it returned no tensor.
    """
    loss = loss_fn(output) if y is None else loss_fn(output, y)
    if not isinstance(loss, Tensor):
        raise InputError(
            f"expected loss_fn to return a tensor (one number, or one a sample), got {type(loss).__name__}; a "
            "score without a derivative goes through hzo.smoothed"
        )
    return loss


def check_model_and_input(model: Any, loss_fn: Any, x: Any) -> None:
    """What would fail somewhere inside, and can be said before.

    Raises:
        InputError: model or loss cannot be called, or hold no numbers. NonFiniteError: NaN or infinity in the input.
    """
    function("the model", model)
    function("loss_fn", loss_fn)
    parameters = model.named_parameters() if isinstance(model, nn.Module) else []
    for name, parameter in parameters:
        if nn.parameter.is_lazy(parameter):
            continue  # gets its shape in the first call
        if parameter.is_meta:
            raise InputError(
                f"the parameter {name} is on the meta device and holds no numbers; load or make them first"
            )
        if parameter.is_inference():
            raise InputError(
                f"the parameter {name} was made under torch.inference_mode(), where PyTorch keeps no track of it; "
                "make the model outside of it"
            )
    check_input(x)


def check_input(x: Any) -> None:
    """Whether an input holds numbers that a step can be taken from.

    Raises:
        InputError: tensors without numbers, or nested ones. TapeError: called inside of a transform of ``torch.func``.
        NonFiniteError: NaN or infinity; where there are several inputs, one may hold minus infinity, as masks do.
    """
    refuse_transforms()
    tensors = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        if not tensor.is_floating_point():
            continue
        if tensor.is_nested:
            raise InputError(
                "the input x is a nested tensor, which hzo does not follow; pad it: x.to_padded_tensor(0.0)"
            )
        if tensor.is_meta:
            raise InputError("the input x is on the meta device and holds no numbers; give real data")
        if tensor.layout != torch.strided or captured(tensor):
            continue  # what comes of a sparse one is looked at in the loss
        finite = tensor.isfinite()
        if len(tensors) > 1:
            finite |= tensor.isneginf()
        if not bool(finite.all()):
            raise NonFiniteError("the input x holds NaN or infinity; clean the data before training on it")


def _output(model: Callable[..., Any], x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's result; where it was given no tensor and fails, this is said."""
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(x)):
            raise
        raise InputError(
            f"the model could not be called with x, a {type(x).__name__} without a tensor in it: {error}. Give "
            "tensors, such as torch.as_tensor(x); a list or tuple is passed as positional, a dict as keyword "
            "arguments"
        ) from error


def as_data(tensor: Tensor) -> Tensor:
    """What hangs on a history from before is data here; autograd cannot take tensors made in inference mode."""
    tensor = tensor if tensor.is_leaf or not tensor.requires_grad else tensor.detach()
    return tensor.clone() if tensor.is_inference() else tensor


def gradients_of(
    model: Callable[..., Any],
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any = None,
    together: Callable[[LeafGradients, Tensor], tuple[LeafGradients, Tensor]] | None = None,
    keep: bool | None = False,
) -> tuple[LeafGradients, Tensor]:
    """Every leaf that the loss depends on, with its gradient, and the mean loss without a history.

    Args:
        together: what processes make of their gradients and losses; None averages where a wrapper of the model would.
        keep: whether what was measured is kept for the next gradient, see ``RecordedStep.backward``.

    On an error everything that the model changed is put back.
    """
    step, loss = recorded_loss(model, loss_fn, x, y)
    try:
        gradients, mean = step.gradients(loss, keep=keep), loss.detach().mean()
        return (averaged(model, gradients), mean) if together is None else together(gradients, mean)
    except BaseException:
        step.undo()
        raise


def gradients_by_name(gradients: LeafGradients, model: nn.Module, loss_fn: Any) -> dict[str, Tensor]:
    """Gradients by the names of parameters: of the model, and of the loss where that is a module (``loss_fn.…``)."""
    found = {id(leaf): g for leaf, g in gradients}
    names = [*model.named_parameters()]
    if isinstance(loss_fn, nn.Module):
        names += [(f"loss_fn.{name}", p) for name, p in loss_fn.named_parameters()]
    return {name: _owned(found[id(p)], p) for name, p in names if id(p) in found}


def _owned(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient in memory of its own, which lies as the parameter does, or is sparse as autograd's would be."""
    return gradient.clone() if gradient.is_sparse else torch.empty_like(like, requires_grad=False).copy_(gradient)

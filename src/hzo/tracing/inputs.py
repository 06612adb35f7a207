"""What a model is called with: arguments, batch size, and what a trace of it depends on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from hzo.errors import InputError
from hzo.tape.marks import marks_of
from hzo.tracing.arguments import tensors_in
from hzo.tracing.promises import untouched

_OPTIONS = (bool, float, str)


def call_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with ``x``: a tuple or list as positional, a dict as keyword arguments."""
    if isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence):
        return tuple(x), {}
    if isinstance(x, dict):
        return (), x
    return (x,), {}


def requires_gradient(tensor: Tensor) -> bool:
    """Whether an input is asked for a gradient: a leaf, as for autograd; what hangs on another graph counts as data."""
    return tensor.requires_grad and tensor.is_leaf and tensor.is_floating_point()


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The size of dimension 0, which all input tensors share."""
    if any(isinstance(given, PackedSequence) for given in (*args, *kwargs.values())):
        raise InputError(
            "a PackedSequence holds no batch in dimension 0, which a plan needs; pack inside the model, or take the "
            "gradient without a plan (hzo.backward(model, ...) or hzo.record())"
        )
    tensors = tensors_in((args, kwargs))
    if not tensors:
        raise InputError("expected a tensor with the batch first among the model's inputs, got none")
    sizes = {tuple(t.shape[:1]) for t in tensors}
    if len(sizes) != 1 or () in sizes:
        shapes = [tuple(t.shape) for t in tensors]
        raise InputError(f"expected inputs with one batch size in dimension 0, got shapes {shapes}")
    (size,) = sizes.pop()
    if size == 0:
        raise InputError("got a batch of zero samples; a gradient needs at least one")
    return int(size)


def check_dense(x: Any) -> None:
    """InputError where an input is sparse or nested: a plan moves single elements of every sample."""
    tensors = tensors_in(call_arguments(x))
    layouts = {t.layout for t in tensors} - {torch.strided}
    if layouts or any(t.is_nested for t in tensors):
        kind = str(layouts.pop()).removeprefix("torch.") if layouts else "nested tensor"
        raise InputError(
            f"expected dense inputs, whose samples a plan can move one by one, got a {kind} one; take the gradient "
            "without a plan (hzo.backward(model, ...) or hzo.record()), or give x.to_dense()"
        )


def signature(module: nn.Module, x: Any) -> tuple[Any, ...]:
    """What a trace depends on: modules and their modes, trainable parameters, inputs but for their batch size."""
    args, kwargs = call_arguments(x)
    flat, structure = pytree.tree_flatten((args, kwargs))
    inputs = tuple(
        (tuple(t.shape[1:]), t.dtype, str(t.device), requires_gradient(t)) if isinstance(t, Tensor) else repr(t)
        for t in flat
    )
    # What a forward pass branches on in Python is recorded as it was; whole numbers are left out, as calls are counted.
    modules = tuple(
        (id(m), untouched(m), marks_of(m), *((k, v) for k, v in vars(m).items() if type(v) in _OPTIONS))
        for m in module.modules()
    )
    # Which parameters are one and the same matters, not which tensors hold their values: those may be swapped.
    first: dict[int, int] = {}
    trainable = tuple(
        (first.setdefault(id(p), k), p.requires_grad, p.dtype, tuple(p.shape))
        for k, (_, p) in enumerate(module.named_parameters(remove_duplicate=False))
    )
    device = tensors_in((args, kwargs))[0].device.type if tensors_in((args, kwargs)) else "cpu"
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (str(structure), inputs, modules, trainable, autocast)

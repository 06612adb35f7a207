"""Layers that compute something else than their type says: a chip's gain, a rotated kernel, an offset."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function, resolve_name


class Hardware(TorchFunctionMode):
    """Inside, functions of these names return what ``changes[name](function, *args, **kwargs)`` does."""

    def __init__(self, **changes):
        super().__init__()
        self.changes = changes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = (resolve_name(func) or getattr(func, "__name__", "")).rsplit(".", 1)[-1]
        change = self.changes.get(name)
        return func(*args, **(kwargs or {})) if change is None else change(func, *args, **(kwargs or {}))


class Opaque(nn.Module):
    """A function of the user's own, seen as one operation."""

    hzo_opaque = True

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def ramp(tensor, dim=-1):
    """Another offset or gain for every index along a dimension, like a tensor: 1, 1.1, 1.2, …"""
    sizes = [1] * tensor.dim()
    sizes[dim] = tensor.shape[dim]
    return 1 + 0.1 * torch.arange(tensor.shape[dim], dtype=tensor.dtype).view(sizes)


def as_torch_function(function):
    """A function that a trace sees as one operation, as it sees torch's own."""

    def call(*args, **kwargs):
        tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        if has_torch_function(tensors):
            return handle_torch_function(call, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return call

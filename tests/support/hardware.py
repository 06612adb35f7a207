"""Layers that compute something else than their type says: a chip's gain, a rotated kernel, an offset."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from hzo.tape.marks import Marks


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

    hzo_marks = Marks()

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


class Lying(TorchDispatchMode):
    """Inside, an ATen operator returns what ``lie(operator, *args)`` does, below whoever records or runs it."""

    def __init__(self, operator, lie):
        super().__init__()
        self.operator, self.lie = operator, lie

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not self.operator:
            return func(*args, **(kwargs or {}))
        return self.lie(func, *args, **(kwargs or {}))

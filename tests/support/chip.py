"""Hardware at the level of ATen: it holds the weights, and its operators return something else than their name says."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hzo.reverse import record


class Chip(TorchDispatchMode):
    """Inside, the operators ``changes`` return what ``changes[operator](result)`` says, with the weights held here.

    What stands in the parameters themselves is not a number, so that a rule that reads one of them is found out. Calls
    that read none of the weights are no business of the chip's.
    """

    def __init__(self, changes, weights):
        super().__init__()
        self.changes = changes
        self.held = {w.untyped_storage().data_ptr(): w.detach().clone() for w in weights}
        self.calls = 0
        with torch.no_grad():
            for w in weights:
                w.fill_(torch.nan)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        change = self.changes.get(func)
        if change is None:
            return func(*args, **(kwargs or {}))
        found = []

        def swapped(tensor):
            held = self.held.get(tensor.untyped_storage().data_ptr())
            if held is None or tensor.device.type == "meta":
                return tensor
            found.append(tensor)
            return held.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        given = tree_map_only(torch.Tensor, swapped, args)
        if not found:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        result = func(*given, **(kwargs or {}))
        return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)


def follows(function, on_chip, leaves, weights, changes, *, tolerance=1e-9):
    """The cotangents of activations must be those of ``on_chip``, the chip's arithmetic written out for autograd.

    Args:
        function: from leaves to a tensor, as a user writes it. weights: positions of the leaves that the chip holds.
        changes: by ATen operator what the chip does to its result.
    """
    leaves = [
        nn.Parameter(t.detach().clone()) if k in weights else t.detach().clone().requires_grad_()
        for k, t in enumerate(leaves)
    ]
    expected_result = on_chip(*leaves)
    factor = torch.randn(expected_result.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    factor = factor.to(expected_result.dtype)
    activations = [t for k, t in enumerate(leaves) if k not in weights]
    expected = torch.autograd.grad((expected_result * factor).sum(), activations)
    plain = torch.autograd.grad((function(*leaves) * factor).sum(), activations)
    with Chip(changes, [leaves[k] for k in weights]) as chip, record() as step:
        result = function(*leaves)
        loss = (result * factor).sum()
    assert torch.allclose(result, expected_result), "the chip is not what was written out"
    with chip:
        found = {id(leaf): g for leaf, g in step.gradients(loss)}
    assert chip.calls >= 2, "nothing was measured"
    for leaf, g, without in zip(activations, expected, plain, strict=True):
        error = float((found[id(leaf)] - g).norm() / g.norm())
        assert error <= tolerance, f"off by {error:.1e}"
        assert float((g - without).norm() / g.norm()) > 0.01, "the chip does what the type says"


def ramp(tensor, dim=-1):
    """Another gain for every index along a dimension: 1, 1.1, 1.2, …"""
    sizes = [1] * tensor.dim()
    sizes[dim] = tensor.shape[dim]
    return 1 + 0.1 * torch.arange(tensor.shape[dim], dtype=tensor.dtype).view(sizes)

"""Compares the gradients of a recorded step with autograd's, in float64."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor

from hzo.reverse import record
from hzo.rules.registry import kind_of


def leaves_of(*shapes, dtype=torch.float64, positive=False):
    """Random leaves that require a gradient."""
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [(t.abs() + 0.3 if positive else t).requires_grad_() for t in made]


def check(function, leaves, *, tolerance=1e-9, weights=(), calls=None, seed=3, dropped=True):
    """``function(*leaves)`` must have autograd's gradient in every leaf, by the rule of each call.

    Args:
        function: from leaves to a tensor or a tuple of tensors; a random linear functional of the results is the loss.
        leaves: tensors that require a gradient.
        weights: positions of leaves that stand for weights (``nn.Parameter``): what is carried past them is measured.
        calls: names of operators (``"aten.mm.default"``) that the recording must contain, so that the case tests them.
    """

    def fresh():
        return [
            torch.nn.Parameter(t.detach().clone()) if k in weights else t.detach().clone().requires_grad_()
            for k, t in enumerate(given)
        ]

    given = leaves
    leaves, copies = fresh(), fresh()  # what was recorded must stay as it was until its gradient is taken

    def loss_of(results):
        generator = torch.Generator().manual_seed(seed)
        total = 0
        for r in results if isinstance(results, (tuple, list)) else (results,):
            if not isinstance(r, Tensor) or not r.requires_grad:
                continue
            real = torch.view_as_real(r.resolve_conj()) if r.is_complex() else r
            weights = torch.randn(real.shape, generator=generator, dtype=torch.float64)
            total = total + (real * weights.to(real.dtype)).sum()
        return total

    torch.manual_seed(seed)
    with record() as step:
        loss = loss_of(function(*leaves))
    torch.manual_seed(seed)
    expected_loss = loss_of(function(*copies))
    assert torch.equal(loss.detach(), expected_loss.detach()) or torch.allclose(loss, expected_loss)
    expected = torch.autograd.grad(expected_loss, copies, allow_unused=True)
    names = {op.name for op in step.tape.operations}
    for name in calls or ():
        assert name in names, f"{name} was not called; recorded: {sorted(names)}"
    missing = [op.name for op in step.tape.operations if kind_of(op.target) not in ("rule", "custom Function")]
    assert not missing, f"without a rule of their own: {missing}"
    compare(step, loss, leaves, expected, tolerance)
    if not dropped:
        return
    # Once more where operands and results are dropped, and released at once as far as rules are declared lean.
    torch.manual_seed(seed)
    with patch("hzo.tape.record._CANDIDATES", 1), record() as step:
        loss = loss_of(function(*[leaf if k in weights else leaf.clone() for k, leaf in enumerate(leaves)]))
        for _ in range(3):
            loss = loss + 0
    compare(step, loss, leaves, expected, tolerance)


def compare(step, loss, leaves, expected, tolerance):
    """The gradients of a recorded step must be those of autograd, ``expected``."""
    found = {id(leaf): g for leaf, g in step.gradients(loss)}
    for k, (leaf, g) in enumerate(zip(leaves, expected, strict=True)):
        got = found.get(id(leaf))
        if g is None:
            assert got is None or not got.any(), f"leaf {k} has a gradient, and none by autograd"
            continue
        assert got is not None or not g.any(), f"leaf {k} has no gradient"
        if got is None:
            continue
        assert got.shape == g.shape
        assert got.dtype == g.dtype
        error = float((got - g).abs().max()) / max(float(g.abs().max()), 1e-6) if g.numel() else 0.0
        assert error <= tolerance, f"leaf {k} is off by {error:.1e}"

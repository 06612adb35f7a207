"""Contributions to one cotangent are added in place where nobody else knows the first of them, and only there."""

import pytest
import torch
from torch import nn

import hzo


def branches(x, w):
    """Sums whose terms get one cotangent between them, views of it, and broadcast ones."""
    h = torch.tanh(x)
    a = h + h.sin()  # both get the same tensor
    b = a.t().reshape(-1).view(3, 4) + a.view(4, 3).t().reshape(3, 4)  # views of it
    c = h.sum(0, keepdim=True).expand(3, 4) + h.mean()  # broadcast
    return (b * c).sum() + (h @ w).square().sum() + a.exp().mean() + h.sum()


def test_sums_of_branches():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))
    with hzo.record() as tape:
        loss = branches(x, w)
    tape.backward(loss)
    for leaf, expected in zip((x, w), torch.autograd.grad(branches(x, w), (x, w)), strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)


def test_what_a_hook_keeps_does_not_change():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(backward):
        kept = []
        h = x.tanh()
        last = h + 0
        last.register_hook(kept.append)  # handed on to h, which gets more
        backward((last.square() + h.sin() * h + h).sum())
        return kept

    losses = []
    with hzo.record() as tape:
        kept = run(losses.append)
    tape.backward(losses[0])
    expected = run(lambda loss: loss.backward())
    assert len(kept) == len(expected) == 1
    torch.testing.assert_close(kept[0], expected[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("keep", [False, True])
def test_a_seed_that_is_the_users_does_not_change(keep):
    """The cotangent that autograd hands over to a module of hzo's stays as it is."""
    torch.manual_seed(0)

    class Doubled(nn.Module):
        def forward(self, x):
            y = x * 1
            return y, y + x

    x = torch.randn(5, requires_grad=True)
    first, second = hzo.module(Doubled())(x)
    g, h = torch.ones(5), torch.full((5,), 2.0)
    torch.autograd.backward((first, second), (g, h), retain_graph=keep)
    assert bool((g == 1).all())
    assert bool((h == 2).all())
    torch.testing.assert_close(x.grad, torch.full((5,), 5.0))

"""The VJP that each promise allows, of modules whose code is not looked at: as autograd has it, counted as planned."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo

BATCH = 5


class Elementwise(nn.Module):
    def forward(self, x):
        return torch.sin(2 * x) + x


class Affine(nn.Module):
    """Not a Linear to anybody who reads types."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(4, 6))

    def forward(self, x):
        return torch.stack([row @ x.T for row in self.matrix], 1) + 0.5


class Tokens(nn.Module):
    """The same curved map of every token's vector."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(3, 3))

    def forward(self, x):
        return torch.tanh(x @ self.matrix) * x


class Reindexing(nn.Module):
    def forward(self, x):
        return F.pad(x.flip(1)[:, ::2], (1, 0))


class Symmetric(nn.Module):
    """The gradient of a scalar: its Jacobian is a Hessian."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(6, 6))

    def forward(self, x):
        return torch.tanh(x @ self.matrix) @ self.matrix.T


class Stationary(nn.Module):
    """A convolution that nobody calls one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.randn(2, 2, 3))

    def forward(self, x):
        padded = F.pad(x, (1, 1))
        shifted = [padded[..., k : k + x.shape[-1]] for k in range(3)]
        return sum(torch.einsum("oi,bit->bot", self.kernel[..., k], shifted[k]) for k in range(3))


CASES = {
    "elementwise": (Elementwise, ("elementwise",), (6,)),
    "affine": (Affine, ("affine",), (6,)),
    "tokens": (Tokens, ("tokens",), (4, 3)),
    "reindexing": (Reindexing, ("reindexing",), (6,)),
    "symmetric": (Symmetric, ("symmetric",), (6,)),
    "stationary": (Stationary, ("affine", "stationary", hzo.Local(2, -1, 1)), (2, 9)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_promise_carries_the_cotangent(name):
    make, promises, shape = CASES[name]
    torch.manual_seed(0)
    before = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), torch.Size(shape).numel()))
    model = nn.Sequential(before, nn.Unflatten(1, shape), hzo.declare(make(), *promises)).double()
    x = torch.randn(BATCH, *shape, dtype=torch.float64)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain)
    with hzo.count_queries() as count:
        found, _ = hzo.grad_and_value(chain, lambda out: out.square().flatten(1).sum(1), x, plan=plan)
    exact = torch.autograd.grad(model(x).square().flatten(1).sum(1).mean(), list(model.parameters()))
    for (key, _), g in zip(model.named_parameters(), exact, strict=True):
        torch.testing.assert_close(found[key], g, rtol=1e-7, atol=1e-7)
    assert (count.queries, count.forward_equivalents) == (plan.queries, pytest.approx(plan.forward_equivalents))
    (node,) = [n for n in plan.nodes if n.operations and any(chain.traced.operations[k].module for k in n.operations)]
    alone = hzo.plan(hzo.trace(nn.Sequential(before, nn.Unflatten(1, shape), hzo.declare(make())).double(), x))
    if name != "symmetric":  # black boxes move along the cotangent itself; plans do not use it
        assert plan.queries < alone.queries
    assert len(node.operations) == 1


@pytest.mark.parametrize("name", [name for name in CASES if name != "elementwise"])
def test_a_lie_shows(name):
    """Affine of what is curved, and so on: the checker finds every promise broken on a module that breaks it."""
    _, promises, shape = CASES[name]

    class Liar(nn.Module):
        def forward(self, x):
            return x.flatten(1).cumsum(1).sin().view(x.shape) * x.flip(1)

    model = hzo.declare(Liar(), *promises)
    with pytest.raises(hzo.errors.StructureError):
        hzo.check_structure(nn.Sequential(model), torch.randn(BATCH, *shape, dtype=torch.float64))

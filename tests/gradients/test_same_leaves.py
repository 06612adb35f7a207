"""A kept plan goes on where layers alike change places: gradients belong to the parameters that ran."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from support.oracles import normal

PLANS = [
    {"tree": "stagewise"},
    {"tree": "bisect", "assume": "nothing"},
    {"tree": "planned", "assume": "structure", "scheme": "central"},
]


class Ordered(nn.Module):
    """Layers of one shape, run in the order that it is told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.last = nn.ModuleList(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 3)
        self.order = (0, 1, 2)

    def forward(self, x):
        for k in self.order:
            x = torch.tanh(self.layers[k](x))
        return self.last(x)


def exact(model, x, y):
    model.zero_grad()
    F.mse_loss(model(x), y).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("options", PLANS, ids=str)
@pytest.mark.parametrize("frozen", [(), (1,)], ids=["all are trained", "one is frozen"])
def test_gradients_belong_to_what_ran(options, frozen):
    model = Ordered().double()
    for k in frozen:
        model.layers[k].requires_grad_(False)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 2), (1, 1, 0), (0, 1, 2)):
        model.order = order
        x, y = normal(6, 5), normal(6, 3)
        expected = exact(model, x, y)
        found, _ = hzo.grad_and_value(model, F.mse_loss, x, y, **options)
        hzo.backward(model, F.mse_loss, x, y, **options)
        added = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for gradients in (found, added):
            assert gradients.keys() == expected.keys()
            for name, g in expected.items():
                torch.testing.assert_close(gradients[name], g, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", [{}, *PLANS])
def test_a_tensor_that_is_given_twice_has_one_gradient(options):
    """Twice as an input, or as an input that the loss reads, too, or as an input that is a parameter of the model."""
    torch.manual_seed(0)
    a, b = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x, y):
            return self.a(x) * torch.tanh(self.b(y))

    x, target = normal(5, 5).requires_grad_(), normal(5, 5)

    def loss(out, y):
        return (out - y).square().mean() + x.square().mean()

    for given in ((x, x), (a.weight, x), (a.weight, a.weight)):
        leaves = [x, *a.parameters(), *b.parameters()]
        expected = torch.autograd.grad(loss(Product()(*given), target), leaves)
        for leaf in leaves:
            leaf.grad = None
        hzo.backward(Product(), loss, given, target, **options)
        for leaf, g in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, g, rtol=1e-4, atol=1e-7)

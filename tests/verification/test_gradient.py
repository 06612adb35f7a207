"""``check_gradient`` and ``compare_gradients``: they pass what is right, and name what is wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from support.state import assert_same, state


def network():
    torch.manual_seed(0)
    layers = (nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    return nn.Sequential(*layers), torch.randn(16, 5), torch.randint(3, (16,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_right_gradient_agrees(dtype):
    model, x, y = network()
    found = hzo.check_gradient(model.to(dtype), F.cross_entropy, x.to(dtype), y)
    assert found.holds, str(found)
    assert not found.wrong
    assert abs(found.ratio - 1) < (1e-6 if dtype == torch.float64 else 1e-2)
    assert "agrees" in str(found)


@pytest.mark.parametrize("name", ["0.weight", "1.bias", "4.bias"])
def test_a_wrong_gradient_is_found_where_it_is(name):
    model, x, y = network()
    model, x = model.double(), x.double()
    torch.manual_seed(5)
    gradient, _ = hzo.grad_and_value(copy.deepcopy(model), F.cross_entropy, x, y)
    gradient[name] = gradient[name] * 1.1
    torch.manual_seed(5)
    found = hzo.check_gradient(model, F.cross_entropy, x, y, gradient=gradient)
    assert not found.holds
    assert [slope.direction for slope in found.wrong] == [name]
    assert name in str(found)


def test_a_function_whose_backward_is_not_its_derivative():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, g):
            return g / 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(Half.apply(torch.tanh(self.a(x))))

    torch.manual_seed(0)
    found = hzo.check_gradient(Net().double(), F.cross_entropy, torch.randn(6, 5).double(), torch.randint(3, (6,)))
    assert sorted(slope.direction for slope in found.wrong) == ["a.bias", "a.weight"]


@pytest.mark.parametrize("check", [hzo.check_gradient, hzo.compare_gradients])
def test_leaves_no_trace(check):
    model, x, y = network()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = state(model)
    with hzo.count_queries() as count:
        check(model, F.cross_entropy, x, y)
    assert_same(before, state(model))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert count.queries == count.base_evaluations == 0
    assert count.check_evaluations > 0


def test_nothing_to_check():
    model, x, y = network()
    with pytest.raises(hzo.errors.InputError, match="no gradient to test"):
        hzo.check_gradient(model, F.cross_entropy, x, y, gradient={})


def test_comparison_with_backprop():
    model, x, y = network()
    found = hzo.compare_gradients(model.double(), F.cross_entropy, x.double(), y)
    assert found.cosines.keys() == {name for name, _ in model.named_parameters()}
    # A bias before BatchNorm has a gradient of zero by theory, and rounding in both.
    assert min(c for name, c in found.cosines.items() if name != "0.bias") > 1 - 1e-12
    assert "1 − cosine" in str(found)


class Complex(nn.Module):
    def __init__(self, function=lambda z: z):
        super().__init__()
        self.function = function
        self.calls = 0
        self.weight = nn.Parameter(torch.randn(3, 5, dtype=torch.complex128))

    def forward(self, x):
        self.calls += 1
        return (self.function(self.weight * 1) @ x.T.to(torch.complex128)).abs().T


def test_complex_parameters():
    """Along real and imaginary parts: a gradient with the sign of one of them turned is wrong."""

    class Conjugate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, g):
            return g.conj()

    torch.manual_seed(0)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    model = Complex()
    assert hzo.check_gradient(model, F.mse_loss, x, y).holds
    assert hzo.compare_gradients(model, F.mse_loss, x, y).cosine > 1 - 1e-12
    gradient, _ = hzo.grad_and_value(model, F.mse_loss, x, y)
    turned = {"weight": gradient["weight"].conj().resolve_conj()}
    assert not hzo.check_gradient(model, F.mse_loss, x, y, gradient=turned).holds
    assert hzo.compare_gradients(model, F.mse_loss, x, y, gradient=turned).cosine < 0.9
    found = hzo.check_gradient(Complex(Conjugate.apply), F.mse_loss, x, y)
    assert not found.holds
    assert "Conjugate" in str(found)


def test_a_model_that_counts_its_calls_counts_none():
    model, x, y = Complex(), torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    assert hzo.check_gradient(model, F.mse_loss, x, y).holds
    assert model.calls == 0


class Counting(nn.Module):
    """A model, or a loss, that keeps track of its calls in all kinds of attributes, and writes to what it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.calls, self.history, self.cache = 0, [], None
        self.table = {"n": 0, "inner": [0]}

    def forward(self, x, y=None):
        self.calls += 1
        self.history.append(self.calls)
        self.table["n"] += 1
        self.table["inner"].append(self.calls)
        self.cache = torch.ones(3) if self.cache is None else self.cache
        found = self.norm(self.layer(x.mul_(0.5) if y is None else x))
        return found if y is None else (found - y.mul_(0.5)).square().mean()


@pytest.mark.parametrize("check", [hzo.check_gradient, hzo.compare_gradients])
def test_nothing_that_modules_hold_has_changed(check):
    """Of the model and of the loss; nor have the input, its ``.grad``, and that of the loss's parameters."""
    model, loss = Counting().double(), Counting().double()
    x = torch.randn(8, 3, dtype=torch.float64)
    y = torch.randn(8, 3, dtype=torch.float64)
    loss.layer.weight.grad, model.norm.bias.grad = torch.ones(3, 3).double(), torch.ones(3).double()

    def held():
        found = [x.tolist(), y.tolist(), x.grad]
        for module in (model, loss):
            found += [module.calls, [*module.history], module.cache, str(module.table)]
            found += [(p.tolist(), None if p.grad is None else p.grad.tolist()) for p in module.parameters()]
            found += [b.tolist() for b in module.buffers()]
        return found

    before = held()
    result = check(model, loss, x, y)
    assert held() == before
    assert result.holds if check is hzo.check_gradient else result.cosine > 1 - 1e-9

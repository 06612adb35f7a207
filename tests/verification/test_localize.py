"""``check_gradient`` names the call whose cotangent is wrong: by bisection over the boundaries between calls."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.rules.base import rules

aten = torch.ops.aten


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.embed(x)
        return self.head((hidden + self.block(hidden)).sigmoid())


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    return Network().to(dtype), F.cross_entropy, torch.randn(6, 5, dtype=dtype), torch.randint(3, (6,))


def falsify(monkeypatch, target, key, factor=1.05):
    """The rule of an operator gives a cotangent that is too large for one of its operands."""
    right = rules[target]

    def wrong(call):
        found = dict(right.vjp(call))
        if found.get(key) is not None:
            found[key] = found[key] * factor
        return found

    monkeypatch.setitem(rules, target, dataclasses.replace(right, vjp=wrong))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("target", "key", "module"),
    [
        (aten.sigmoid.default, 0, ""),
        (aten.gelu.default, 0, "block.2"),
        (aten.native_layer_norm.default, 0, "block.0"),
        (aten.native_layer_norm.default, 2, "block.0"),  # a weight's
        (aten._log_softmax.default, 0, ""),
    ],
)
def test_the_call_is_named(monkeypatch, dtype, target, key, module):
    model, loss_fn, x, y = problem(dtype)
    falsify(monkeypatch, target, key, 1.5 if dtype == torch.float32 else 1.05)
    found = hzo.check_gradient(model, loss_fn, x, y)
    assert not found.holds
    assert found.operation.operations == (str(target),)
    assert found.operation.module == module
    assert f"begins, from the loss back, in:\n  {target}" in str(found)


def test_a_call_of_many(monkeypatch):
    """The same operator many times, of which one is wrong: the count says which."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(4, 4), nn.Tanh()))).double()
    right, seen = rules[aten.tanh.default], []

    def wrong(call):
        seen.append(call.op.index)
        factor = 1.1 if call.op.index == 3 * 7 + 2 else 1.0
        return {k: g * factor for k, g in right.vjp(call).items()}

    monkeypatch.setitem(rules, aten.tanh.default, dataclasses.replace(right, vjp=wrong))
    loss_fn = lambda out: out.square().sum(1)  # noqa: E731
    found = hzo.check_gradient(model, loss_fn, torch.randn(3, 4, dtype=torch.float64))
    assert found.operation.module == "15"
    assert str(found.operation).startswith("aten.tanh.default in 15 (call 24 of ")


def test_a_declaration_that_lies_is_named_under_a_plan():
    class Shift(nn.Module):
        def forward(self, x):
            return torch.tanh(x) + 0.3 * x.roll(1, dims=-1)

    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), hzo.declare(Shift(), "elementwise"), nn.Linear(6, 2)
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(2, (5,))
    found = hzo.check_gradient(model, F.cross_entropy, x, y)
    assert not found.holds
    assert found.operation.operations == ("2",), str(found)


def test_nothing_is_named_where_the_gradient_was_given_and_ours_is_right():
    model, loss_fn, x, y = problem()
    gradient = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    found = hzo.check_gradient(model, loss_fn, x, y, gradient=gradient)
    assert not found.holds
    assert found.operation is None


def test_masks_do_not_hide_it(monkeypatch):
    """Bisection moves values in proportion to their size: a mask of -1e9 or -inf must not be all that it sees."""

    class Attention(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.q, self.v, self.mask = nn.Linear(4, 4), nn.Linear(4, 2), mask

        def forward(self, x):
            scores = (self.q(x) @ x.mT).masked_fill(torch.ones(3, 3).triu(1).bool(), self.mask)
            return (scores.softmax(-1) @ self.v(x).exp()).sum(1)

    falsify(monkeypatch, aten._softmax.default, 0)
    for mask in (-1e9, -torch.inf):
        torch.manual_seed(0)
        x, y = torch.randn(5, 3, 4, dtype=torch.float64), torch.randint(2, (5,))
        found = hzo.check_gradient(Attention(mask).double(), F.cross_entropy, x, y)
        assert found.operation.operations == ("aten._softmax.default",)

"""Operators that the table does not hold: a measured slope, with a step for every element."""

import pytest
import torch

import hzo
from hzo.reverse import step
from hzo.rules import registry
from hzo.rules.base import rules

aten = torch.ops.aten


@pytest.fixture
def without_rule(monkeypatch):
    def forget(*targets):
        for target in targets:
            monkeypatch.delitem(rules, target)
            assert registry.kind_of(target) == "slope"
        monkeypatch.setattr(step, "LEAN", registry.LEAN - set(map(id, targets)))  # a slope reads the operand

    return forget


@pytest.mark.parametrize(("target", "function"), [(aten.tanh.default, torch.tanh), (aten.sin.default, torch.sin)])
def test_slope(without_rule, target, function):
    without_rule(target)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    with hzo.record() as tape:
        loss = (function(x) * torch.arange(12.0, dtype=torch.float64).view(3, 4)).sum()
    tape.backward(loss)
    expected = torch.autograd.grad((function(x) * torch.arange(12.0, dtype=torch.float64).view(3, 4)).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-8, atol=1e-9)  # u^(2/3) of curvature and rounding, 4e-11


def test_steps_are_in_proportion_to_each_element(without_rule):
    """Of numbers from 1 to a million, of either sign, none takes its step from the others."""
    without_rule(aten.sinh.default)
    x = torch.tensor([-12.0, -9.0, -1e-3, 1e-3, 2e-3, 9.0, 12.0], dtype=torch.float64, requires_grad=True)
    with hzo.record() as tape:
        loss = torch.sinh(x).sum()
    tape.backward(loss)
    torch.testing.assert_close(x.grad, torch.cosh(x).detach(), rtol=1e-7, atol=0)

"""The price of a gradient, counted from shapes."""

import pytest
import torch
from torch import nn

from hzo_lab.zoo.operations import forward_equivalents


def test_a_linear_layer_costs_a_run_of_one_row_for_each_input_and_one_of_zeros():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)).double(), torch.randn(50, 6, dtype=torch.float64)
    found, share = forward_equivalents(lambda: model(x).sum())
    # The first layer's input is data. Both have products of 50 rows and a sum; the second is measured by 5 rows.
    second, first = 2 * 4 * 4 + 4, 2 * 6 * 4 + 4
    transposes, loss = 4 * 6 + 4 * 4, 1
    assert found == pytest.approx(5 * second / (50 * (first + second) + transposes + loss))
    assert share == 0


def test_calls_without_a_rule_go_by_queries(monkeypatch):
    weight = torch.ones(3, requires_grad=True)
    monkeypatch.setattr("hzo_lab.zoo.operations.kind_of", lambda target: "queries")
    assert forward_equivalents(weight.sum) == (0, 1)


def test_grad_stays_as_it_is():
    weight = torch.ones(3, requires_grad=True)
    forward_equivalents(lambda: torch.dot(weight, weight))
    assert weight.grad is None

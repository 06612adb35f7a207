"""The law of what probes cost, as a plan prints it: fixed for each layer, so that it falls as the batch grows."""

import re

import torch
from torch import nn

import hzo


def plan_of(model, x):
    return hzo.plan(hzo.trace(model, x))


def line_of(plan):
    (line,) = [text for text in str(plan).splitlines() if text.startswith("weights are measured")]
    return line


def test_a_linear_layer_takes_its_inputs_and_one():
    """(n + 1) / B of its own forward pass: every layer but the first, whose input needs no cotangent."""
    torch.manual_seed(0)
    n, layers, batch = 20, 5, 8
    model = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(n, n), nn.Tanh())))
    line = line_of(plan_of(model, torch.randn(batch, n)))
    queries, law, here = re.search(r"by ([\d,]+) queries.*: ([\d.]+) / B .*, ([\d.]+) here", line).groups()
    assert int(queries) == (layers - 1) * (n + 1)
    share_of_products = 1.0  # activations cost next to nothing
    expected = share_of_products * (layers - 1) / layers * (n + 1)
    assert abs(float(law) / expected - 1) < 0.1
    assert abs(float(here) - float(law) / batch) <= 0.06 * float(here)


def test_it_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    laws = [re.search(r"([\d.e+]+) / B", line_of(plan_of(model, torch.randn(b, 3, 8, 8)))).group(1) for b in (4, 32)]
    assert laws[0] == laws[1]


def test_the_layers_that_cost_most_come_first():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 6), nn.Tanh(), nn.Linear(6, 5),
        nn.Tanh(), nn.Linear(5, 5),
    )  # fmt: skip
    text = str(plan_of(model, torch.randn(4, 4))).splitlines()
    at = next(k for k, line in enumerate(text) if line.startswith("weights are measured"))
    queries = [int(re.search(r": (\d+) queries", line).group(1)) for line in text[at + 1 : at + 4]]
    assert queries == [31, 41, 7]
    assert text[at + 4].startswith("  … and 1 more")


def test_nothing_is_said_where_nothing_is_measured():
    model = nn.Sequential(nn.Linear(3, 3))
    assert "weights are measured" not in str(plan_of(model, torch.randn(2, 3)))

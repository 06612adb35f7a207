"""Slices that are alike are colored once, and only those."""

import torch
from torch import nn

import hzo
from hzo.plans import choice
from hzo.plans.alike import slice_key


def chain_of(*layers):
    return hzo.trace(nn.Sequential(*layers), torch.randn(2, 3, 8)).traced


def keys_of(graph):
    """Of every slice of two operations that a single value goes through."""
    found = []
    for first, second in zip(graph.operations, graph.operations[1:], strict=False):
        if first.batched and second.batched:
            value = next(v for v in first.reads if graph.values[v].batched)
            found.append(slice_key(graph, value, (first.index, second.index), second.writes))
    return found


def test_blocks_that_are_alike_have_one_key():
    graph = chain_of(*(layer for _ in range(4) for layer in (nn.Conv1d(3, 3, 3, padding=1), nn.Tanh())))
    keys = keys_of(graph)
    assert len(keys) == 7
    assert len(set(keys)) == 2, "a convolution and its activation, an activation and the next convolution"


def test_an_option_makes_a_difference():
    graph = chain_of(nn.Conv1d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 3, 3, padding=2, dilation=2), nn.Tanh())
    keys = keys_of(graph)
    assert keys[0] != keys[2]


def test_the_content_of_indices_makes_a_difference():
    class Picks(nn.Module):
        def __init__(self, places):
            super().__init__()
            self.register_buffer("places", torch.tensor(places))

        def forward(self, x):
            return x[..., self.places].tanh()

    graph = chain_of(Picks([0, 2, 4, 6]), Picks([3, 2, 1, 0]), Picks([0, 1, 2, 3]))
    keys = keys_of(graph)
    assert len(set(keys)) == len(keys)


def test_plans_are_those_of_slices_colored_one_by_one(monkeypatch):
    layers = [layer for _ in range(3) for layer in (nn.Conv1d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 3, 1))]
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 8)
    for assume in ("structure", "locality"):
        plan = hzo.plan(hzo.trace(model, x), assume=assume, tree="stagewise")
        with monkeypatch.context() as patched:
            patched.setattr(choice, "slice_key", lambda graph, *slice_: slice_)
            expected = hzo.plan(hzo.trace(model, x), assume=assume, tree="stagewise")
        assert [n.estimator for n in plan.nodes] == [n.estimator for n in expected.nodes]
        assert plan.cost == expected.cost

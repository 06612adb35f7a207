"""Activations that were released: whoever reads one by mistake must not get a number."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import NonFiniteError
from hzo.gradients import planned_pass as module
from hzo.gradients.forward_pass import base_pass

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


class Kinds(nn.Module):
    """Activations of each kind of dtype."""

    def forward(self, x):
        h = x.sin()
        order = h.argsort(1)
        return h.gather(1, order) * torch.where(h > 0, h, 2.0)


def test_a_released_activation_keeps_its_form_and_holds_nothing():
    chain = hzo.trace(Kinds(), X)
    activations, _ = base_pass(chain, X)
    graph = chain.traced
    before = list(activations.values)
    released = [v.index for v in graph.values if v.batched]
    activations.release(graph, released)
    kinds = set()
    for v in released:
        old, new = before[v], activations.tensor(v)
        assert (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
        assert new.untyped_storage().nbytes() == new.element_size(), "it takes memory"
        kinds.add(new.dtype)
        if new.is_floating_point():
            assert new.isnan().all()
        elif new.dtype == torch.int64:
            assert (new == torch.iinfo(torch.int64).min).all()
    assert kinds >= {torch.float64, torch.int64}


@pytest.mark.parametrize("options", [{"tree": "bisect", "assume": "nothing"}, {"tree": "stagewise"}], ids=str)
def test_a_schedule_that_releases_too_early_is_no_silent_gradient(options, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    y = torch.zeros(4, 2, dtype=torch.float64)
    hzo.backward(model, F.mse_loss, X, y, **options)
    model.zero_grad()
    right = module.schedule

    def early(graph, plan):
        steps = right(graph, plan)
        everything = tuple(v.index for v in graph.values if v.batched and v.producer >= 0)
        kept = tuple(v for v in everything if v not in graph.outputs)
        return replace(steps, base_pass=(*steps.base_pass[:-1], (*steps.base_pass[-1], *kept)))

    monkeypatch.setattr(module, "schedule", early)
    with pytest.raises(NonFiniteError):
        hzo.backward(model, F.mse_loss, X, y, **options)
    assert all(p.grad is None for p in model.parameters())

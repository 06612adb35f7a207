"""Under a plan: losses that read the model's weights, and losses that have parameters of their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo

WAYS = [{"tree": "bisect"}, {"tree": "flat", "assume": "nothing"}, {"assume": "locality"}]


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_penalty_on_weights(options):
    """What the loss adds by itself to a parameter, and to what is computed of parameters alone."""
    model, x, y = problem()

    def loss(out, y):
        return F.cross_entropy(out, y) + 0.1 * sum(p.square().sum() for p in model.parameters())

    found = hzo.compare_gradients(model, loss, x, y, **options)
    assert found.cosine > 1 - 1e-9
    assert max(found.errors.values()) < 1e-5


class Margins(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.centres = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(3, 3))

    def forward(self, out, y):
        return F.cross_entropy(self.scale * out @ self.centres, y)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_loss_with_parameters_of_its_own(options):
    model, x, y = problem()
    loss = Margins().double()
    hzo.backward(model, loss, x, y, **options)
    twin, same = copy.deepcopy(model), copy.deepcopy(loss)
    twin.zero_grad()
    same.zero_grad()
    same(twin(x), y).backward()
    for p, q in zip([*model.parameters(), *loss.parameters()], [*twin.parameters(), *same.parameters()], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)

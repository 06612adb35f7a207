"""Losses without a derivative: their smoothed gradients against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch import nn

import hzo
from hzo.errors import CoupledSamplesError, InputError, NonFiniteError

MU = 0.7


def above_zero(z, _=None):
    return (z[:, 0] > 0).float()


def slope(z):
    """Of E[H(z + mu·u)]."""
    return torch.exp(-((z / MU) ** 2) / 2) / (MU * math.sqrt(2 * math.pi))


def accuracy(z, y):
    return (z.argmax(1) == y).float()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("by_autograd", [True, False])
def test_unbiased(by_autograd, maximize):
    torch.manual_seed(0)
    points, samples, draws = torch.tensor([-1.0, 0.0, 0.4]), 3000, 4
    z = points.repeat(samples, 1).T.reshape(-1, 1).clone().requires_grad_()
    criterion = hzo.smoothed(above_zero, mu=MU, draws=draws, maximize=maximize)
    if by_autograd:
        criterion(z, torch.zeros(len(z))).backward()
        found = z.grad
    else:
        shift = nn.Identity()
        found = hzo.cotangents(hzo.Chain([shift]), criterion, z.detach(), torch.zeros(len(z)), boundaries="all")[-1]
    found = found.view(3, samples) * len(z) * (-1 if maximize else 1)
    exact = slope(points)
    spread = found.std(1) / samples**0.5
    assert ((found.mean(1) - exact).abs() / spread).max() < 4.5


def test_one_number_for_the_batch_is_unbiased():
    torch.manual_seed(0)
    points = torch.tensor([-1.0, 0.0, 0.4, 1.0])
    criterion, found = hzo.smoothed(lambda z, _: above_zero(z).mean(), mu=MU, draws=4000), []
    for _ in range(8):
        z = points[:, None].clone().requires_grad_()
        criterion(z, torch.zeros(4)).backward()
        found.append(z.grad[:, 0])
    spread = torch.stack(found).std(0) / 8**0.5
    assert ((torch.stack(found).mean(0) - slope(points) / 4).abs() / spread).max() < 7  # Student's t, of 7 degrees


def test_variance_falls_with_the_draws():
    torch.manual_seed(0)
    z = torch.zeros(4000, 1)
    variances = []
    for draws in (4, 16):
        leaf = z.clone().requires_grad_()
        hzo.smoothed(above_zero, mu=MU, draws=draws)(leaf, torch.zeros(len(z))).backward()
        variances.append(float(leaf.grad.var()))
    assert variances[0] / variances[1] == pytest.approx(4, rel=0.2)


def test_the_loss_is_the_score_itself():
    z, y = torch.eye(3), torch.tensor([0, 1, 0])
    assert float(hzo.smoothed(accuracy)(z, y)) == pytest.approx(2 / 3)
    assert float(hzo.smoothed(accuracy, maximize=True)(z.requires_grad_(), y).detach()) == pytest.approx(-2 / 3)


def test_evaluations_are_counted():
    z, y = torch.randn(6, 3, requires_grad=True), torch.arange(6) % 3
    with hzo.count_queries() as count:
        hzo.smoothed(accuracy, draws=5)(z, y).backward()
    assert count.loss_evaluations == (2 * 5 + 4) * 6  # four test whether samples are apart
    with hzo.count_queries() as count:
        hzo.smoothed(lambda z, y: accuracy(z, y).mean(), draws=5)(z, y).backward()
    assert count.loss_evaluations == 2 * 5 * 6


def blobs():
    torch.manual_seed(0)
    x = torch.randn(96, 4)
    return x, x[:, :3].argmax(1)


def trained(step, criterion, epochs):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x, y = blobs()
    for _ in range(epochs):
        optimizer.zero_grad()
        step(model, criterion, x, y)
        optimizer.step()
    return float(accuracy(model(x), y).mean())


def by_autograd(model, criterion, x, y):
    criterion(model(x), y).backward()


@pytest.mark.parametrize("step", [by_autograd, hzo.backward])
def test_accuracy_itself_is_learned(step):
    assert trained(step, hzo.smoothed(accuracy, mu=1.0, draws=16, maximize=True), 80) > 0.9


def macro_f1(z, y):
    """One number for the batch, from another library, in NumPy."""
    return f1_score(y.numpy(), z.argmax(1).numpy(), average="macro")


def test_a_score_of_the_batch_is_learned():
    assert trained(by_autograd, hzo.smoothed(macro_f1, mu=1.0, draws=16, maximize=True), 40) > 0.75


def test_a_seed_gives_a_gradient():
    z, y = torch.randn(6, 3), torch.arange(6) % 3

    def gradient(seed):
        torch.manual_seed(seed)
        leaf = z.clone().requires_grad_()
        hzo.smoothed(accuracy)(leaf, y).backward()
        return leaf.grad

    assert torch.equal(gradient(0), gradient(0))
    assert not torch.equal(gradient(0), gradient(1))


def test_narrow_outputs():
    z, y = torch.randn(64, 3, dtype=torch.bfloat16, requires_grad=True), torch.arange(64) % 3
    hzo.smoothed(accuracy, draws=256)(z, y).backward()
    wide = z.detach().float().requires_grad_()
    hzo.smoothed(accuracy, draws=256)(wide, y).backward()
    assert F.cosine_similarity(z.grad.float().flatten(), wide.grad.flatten(), dim=0) > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mu": 0}, "positive finite width"), ({"mu": float("nan")}, "positive finite"), ({"draws": 0}, "from 1 on")],
)
def test_options(options, message):
    with pytest.raises(InputError, match=message):
        hzo.smoothed(accuracy, **options)


def test_what_is_no_score():
    z, y = torch.randn(6, 3, requires_grad=True), torch.arange(6) % 3
    with pytest.raises(InputError, match="that can be called"):
        hzo.smoothed(0.5)
    with pytest.raises(InputError, match=r"one value a sample"):
        hzo.smoothed(lambda z, y: torch.zeros(4))(z, y)
    with pytest.raises(NonFiniteError, match="finite loss"):
        hzo.smoothed(lambda z, y: float("nan"))(z, y)
    with pytest.raises(InputError, match="returns a tensor or a number"):
        hzo.smoothed(lambda z, y: "good")(z, y)


def test_scores_that_look_at_other_samples_are_refused():
    """A rank among the batch would be a rank among all its copies."""
    z, y = torch.randn(6, 3, requires_grad=True), torch.arange(6) % 3
    with pytest.raises(CoupledSamplesError, match="their own sample only"):
        hzo.smoothed(lambda z, y: z[:, 0].argsort().argsort().float())(z, y)


def test_numpy_scores():
    z, y = torch.randn(6, 3, requires_grad=True), torch.arange(6) % 3
    hzo.smoothed(lambda z, y: np.float32((z.argmax(1) == y).numpy()))(z, y).backward()
    assert z.grad.any()

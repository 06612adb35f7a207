"""Node perturbation: mean, variance and decay as stated; which losses, layers and networks it takes."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hzo.baselines._per_sample as per_sample_losses
from hzo.baselines import _evaluate as ev
from hzo.baselines import node_perturbation
from hzo.errors import CoupledSamplesError, InputError, StepError
from hzo.execution.counting import count_queries
from hzo.tape.marks import Marks
from hzo.tracing.recorder import trace

SIGMAS = 4.5


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def linear_problem(batch: int) -> tuple[nn.Module, object, Tensor, Tensor]:
    """Linear in the noise on its five nodes, so that the stated variances are exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).double()
    x, y = torch.randn(batch, 2).double(), torch.randn(batch, 2).double()

    def loss_fn(output, target):
        return (output * target).sum(1)

    return model, loss_fn, x, y


def node_cotangents(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The true cotangents of all five nodes, a row for every sample, for the mean loss."""
    second = y / len(x)
    return torch.cat([second @ model[1].weight.detach(), second], 1)


@pytest.mark.parametrize("per_sample", [True, False])
def test_z_scores_of_the_mean_of_many_draws(per_sample):
    model, loss_fn, x, y = linear_problem(3)
    n = 4000
    loss_fn(model(x), y).mean().backward()
    expected = gradients(model)
    node_perturbation(
        model, loss_fn, x, y, samples=n, per_sample=per_sample, generator=torch.Generator().manual_seed(1)
    )
    estimate = gradients(model)
    g = node_cotangents(model, x, y)
    total = g.square().sum(1, keepdim=True) if per_sample else g.square().sum()
    # Var ĝ_bi = |g_b|² + g_bi²; bias gradients sum cotangents over samples, weight gradients with the inputs.
    variance = (total + g.square()) / n
    if not per_sample:  # one slope for all samples: their estimates are correlated through it
        covariance = g.T @ g
        covariance.fill_diagonal_(0)
    for name, nodes, inputs in (("0", slice(0, 3), x), ("1", slice(3, 5), model[0](x).detach())):
        weights = torch.einsum("bi,bj->ij", variance[:, nodes], inputs.square())
        bias = variance[:, nodes].sum(0)
        if not per_sample:  # Cov(ĝ_bi, ĝ_ci) = g_bi g_ci for b ≠ c
            summed, squared = g[:, nodes].sum(0), g[:, nodes].square().sum(0)
            bias = bias + (summed.square() - squared) / n
            weighted = g[:, nodes].T @ inputs
            own = g[:, nodes].square().T @ inputs.square()
            weights = weights + (weighted.square() - own) / n
        for part, spread in (("weight", weights), ("bias", bias)):
            z = (estimate[f"{name}.{part}"] - expected[f"{name}.{part}"]) / spread.sqrt()
            assert z.abs().max() < SIGMAS
            assert z.abs().max() > 0.01  # an estimate, not the gradient itself


def test_second_moment_of_one_draw():
    model, loss_fn, x, y = linear_problem(1)
    g = node_cotangents(model, x, y)[0]
    generator = torch.Generator().manual_seed(2)
    squares = []
    for _ in range(1200):
        node_perturbation(model, loss_fn, x, y, generator=generator)
        found = gradients(model)
        squares.append(sum(found[f"{layer}.bias"].square().sum() for layer in (0, 1)) / g.square().sum())
    moments = torch.stack(squares)
    error = SIGMAS * moments.std() / math.sqrt(len(moments))
    assert abs(moments.mean() - (g.numel() + 2)) < error
    assert error < 2  # tight enough to tell n from n + 2


def test_squared_error_falls_as_one_over_n():
    model, loss_fn, x, y = linear_problem(2)
    g = node_cotangents(model, x, y)
    generator = torch.Generator().manual_seed(3)
    repeats = 250
    for n in (2, 8):
        errors = []
        for _ in range(repeats):
            node_perturbation(model, loss_fn, x, y, samples=n, generator=generator)
            found = gradients(model)
            errors.append(sum((found[f"{k}.bias"] - g[:, s].sum(0)).square().sum() for k, s in LAYERS))
        measured = torch.stack(errors)
        expected = (g.shape[1] + 1) * g.square().sum() / n  # Σ_b (n_nodes + 2 − 1) |g_b|²
        assert abs(measured.mean() - expected) < SIGMAS * measured.std() / math.sqrt(repeats)
        assert measured.std() / math.sqrt(repeats) < 0.1 * expected


LAYERS = ((0, slice(0, 3)), (1, slice(3, 5)))


class Tied(nn.Module):
    """An embedding whose weight is the read-out too, a scale without a module, a weight that is derived."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 1.5]))
        self.mixing = nn.Parameter(torch.randn(3, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.embedding(tokens) * self.scale)
        hidden = torch.tanh(F.linear(hidden, self.mixing.t()))
        return F.linear(hidden, self.embedding.weight).mean(1)


def networks() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.GroupNorm(1, 2),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return {
        "convolutions": (
            convolutions.double(),
            torch.randn(4, 1, 4, 4).double(),
            torch.randint(0, 3, (4,)),
        ),
        "tied": (Tied().double(), torch.randint(0, 5, (4, 2)), torch.randint(0, 5, (4,))),
    }


@pytest.mark.parametrize("name", networks())
def test_unbiased_on_networks(name):
    model, x, y = networks()[name]
    torch.manual_seed(1)  # the mask of dropout
    F.cross_entropy(model(x), y).backward()
    expected = gradients(model)
    estimates, draws, generator = [], 60, torch.Generator().manual_seed(4)
    for _ in range(draws):
        torch.manual_seed(1)
        node_perturbation(model, F.cross_entropy, x, y, samples=20, generator=generator)
        estimates.append(gradients(model))
    for parameter in expected:
        stacked = torch.stack([estimate[parameter] for estimate in estimates])
        spread = stacked.std(0) / math.sqrt(draws)
        # Rows of an embedding that no token chose have a gradient of zero, and a spread of zero.
        z = (stacked.mean(0) - expected[parameter]) / spread.clamp_min(1e-9)
        assert z.abs().max() < SIGMAS, parameter


CLASSES = torch.tensor([[0, 2], [1, -100], [2, 2]])
WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
PROBABILITIES = torch.tensor([[[0.2, 0.5], [0.3, 0.5], [0.5, 0.0]]] * 3, dtype=torch.float64)
TARGETS = torch.linspace(0, 1, 18, dtype=torch.float64).view(3, 3, 2)
LOSSES = {
    "cross entropy": (F.cross_entropy, CLASSES),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), CLASSES),
    "ignored": (partial(F.cross_entropy, weight=WEIGHT, ignore_index=2), CLASSES.clamp_min(0)),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "unreduced": (nn.CrossEntropyLoss(reduction="none"), CLASSES),
    "probabilities": (partial(F.cross_entropy, label_smoothing=0.2), PROBABILITIES),
    "negative log likelihood": (nn.NLLLoss(weight=WEIGHT), CLASSES),
    "squared": (F.mse_loss, TARGETS),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), TARGETS),
    "huber": (nn.HuberLoss(delta=0.3), TARGETS),
    "own": (lambda output, target: (output - target).abs().sum(-1), TARGETS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_contributions_sum_to_the_loss_and_depend_on_their_sample(name):
    loss_fn, target = LOSSES[name]
    torch.manual_seed(0)
    output = torch.randn(3, 3, 2, dtype=torch.float64)
    p = ev.problem(nn.Identity(), loss_fn, output, target)
    parts = per_sample_losses.contributions(p, output)
    assert parts.shape == (3,)
    torch.testing.assert_close(parts.sum(), loss_fn(output, target).mean())
    output[1] *= 2
    changed = per_sample_losses.contributions(p, output) - parts
    assert changed[1].abs() > 1e-3
    assert changed[0] == changed[2] == 0


def test_what_it_does_not_take():
    model, _, x, y = linear_problem(3)
    with pytest.raises(InputError, match="one number for a batch"):
        node_perturbation(model, lambda output, target: (output * target).sum(), x, y)
    node_perturbation(model, lambda output, target: (output * target).sum(), x, y, per_sample=False)
    with pytest.raises(StepError, match="vanishes in the output of addmm"):
        node_perturbation(model, F.mse_loss, x, y, mu=1e-18)
    normalized = nn.Sequential(model, nn.BatchNorm1d(2).double())
    with pytest.raises(CoupledSamplesError, match="evaluation mode"):
        node_perturbation(normalized, F.mse_loss, x, y)
    node_perturbation(normalized.eval(), F.mse_loss, x, y)

    class Own(nn.Module):
        hzo_marks = Marks()

        def __init__(self) -> None:
            super().__init__()
            self.power = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, x: Tensor) -> Tensor:
            return x.abs() ** self.power

    with pytest.raises(InputError, match=r"local rule for 1\.power in 1"):
        node_perturbation(nn.Sequential(model, Own()), F.mse_loss, x, y)


def test_plain_modules_are_traced_once_and_chains_not_again():
    model, loss_fn, x, y = linear_problem(3)
    chain = trace(model, x)
    with count_queries() as count:
        node_perturbation(chain, loss_fn, x, y)
    assert count.check_evaluations == 0
    assert count.parameter_rules == 6  # of two layers: bias, transposed weight, weight
    checks = []
    model = deepcopy(model)  # which knows nothing of the trace
    for batch in (x, x[:2], x[:1]):
        with count_queries() as count:
            node_perturbation(model, loss_fn, batch, y[: len(batch)])
        checks.append(count.check_evaluations)
    assert checks[0] > 0
    assert checks[1:] == [0, 0]
    model[0].bias.requires_grad_(False)
    model.zero_grad()
    node_perturbation(model, loss_fn, x, y)
    assert model[0].bias.grad is None
    assert model[0].weight.grad is not None

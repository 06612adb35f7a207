"""The random estimators: right on average, with the variance that their docstrings state, falling as 1/n."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.baselines import BASELINES, forward_gradient, mezo, spsa
from hzo.baselines import _evaluate as ev

# For a gradient g of d elements: E|ĝ|² / |g|² of one draw, and Var ĝᵢ = |g|² + sign · gᵢ², whose sum says the same.
STATED = [
    pytest.param(known.estimate, known.second_moment, known.second_moment(0) - 1, id=name)
    for name, known in BASELINES.items()
    if known.second_moment is not None
]
SIGMAS = 4.5


def flat_grad(model: nn.Module) -> Tensor:
    """The gradient as one vector; cleared for the next estimate."""
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return grad


def linear_problem() -> tuple[nn.Module, object, Tensor, Tensor, Tensor]:
    """A loss linear in the parameters, so that the stated variances are exact; its gradient at the end."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2).double()
    x, y = torch.randn(3, 2).double(), torch.randn(3, 2).double()

    def loss_fn(output, target):
        return (output * target).sum(1)

    loss_fn(model(x), y).mean().backward()
    return model, loss_fn, x, y, flat_grad(model)


@pytest.mark.parametrize(("method", "ratio", "sign"), STATED)
def test_z_scores_of_the_mean_of_many_draws(method, ratio, sign):
    model, loss_fn, x, y, g = linear_problem()
    n = 3000
    method(model, loss_fn, x, y, samples=n, generator=torch.Generator().manual_seed(1))
    z = (flat_grad(model) - g) / ((g.square().sum() + sign * g.square()) / n).sqrt()
    assert z.abs().max() < SIGMAS
    assert z.abs().max() > 0.05  # an estimate, not the gradient itself


@pytest.mark.parametrize(("method", "ratio", "sign"), STATED)
def test_second_moment_of_one_draw(method, ratio, sign):
    model, loss_fn, x, y, g = linear_problem()
    generator = torch.Generator().manual_seed(2)
    squares = []
    for _ in range(2500):
        method(model, loss_fn, x, y, generator=generator)
        squares.append(flat_grad(model).square().sum() / g.square().sum())
    moments = torch.stack(squares)
    error = SIGMAS * moments.std() / math.sqrt(len(moments))
    assert abs(moments.mean() - ratio(g.numel())) < error
    assert error < 1.8  # tight enough to tell d from d + 2


@pytest.mark.parametrize(("method", "ratio", "sign"), STATED)
def test_squared_error_falls_as_one_over_n(method, ratio, sign):
    model, loss_fn, x, y, g = linear_problem()
    generator = torch.Generator().manual_seed(3)
    repeats = 250
    for n in (4, 16):
        errors = []
        for _ in range(repeats):
            method(model, loss_fn, x, y, samples=n, generator=generator)
            errors.append((flat_grad(model) - g).square().sum())
        measured = torch.stack(errors)
        expected = (ratio(g.numel()) - 1) * g.square().sum() / n
        assert abs(measured.mean() - expected) < SIGMAS * measured.std() / math.sqrt(repeats)
        assert measured.std() / math.sqrt(repeats) < 0.12 * expected


@pytest.mark.parametrize(("method", "ratio", "sign"), STATED)
def test_unbiased_on_a_network(method, ratio, sign):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 3).double(), torch.randint(0, 3, (5,))
    F.cross_entropy(model(x), y).backward()
    g = flat_grad(model)
    n = 3000
    method(model, F.cross_entropy, x, y, samples=n, generator=torch.Generator().manual_seed(4))
    # Locally the loss is linear: the stated variance holds up to O(μ²).
    z = (flat_grad(model) - g) / ((g.square().sum() + sign * g.square()) / n).sqrt()
    assert z.abs().max() < SIGMAS


@pytest.mark.parametrize(("method", "fourth_moment"), [(spsa, 1), (mezo, 3)])
def test_bias_of_a_cubic_is_the_stated_one(method, fourth_moment):
    """For L = θ³/3 the estimate is θ²z² + μ²z⁴/3, so its mean is θ² + μ² E z⁴ / 3."""
    model = nn.Linear(1, 1, bias=False).double()
    n, mu, theta = 4_000, 1.0, model.weight.item()
    generator = torch.Generator().manual_seed(5)
    method(
        model,
        lambda output: (output**3 / 3).sum(),
        torch.ones(1, 1).double(),
        samples=n,
        mu=mu,
        generator=generator,
    )
    z = 1 if method is spsa else torch.randn(10**6)
    spread = float(torch.as_tensor(theta**2 * z**2 + mu**2 * z**4 / 3).std()) if method is mezo else 0.0
    expected = theta**2 + mu**2 * fourth_moment / 3
    assert abs(float(flat_grad(model)) - expected) < SIGMAS * spread / math.sqrt(n) + 1e-9


@pytest.mark.parametrize(
    ("method", "draw"), [(spsa, ev.rademacher), (mezo, ev.gaussian), (forward_gradient, ev.gaussian)]
)
def test_one_draw_is_the_slope_times_the_direction(method, draw):
    model, loss_fn, x, y, g = linear_problem()
    method(model, loss_fn, x, y, generator=torch.Generator().manual_seed(6))
    (seed,) = ev.draw_seeds(torch.Generator().manual_seed(6), 1)
    z = torch.cat([part.flatten() for part in ev.directions(list(model.parameters()), draw, seed)])
    # Exact for the forward gradient; the others round the loss: u |L| / μ = 1e-10.
    torch.testing.assert_close(flat_grad(model), (g @ z) * z, rtol=1e-8, atol=1e-8)

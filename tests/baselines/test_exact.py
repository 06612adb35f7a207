"""Backprop and coordinate-wise differences: nothing random, so they are held to an oracle."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.baselines import backprop, coordinate_wise
from hzo.errors import InputError, StepError


class TwoInputs(nn.Module):
    """Two inputs, a tied weight, a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5))  # no dimensions

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(a))) * self.scale + b


def networks() -> dict[str, tuple[nn.Module, object, Tensor]]:
    """Float64 networks with an input and a target of classes."""
    torch.manual_seed(0)
    a, b, y = torch.randn(5, 3), torch.randn(5, 3), torch.randint(0, 3, (5,))
    image = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    convolutions = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(8, 3)
    )
    return {
        "mlp": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), a.double(), y),
        "convolutions": (convolutions.double().to(memory_format=torch.channels_last), image, y),
        "tuple": (TwoInputs().double(), (a.double(), b.double()), y),
        "dict": (TwoInputs().double(), {"a": a.double(), "b": b.double()}, y),
    }


def oracle(model: nn.Module, x: object, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by autograd, on a copy."""
    model = copy.deepcopy(model)
    output = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    loss = F.cross_entropy(output, y)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize(
    ("method", "options", "tolerance"),
    [
        (backprop, {}, 1e-14),
        (coordinate_wise, {}, 1e-8),  # central: h² = 4e-11, rounding u/h = 4e-11
        (coordinate_wise, {"scheme": "forward"}, 1e-6),  # h = 1.5e-8, rounding u/h = 1.5e-8
    ],
)
def test_equals_autograd(name, method, options, tolerance):
    model, x, y = networks()[name]
    torch.manual_seed(1)  # the mask of dropout
    expected_loss, expected = oracle(model, x, y)
    torch.manual_seed(1)
    loss = method(model, F.cross_entropy, x, y, **options)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected_loss, rtol=1e-14, atol=1e-14)
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[parameter_name], rtol=tolerance, atol=tolerance)


def test_coordinate_wise_is_exact_for_a_quadratic_at_any_step():
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    coordinate_wise(model, F.mse_loss, x, y, step=0.7)
    expected = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("scheme", "order"), [("central", 2), ("forward", 1)])
def test_error_falls_with_the_order_of_the_scheme(scheme, order):
    model, x, y = networks()["mlp"]
    _, expected = oracle(model, x, y)
    errors = []
    for step in (2e-2, 1e-2):
        model.zero_grad()
        coordinate_wise(model, F.cross_entropy, x, y, scheme=scheme, step=step)
        errors.append(sum(float((p.grad - expected[n]).square().sum()) for n, p in model.named_parameters()) ** 0.5)
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


def test_coordinate_wise_in_float32_and_bfloat16():
    model, x, y = networks()["mlp"]
    _, expected = oracle(model, x, y)
    true = torch.cat([g.flatten() for g in expected.values()])
    for dtype, cosine in ((torch.float32, 0.9999), (torch.bfloat16, 0.95)):
        low = copy.deepcopy(model).to(dtype)
        coordinate_wise(low, F.cross_entropy, x.to(dtype), y)
        assert all(p.grad.dtype is dtype for p in low.parameters())
        estimate = torch.cat([p.grad.double().flatten() for p in low.parameters()])
        assert F.cosine_similarity(estimate, true, dim=0) > cosine


def test_loss_that_counts_errors_is_no_obstacle_to_differences_but_is_to_backprop():
    model, x, y = networks()["mlp"]

    def wrong(output, target):
        return (output.argmax(1) != target).sum().item()

    assert coordinate_wise(model, wrong, x, y) == wrong(model(x), y)
    with pytest.raises(InputError, match="derivative"):
        backprop(model, wrong, x, y)


def test_bad_options():
    model, x, y = networks()["mlp"]
    with pytest.raises(InputError, match="scheme"):
        coordinate_wise(model, F.cross_entropy, x, y, scheme="backward")
    with pytest.raises(InputError, match="step"):
        coordinate_wise(model, F.cross_entropy, x, y, step=0.0)
    with pytest.raises(StepError, match="vanishes"):
        coordinate_wise(model.float(), F.cross_entropy, x.float(), y, step=1e-9)
    with torch.no_grad():
        model[0].bias[0] = 100.0
    with pytest.raises(StepError, match="vanishes in an element of 100"):
        coordinate_wise(model, F.cross_entropy, x.float(), y, step=1e-6)

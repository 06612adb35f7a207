"""Piecewise-constant stages: steps of their own, and Gaussian smoothing, against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import InputError, PlanError
from support.oracles import normal, relative_errors, worst

QUANTUM = 0.25


class Quantizer(nn.Module):
    def forward(self, x):
        return (torch.round(x / QUANTUM) * QUANTUM).clamp(-2, 2)


class StraightThrough(torch.autograd.Function):
    """The identity's derivative for the quantizer's."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x / QUANTUM) * QUANTUM

    @staticmethod
    def backward(ctx, g):
        return g


class Step(nn.Module):
    def forward(self, x):
        return (x > 0).to(x.dtype)


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def test_a_step_of_half_a_quantum_is_straight_through():
    """Over a whole quantum a uniform quantizer rises by exactly one quantum, wherever it starts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Quantizer(), nn.Linear(6, 3)).double()
    hzo.declare(model[1], "elementwise", step=QUANTUM / 2)
    x, y = 0.3 * normal(8, 5), normal(8, 3)
    found, _ = hzo.grad_and_value(model, F.mse_loss, x, y)
    F.mse_loss(model[2](StraightThrough.apply(model[0](x))), y).backward()
    assert worst(relative_errors(found, {n: p.grad for n, p in model.named_parameters()})) <= 1e-9


def test_a_declared_step_goes_before_that_of_the_plan():
    model = nn.Sequential(nn.Linear(5, 6), Quantizer(), nn.Linear(6, 3)).double()
    hzo.declare(model[1], "elementwise", step=QUANTUM / 2)
    x, y = 0.3 * normal(8, 5), normal(8, 3)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, step=1e-4)
    assert {node.declared_step for node in plan.nodes} == {QUANTUM / 2, None}
    with_step, _ = hzo.grad_and_value(chain, F.mse_loss, x, y, plan=plan)
    without, _ = hzo.grad_and_value(chain, F.mse_loss, x, y, plan=hzo.plan(chain))
    assert worst(relative_errors(with_step, without)) <= 1e-9


def test_the_widest_step_of_all_that_read_a_value():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine = hzo.declare(Quantizer(), "elementwise", step=QUANTUM / 2)
            self.coarse = hzo.declare(Quantizer(), "elementwise", step=QUANTUM)

        def forward(self, x):
            return self.fine(x) + self.coarse(x)

    chain = hzo.trace(nn.Sequential(nn.Linear(5, 6), Two()), torch.randn(8, 5))
    assert {node.declared_step for node in hzo.plan(chain, assume="locality").nodes} == {QUANTUM}


@pytest.mark.parametrize("step", [0, -1.0, float("nan"), float("inf"), "half"])
def test_a_step_that_is_none_cannot_be_declared(step):
    with pytest.raises(InputError, match="expected a positive finite step"):
        hzo.declare(Quantizer(), "elementwise", step=step)


def step_chain(samples, step=None):
    """A shift that is trained, then a step at zero; the loss is the sum, so that its cotangent is one."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            return x + self.by

    model = nn.Sequential(Shift(), hzo.declare(Step(), "elementwise", step=step))
    x = torch.tensor([-1.0, 0.1, 0.6], dtype=torch.float64).expand(samples, 3).clone()
    return model, hzo.trace(model, x), x


def total(output):
    return output.sum(-1)


@pytest.mark.parametrize("step", [None, 0.3])
def test_the_smoothed_slope_is_unbiased(step):
    """E[(H(x + mu·u + h) − H(x + mu·u − h)) / 2h] = (Φ((x + h)/mu) − Φ((x − h)/mu)) / 2h."""
    samples, mu, draws = 2000, 0.7, 8
    _, chain, x = step_chain(samples)
    h = mu if step is None else step
    plan = hzo.plan(chain, mu=mu, draws=draws, step=step, boundaries="all")
    torch.manual_seed(1)
    found = hzo.cotangents(chain, total, x, plan=plan)[1] * samples
    exact = (normal_cdf((x[0] + h) / mu) - normal_cdf((x[0] - h) / mu)) / (2 * h)
    spread = found.std(0) / samples**0.5
    assert ((found.mean(0) - exact).abs() / spread).max() < 4.5
    # A difference is 1/2h where the step lies within it, else 0: a coin, whose variance falls with the draws.
    coin = exact / (2 * h) - exact**2
    assert torch.allclose(found.var(0), coin / draws, rtol=4.5 * (2 / samples) ** 0.5 * 2)


def test_smoothing_leaves_what_is_linear_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).double()
    x, y = normal(6, 4), normal(6, 2)
    found, _ = hzo.grad_and_value(model, F.mse_loss, x, y, assume="nothing", mu=0.5, draws=2)
    F.mse_loss(model(x), y).backward()
    assert worst(relative_errors(found, {n: p.grad for n, p in model.named_parameters()})) <= 1e-9


@pytest.mark.parametrize("assume", ["nothing", "locality", "structure"])
def test_predicted_is_counted(assume):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Quantizer(), nn.Linear(5, 2))
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, assume=assume, mu=0.1, draws=7)
    with hzo.count_queries() as count:
        hzo.backward(chain, F.mse_loss, x, y, plan=plan)
    assert (count.queries, count.stage_evaluations) == (plan.queries, plan.stage_evaluations)
    assert count.forward_equivalents == pytest.approx(plan.forward_equivalents, rel=1e-12)
    once = hzo.plan(chain, assume=assume, mu=0.1)
    assert plan.queries == 7 * once.queries


def test_one_seed_gives_one_gradient():
    _, chain, x = step_chain(4)

    def gradient(seed):
        torch.manual_seed(seed)
        return hzo.grad_and_value(chain, total, x, plan=hzo.plan(chain, mu=0.7, draws=3))[0]["0.by"]

    assert torch.equal(gradient(0), gradient(0))
    assert not torch.equal(gradient(0), gradient(1))


def test_a_smoothed_plan_is_a_file_like_any_other(tmp_path):
    _, chain, _ = step_chain(4, step=0.3)
    plan = hzo.plan(chain, mu=0.7, draws=3)
    hzo.save_plan(plan, tmp_path / "plan.json")
    assert hzo.load_plan(chain, tmp_path / "plan.json") == plan
    assert "smoothed over 0.7 by 3 draws" in str(plan)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mu": 0.0}, InputError, "positive finite width"),
        ({"mu": True}, InputError, "positive finite width"),
        ({"mu": "0.1"}, InputError, "positive finite width"),
        ({"mu": 0.1, "draws": 0}, InputError, "whole number from 1 on"),
        ({"draws": 2}, PlanError, "give its width, too"),
        ({"mu": 0.1, "scheme": "forward"}, PlanError, "scheme='central'"),
        ({"mu": 0.1, "noise": 1e-3}, PlanError, "knows nothing of smoothing"),
        ({"mu": 0.1, "target_cosine": 0.9}, PlanError, "knows nothing of smoothing"),
    ],
)
def test_what_cannot_be_smoothed(options, error, message):
    _, chain, _ = step_chain(4)
    with pytest.raises(error, match=message):
        hzo.plan(chain, **options)


def test_the_error_model_does_not_guess_about_declared_steps():
    _, chain, _ = step_chain(4, step=0.3)
    with pytest.raises(PlanError, match=r"a step was declared for .*, which the error model does not know"):
        hzo.plan(chain, noise=1e-3)


class TestInputsThatRequireAGradient:
    @pytest.mark.parametrize("tree", ["planned", "bisect", "flat", "stagewise", 3])
    @pytest.mark.parametrize("trainable", [True, False])
    def test_get_one(self, tree, trainable):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5)]
        model = nn.Sequential(*layers).double().requires_grad_(trainable)
        x, y = normal(6, 4).requires_grad_(), normal(6, 4)
        F.mse_loss(model(x), y).backward()
        exact, x.grad = x.grad, None
        for times in (1, 2):  # added to what is there, as loss.backward() does
            hzo.backward(model, F.mse_loss, x, y, tree=tree)
            assert torch.allclose(x.grad, times * exact, rtol=1e-8, atol=1e-10)

    def test_cost_what_is_predicted(self):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5)))
        x, y = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
        for tree in ("planned", "bisect", "stagewise"):
            chain = hzo.trace(model, x)
            plan = hzo.plan(chain, tree=tree, assume="nothing")
            with hzo.count_queries() as count:
                hzo.backward(chain, F.mse_loss, x, y, plan=plan)
            assert (count.queries, count.stage_evaluations) == (plan.queries, plan.stage_evaluations)
            data = hzo.plan(hzo.trace(model, x.detach()), tree=tree, assume="nothing")
            assert plan.queries == data.queries + 2 * 4 * 6

    @pytest.mark.parametrize(("tree", "edges"), [("stagewise", 5), ("bisect", 5), ("flat", 1), ("planned", 1)])
    def test_a_tree_goes_over_all_boundaries_where_nothing_is_trained(self, tree, edges):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).requires_grad_(False)
        chain = hzo.trace(model, torch.randn(6, 4, requires_grad=True))
        plan = hzo.plan(chain, tree=tree, assume="nothing")
        assert len(plan.edges) == edges
        assert {node.target for node in plan.nodes} >= {0}

    def test_one_that_hangs_on_another_graph_is_data(self):
        model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(6, 4, requires_grad=True)
        hzo.backward(model, F.mse_loss, 2 * x, torch.randn(6, 4))
        assert x.grad is None

    def test_the_cheapest_way_through_a_bottleneck(self):
        """Nothing is trained: no boundary but the input is asked for, and yet a narrow one is worth a stop."""
        model = nn.Sequential(nn.Linear(64, 2), nn.Tanh(), nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64))
        model.requires_grad_(False)
        x = torch.randn(6, 64, requires_grad=True)
        chain = hzo.trace(model, x)
        costs = {t: hzo.plan(chain, t, "nothing").forward_equivalents for t in ("planned", "flat", "stagewise")}
        assert costs["planned"] < min(costs["flat"], costs["stagewise"])

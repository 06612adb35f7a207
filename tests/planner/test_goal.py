"""Plans for a target or a budget, on real chains: promises kept, prices in order, refusals clear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import PlanError
from support.chains import WIDTH, chain_of, orthogonal, residual

OPTIONS = {"assume": "nothing", "boundaries": "all"}
FIXED = ("flat", "bisect", "stagewise", 3)


def cosines(noisy, chain, x, y, plan):
    exact = hzo.cotangents(chain, F.mse_loss, x, y, boundaries="all")
    found = hzo.cotangents(noisy, F.mse_loss, x, y, plan=plan)
    return [float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("tree", ["planned", *FIXED])
@pytest.mark.parametrize("repeats", ["uniform", "optimal"])
def test_a_target_is_kept(tree, repeats):
    """On orthogonal stages, of which the unitary calibration is true; 512 numbers leave the cosine 1e-3 uncertain."""
    chain, x, y = chain_of(*(orthogonal() for _ in range(8)), dtype=torch.float32)
    plan = hzo.plan(chain, tree, step=0.1, noise=3e-3, target_cosine=0.98, repeats=repeats, **OPTIONS)
    assert plan.expected.cosine >= 0.98
    assert min(cosines(hzo.noisy(chain, 3e-3), chain, x, y, plan)) >= 0.978


def test_prices_are_in_order():
    chain, _, _ = residual(12)
    options = {"step": 0.1, "noise": 3e-3, "target_cosine": 0.98, **OPTIONS}
    planned = hzo.plan(chain, **options).forward_equivalents
    alike = hzo.plan(chain, repeats="uniform", **options).forward_equivalents
    for tree in FIXED:
        optimal = hzo.plan(chain, tree, repeats="optimal", **options).forward_equivalents
        uniform = hzo.plan(chain, tree, repeats="uniform", **options).forward_equivalents
        assert planned <= optimal <= uniform
        assert planned <= alike <= uniform
    free = hzo.plan(chain, **{**options, "step": None}).forward_equivalents
    assert free < planned  # a larger step needs fewer repeats


@pytest.mark.parametrize("tree", ["stagewise", "bisect", "planned"])
def test_a_target_is_kept_where_errors_outgrow_cotangents(tree):
    """Each stage shrinks the one direction that the cotangent has to 0.8, and no other."""
    scales = torch.ones(WIDTH)
    scales[0] = 0.8
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(8)]
    for layer in layers:
        layer.weight.data = torch.diag(scales)
    chain, x, _ = chain_of(*layers)

    def loss(out, y):
        return out[:, 0]

    known = hzo.calibrate(chain, x, loss, x, assume="nothing")
    assert known.transport[0] > 10
    plan = hzo.plan(chain, tree, calibration=known, noise=3e-3, target_cosine=0.98, step=0.1, **OPTIONS)
    assert plan.expected.cosine >= 0.98
    exact = hzo.cotangents(chain, loss, x, x, boundaries="all")
    found = hzo.cotangents(hzo.noisy(chain, 3e-3), loss, x, x, plan=plan)
    assert (
        min(
            float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
            for a, b in zip(found[:-1], exact[:-1], strict=True)
        )
        >= 0.978
    )


def test_a_higher_target_costs_more():
    chain, _, _ = residual(6)
    prices = [hzo.plan(chain, step=0.1, noise=3e-3, target_cosine=c, **OPTIONS).queries for c in (0.9, 0.99, 0.999)]
    assert prices[0] < prices[1] < prices[2]


def test_without_noise_nothing_is_repeated():
    chain, x, y = residual(6, torch.float64)
    plan = hzo.plan(chain, target_cosine=0.9999, calibration=hzo.calibrate(chain, x, F.mse_loss, y))
    assert all(node.repeats == 1 for node in plan.nodes)
    # By adjoints of single operations nothing is cheaper than the plan that has no target.
    assert plan.forward_equivalents == hzo.plan(chain).forward_equivalents


def test_a_budget_buys_the_best_cosine():
    chain, _, _ = residual(8)
    options = {"step": 0.1, "noise": 3e-3, **OPTIONS}
    target = hzo.plan(chain, target_cosine=0.98, **options)
    bought = hzo.plan(chain, budget=target.forward_equivalents, **options)
    assert bought.forward_equivalents <= target.forward_equivalents
    assert bought.expected.cosine > 0.975
    assert hzo.plan(chain, budget=3 * target.forward_equivalents, **options).expected.cosine > bought.expected.cosine


def test_a_budget_that_pays_one_repeat_of_each_is_enough():
    """However loud the noise: the plan is then what the money buys, and says how bad it expects to be."""
    chain, _, _ = residual(6)
    options = {"step": 0.1, "noise": 1e6, **OPTIONS}
    once = hzo.plan(chain, "bisect", step=0.1, **OPTIONS).forward_equivalents
    plan = hzo.plan(chain, "bisect", budget=1.5 * once, **options)
    assert once <= plan.forward_equivalents <= 1.5 * once
    assert plan.expected.cosine < 1e-3
    with pytest.raises(PlanError, match="the cheapest plan takes"):
        hzo.plan(chain, "bisect", budget=0.9 * once, **options)


def test_seconds_are_a_budget_too():
    chain, x, y = residual(8)
    known = hzo.calibrate(hzo.noisy(chain, 3e-3), x, F.mse_loss, y, assume="nothing")
    cheapest = hzo.plan(chain, "stagewise", calibration=known, step=0.1, **OPTIONS).expected.seconds
    plan = hzo.plan(chain, seconds=8 * cheapest, calibration=known, step=0.1, **OPTIONS)
    assert 0 < plan.expected.seconds <= 8 * cheapest


def test_steps_balance_noise_and_curvature():
    """Without noise small steps, with more noise larger ones; h⁶ = D σ² / (4 c) for one node, to a factor of two."""
    chain, _, _ = chain_of(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), orthogonal(), dtype=torch.float64)
    steps = [hzo.plan(chain, "flat", noise=level, **OPTIONS).nodes[0].relative_step for level in (1e-9, 1e-6, 1e-3)]
    assert steps[0] < steps[1] < steps[2]
    for level, step in zip((1e-9, 1e-6, 1e-3), steps, strict=True):
        best = (WIDTH * level**2 / (4 / 36)) ** (1 / 6)
        assert best / 2 <= step <= best * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_cosine": 1.0}, "between 0 and 1, got 1.0"),
        ({"target_cosine": 0.0}, "between 0 and 1"),
        ({"budget": -3.0}, "positive and finite"),
        ({"target_cosine": 0.9, "budget": 3.0}, "one of target_cosine, budget and seconds"),
        ({"seconds": 3.0}, "planned from a calibration"),
        ({"repeats": "some", "target_cosine": 0.9}, "expected repeats to be one of"),
        ({"target_cosine": 0.9, "spacing": 2, "assume": "locality"}, "approximate colorings"),
        ({"budget": 1e-3, "noise": 1e-3}, "the cheapest plan takes"),
        ({"target_cosine": 0.99, "noise": 1e-3, "step": 10.0}, "leave at most"),
        ({"target_cosine": 0.99, "noise": 1e-1, "step": 0.5, "scheme": "forward"}, "scheme='central'"),
    ],
)
def test_refusals(options, message):
    chain, _, _ = residual(4)
    with pytest.raises(PlanError, match=message):
        hzo.plan(chain, **{**OPTIONS, **options})


def test_a_calibration_of_another_chain():
    chain, x, _ = residual(4)
    other, _, _ = residual(5)
    with pytest.raises(PlanError, match="made for another chain"):
        hzo.plan(other, calibration=hzo.calibrate(chain, x))


def test_coupled_samples_leave_no_plan():
    chain, _, _ = chain_of(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
    with pytest.raises(PlanError, match="samples influence each other"):
        hzo.plan(chain, assume="nothing", noise=1e-3, target_cosine=0.9)
    assert hzo.plan(chain, noise=1e-3, target_cosine=0.9).expected.cosine >= 0.9

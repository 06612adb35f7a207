"""Noise that is declared, added and averaged away."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import InputError

BATCH, WIDTH = 64, 12


def linear_chain(length=3, width=WIDTH):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(length)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    x, y = torch.randn(2, BATCH, width, dtype=torch.float64)
    return hzo.trace(model, x), x, y


def linear_loss(output, y):
    """Its cotangent is y whatever noise the output carries."""
    return (output * y).sum(1)


def error_of(noisy, exact, x, y, plan, draws=1):
    """Mean squared relative error of the cotangent at boundary 1."""
    found = [hzo.cotangents(noisy, linear_loss, x, y, plan=plan)[1] for _ in range(draws)]
    return float(torch.stack([(g - exact).square().sum() for g in found]).mean() / exact.square().sum())


def exact_cotangent(chain, x, y):
    return hzo.cotangents(chain, linear_loss, x, y, boundaries="all")[1]


@pytest.mark.parametrize("level", [-1.0, float("nan"), float("inf"), "much", True, (0.1, -0.1)])
def test_levels_that_are_none(level):
    with pytest.raises(InputError, match="standard deviation"):
        hzo.Noise(readout=level)
    with pytest.raises(InputError, match="standard deviation"):
        hzo.Noise(process=level)


def test_levels_for_another_number_of_stages():
    chain, _, _ = linear_chain(3)
    with pytest.raises(InputError, match="one for each of 3 stages, got 2"):
        hzo.noisy(chain, readout=(0.1, 0.2))
    with pytest.raises(InputError, match="one for each of 3 stages, got 4"):
        hzo.plan(chain, noise=hzo.Noise(process=(0.1,) * 4))


def test_readout_noise_leaves_the_base_pass_alone():
    chain, x, y = linear_chain()
    _, loss = hzo.grad_and_value(chain, F.mse_loss, x, y)
    _, same = hzo.grad_and_value(hzo.noisy(chain, readout=0.1), F.mse_loss, x, y, assume="nothing")
    _, other = hzo.grad_and_value(hzo.noisy(chain, process=0.1), F.mse_loss, x, y, assume="nothing")
    assert loss == same
    assert loss != other


def test_the_noise_has_random_numbers_of_its_own():
    chain, x, y = linear_chain()
    before = torch.get_rng_state()
    runs = [hzo.grad_and_value(hzo.noisy(chain, 0.1, 0.1, seed=s), F.mse_loss, x, y)[0]["0.weight"] for s in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(before, torch.get_rng_state())


def test_noise_stays_when_a_chain_is_traced_again():
    """For another number of places in a sample."""
    chain, _, _ = linear_chain()
    chain = hzo.trace(chain.model, torch.randn(2, 3, WIDTH, dtype=torch.float64))
    x, y = torch.randn(2, 2, 5, WIDTH, dtype=torch.float64)
    clean, _ = hzo.grad_and_value(chain, F.mse_loss, x, y)
    found, _ = hzo.grad_and_value(hzo.noisy(chain, readout=0.1), F.mse_loss, x, y, assume="nothing", step=1.0)
    assert not torch.allclose(clean["0.weight"], found["0.weight"], rtol=1e-3, atol=1e-6)


# The squared error is a sum of about BATCH × WIDTH × draws squares: within 5 standard deviations, √(2 / N) each.
DRAWS = 20
CHANCE = 5 * (2 / (BATCH * WIDTH * DRAWS)) ** 0.5


@pytest.mark.parametrize("kind", ["readout", "process"])
@pytest.mark.parametrize("repeats", [1, 4])
def test_error_of_a_node_is_that_of_the_formula(kind, repeats):
    """Orthogonal stages: no curvature, gains of one; a node over two stages, coordinate differences, step 0.5."""
    chain, x, y = linear_chain(3)
    exact = exact_cotangent(chain, x, y)
    noisy = hzo.noisy(chain, **{kind: 1e-2}, seed=5)
    plan = hzo.plan(chain, tree="flat", assume="nothing", step=0.5, noise=hzo.Noise(**{kind: 1e-2}), boundaries="all")
    plan = repeated(plan, repeats)
    stages = {"readout": 1, "process": 2}[kind]
    expected = WIDTH * stages * 1e-4 / (2 * 0.5**2 * repeats)
    assert error_of(noisy, exact, x, y, plan, DRAWS) == pytest.approx(expected, rel=CHANCE)


def test_forward_differences_share_one_reading():
    """Four times the noise of central ones; of that half is the stored result's, which repeats do not change."""
    chain, x, y = linear_chain(2)
    exact = exact_cotangent(chain, x, y)
    noisy = hzo.noisy(chain, readout=1e-2, seed=6)
    options = {"tree": "flat", "assume": "nothing", "step": 0.5, "noise": 1e-2, "boundaries": "all"}
    plan = hzo.plan(chain, scheme="forward", **options)
    once = WIDTH * 1e-4 / 0.5**2
    for repeats in (1, 4):
        measured = error_of(noisy, exact, x, y, repeated(plan, repeats), 4 * DRAWS)
        # The shared reading moves all elements of a sample at once: N is BATCH × draws for that half.
        assert measured == pytest.approx(once * (1 / repeats + 1), rel=5 * (2 / (BATCH * 4 * DRAWS)) ** 0.5)
    (error,) = {e for (position, _), e in plan.expected.errors.items() if position == chain.traced.boundaries[1]}
    bend = 2 * 0.5**2 / 4  # the unitary calibration: two stages that bend, h²/4 each
    assert error == pytest.approx(2 * once + bend / 2, rel=1e-6)


def repeated(plan, repeats):
    """The plan with so many repeats of every node."""
    nodes = tuple(replace(node, repeats=repeats, cost=node.cost * repeats) for node in plan.nodes)
    return replace(plan, nodes=nodes)


def test_repeats_are_counted():
    chain, x, y = linear_chain()
    plan = hzo.plan(chain, tree="bisect", assume="nothing", noise=1e-2, target_cosine=0.99, step=0.1)
    assert max(node.repeats for node in plan.nodes) > 1
    with hzo.count_queries() as count:
        hzo.grad_and_value(hzo.noisy(chain, 1e-2), F.mse_loss, x, y, plan=plan)
    assert (count.queries, count.stage_evaluations) == (plan.queries, plan.stage_evaluations)
    assert count.forward_equivalents == pytest.approx(plan.forward_equivalents, rel=1e-12)


def test_process_noise_of_one_stage_only():
    """It is seen behind that stage and not before it."""
    chain, x, y = linear_chain(3)
    exact = exact_cotangent(chain, x, y)
    plan = hzo.plan(chain, tree="stagewise", assume="nothing", step=0.5, boundaries="all")
    loud = error_of(hzo.noisy(chain, process=(0.0, 0.1, 0.0)), exact, x, y, plan)
    silent = error_of(hzo.noisy(chain, process=(0.1, 0.0, 0.0)), exact, x, y, plan)
    # Noise of the first stage moves the base pass, and the output with it, but no query behind boundary 1.
    assert loud > WIDTH * 0.1**2 / (2 * 0.5**2) / 2
    assert silent < loud / 5

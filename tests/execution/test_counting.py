"""What is counted equals the design's table, and what a plan predicts equals what is counted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from support import oracles
from support.cases import CASES
from support.oracles import bisection, solve

BATCH, WIDTH = 3, 2


def count(solved, plan):
    with hzo.count_queries() as counted:
        solved.estimate(plan)
    return counted


def assert_as_predicted(solved, plan):
    counted = count(solved, plan)
    assert counted.queries == plan.queries
    assert counted.stage_evaluations == plan.stage_evaluations
    assert counted.forward_equivalents == plan.forward_equivalents  # of one exact fraction each
    assert counted.adjoints == plan.adjoints
    assert counted.base_evaluations == solved.chain.traced.batch * len(solved.chain) + plan.recomputed


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("L", [2, 3, 7, 16, 64])
def test_linear_chains_cost_what_the_table_says(L, scheme):
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(L))).double()
    for layer in layers:  # a gradient that vanished in rounding would be refused
        nn.init.orthogonal_(layer.weight)
    x, y = torch.randn(2, BATCH, WIDTH, dtype=torch.float64)
    chain = hzo.trace(layers, x)
    powers = {4: 2, 16: 4, 64: 8}
    table = {"flat": L * (L - 1) // 2, "bisect": bisection(L), "stagewise": L - 1}
    if L in powers:  # (L (b − 1) / 2) log_b L; L = b² has two levels
        table[powers[L]] = L * (powers[L] - 1)
    for tree, length in table.items():
        plan = hzo.plan(chain, tree=tree, scheme=scheme, assume="nothing")
        with hzo.count_queries() as counted:
            hzo.backward(chain, F.mse_loss, x, y, plan=plan)
        sides = 2 if scheme == "central" else 1
        assert counted.stage_evaluations == plan.stage_evaluations == sides * WIDTH * length * BATCH
        assert counted.queries == plan.queries == sides * WIDTH * (L - 1) * BATCH  # the same for every tree
        # All stages cost alike, and one forward pass has L of them.
        assert counted.exact_forward_equivalents * L == plan.cost.forward_equivalents * L == sides * WIDTH * length


@pytest.mark.parametrize("tree", ["flat", "bisect", "stagewise", 3, 5, "planned"])
@pytest.mark.parametrize("name", CASES)
def test_predicted_is_counted(name, tree):
    solved = solve(name)
    for assume in ("nothing", "locality", "structure"):
        assert_as_predicted(solved, hzo.plan(solved.chain, tree=tree, assume=assume))


@pytest.mark.parametrize("name", CASES)
def test_predicted_is_counted_with_forward_differences(name):
    solved = solve(name)
    assert_as_predicted(solved, hzo.plan(solved.chain, tree="bisect", scheme="forward", assume="nothing"))


@pytest.mark.parametrize("name", [name for name in CASES if name != "frozen_start"])
def test_predicted_is_counted_for_all_boundaries(name):
    solved = solve(name)
    assert_as_predicted(solved, hzo.plan(solved.chain, tree="bisect", assume="nothing", boundaries="all"))


def test_planned_is_never_dearer():
    for name in CASES:
        chain = solve(name).chain
        for assume in ("nothing", "structure"):
            planned = hzo.plan(chain, assume=assume).forward_equivalents
            for tree in ("flat", "bisect", "stagewise", 3):
                assert planned <= hzo.plan(chain, tree=tree, assume=assume).forward_equivalents, (name, tree, assume)


@pytest.mark.parametrize("memory", [1, None])
def test_chunks_do_not_change_the_count(memory):
    solved = solve("convolutions")
    plan = hzo.plan(solved.chain, tree="bisect", assume="nothing")
    with hzo.count_queries() as counted:
        solved.estimate(plan, memory=memory)
    assert counted.queries == plan.queries


def test_nested_counters_see_their_own_part():
    solved = solve("mlp")
    plan = hzo.plan(solved.chain)
    with hzo.count_queries() as outer:
        once = count(solved, plan)
        twice = count(solved, plan)
    after = count(solved, plan)
    assert once.queries == twice.queries == after.queries == plan.queries
    assert outer.queries == 2 * plan.queries
    with pytest.raises(ZeroDivisionError), hzo.count_queries():
        _ = 1 / 0
    assert count(solved, plan).queries == plan.queries


def test_frozen_parameters_cost_nothing():
    """The later the first trained layer, the cheaper the gradient; a frozen weight behind it saves nothing."""
    costs = []
    for frozen in range(0, 11, 2):
        problem = CASES["mlp"].build()
        for layer in problem.model[:frozen]:
            layer.requires_grad_(False)
        chain = hzo.trace(problem.model, problem.x)
        plan = hzo.plan(chain, tree="bisect", assume="nothing")
        found, _ = hzo.grad_and_value(chain, problem.loss_fn, problem.x, problem.y, plan=plan)
        exact, _ = oracles.gradients(problem)
        assert found.keys() == exact.keys() == set(plan.trainable)
        assert oracles.worst(oracles.relative_errors(found, exact)) <= oracles.CENTRAL
        costs.append(plan.queries)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0  # the last layer takes its cotangent from the loss
    assert len(set(costs)) == len(costs)


def test_tracing_counts_checks_and_planning_counts_nothing():
    problem = CASES["mlp"].build()
    with hzo.count_queries() as tracing:
        chain = hzo.trace(problem.model, problem.x)
    with hzo.count_queries() as planning:
        print(hzo.plan(chain))
    assert tracing.check_evaluations > 0
    assert tracing.queries == tracing.base_evaluations == 0
    assert vars(planning) == vars(hzo.QueryCount())

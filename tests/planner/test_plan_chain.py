"""Plans: complete, in an order that works, and as cheap as can be."""

import itertools

import pytest
import torch
from torch import nn

import hzo
from hzo import presets
from hzo.plans import FIXED
from support.cases import CASES
from support.oracles import normal, solve

TRIED = [*FIXED, 3, 5, "planned"]


@pytest.mark.parametrize("boundaries", ["needed", "all"])
@pytest.mark.parametrize("tree", TRIED)
@pytest.mark.parametrize("name", [name for name in CASES if name != "frozen_start"])
def test_nodes_are_complete_and_in_order(name, tree, boundaries):
    """What a node starts from is known when it runs, and every layer's output gets its cotangent."""
    graph = solve(name).chain.traced
    plan = hzo.plan(solve(name).chain, tree=tree, assume="nothing", boundaries=boundaries)
    end = len(graph.operations)
    known = {(end, v) for v in graph.outputs}
    for node in plan.nodes:
        assert node.target < node.source
        assert (node.target, node.value) not in known
        assert node.value in graph.live[node.target]
        needed = {(node.source, v) for v in node.outputs} | ({(node.source, node.value)} if node.carried else set())
        assert needed <= known
        assert all(node.target <= k < node.source for k in node.operations)
        known.add((node.target, node.value))
    influence = set(graph.outputs)
    for op in reversed(graph.operations):
        if op.batched and influence.intersection(op.writes):
            influence.update(op.reads)
    for op in graph.operations:
        for v in op.writes:
            if op.batched and op.parameters and graph.values[v].floating and v in influence:
                assert (op.index + 1, v) in known or v not in graph.live[op.index + 1]


def random_chain(seed):
    """Linear layers in a row, and between them what makes the width smaller, larger, or leaves it."""
    generator = torch.Generator().manual_seed(seed)

    def choice(n):
        return int(torch.randint(n, (), generator=generator))

    width = first = 2 + 2 * choice(4)
    layers = []
    for _ in range(8):
        kind = choice(4)
        if kind == 0:
            wider = 2 + 2 * choice(4)
            layers.append(nn.Linear(width, wider).double())
            width = wider
        elif kind == 1 and width % 2 == 0:
            layers.append(nn.GLU())
            width //= 2
        elif kind == 2 and width < 9:
            layers.append(lambda h: torch.cat([h.sin(), h.cos()], 1))
            width *= 2
        else:
            layers.append(torch.tanh)
    return hzo.trace(
        hzo.Chain([nn.Linear(first, first).double(), *layers, nn.Linear(width, 2).double()]), normal(2, first)
    )


@pytest.mark.parametrize("seed", range(12))
def test_planned_is_the_optimum(seed):
    """Against all sets of boundaries, each taking its cotangent from any later one."""
    chain = random_chain(seed)
    graph = chain.traced
    end = len(graph.operations)
    needed = {op.index + 1 for op in graph.operations if op.batched and op.parameters} - {end}
    # Inside sin and cos several tensors are alive; cuts there never pay, since both are needed.
    single = [p for p in range(1, end) if len(graph.live[p]) == 1 and graph.passable(p)]
    optional = [p for p in single if p not in needed]

    def cost(target, source):
        (value,) = graph.live[target]
        return 2 * graph.values[value].per_sample * graph.cost_of(range(target, source))

    best = min(
        sum(min(cost(t, s) for s in (*chosen, end) if s > t) for t in chosen)
        for size in range(len(optional) + 1)
        for extra in itertools.combinations(optional, size)
        for chosen in [sorted(needed.union(extra))]
    )
    plan = hzo.plan(chain, tree="planned", assume="nothing")
    assert plan.cost.forward_equivalents * graph.cost == best
    for tree in TRIED[:-1]:
        assert hzo.plan(chain, tree=tree, assume="nothing").cost.forward_equivalents * graph.cost >= best


def test_plans_are_equal_when_made_alike_and_print():
    chain = solve("mlp").chain
    assert hzo.plan(chain, tree="bisect") == hzo.plan(chain, tree="bisect")
    text = str(hzo.plan(chain, tree="bisect", assume="nothing", scheme="forward", step=1e-4))
    assert "tree bisect, assume nothing, forward differences, step 0.0001" in text
    assert "boundary 1 from boundary" in text
    assert "queries" in text


def test_totals_are_those_of_the_batch_traced():
    model = CASES["mlp"].build().model
    small, large = (hzo.plan(hzo.trace(model, normal(size, 4)), assume="nothing") for size in (2, 10))
    assert large.queries == 5 * small.queries
    assert large.stage_evaluations == 5 * small.stage_evaluations
    assert large.forward_equivalents == small.forward_equivalents
    assert large.fingerprint == small.fingerprint


def test_presets_are_options_of_plan():
    chain = solve("mlp").chain
    assert hzo.plan(chain, **presets.paper).tree == "bisect"
    assert hzo.plan(chain, **presets.fast).tree == "planned"
    with pytest.raises(TypeError):
        presets.paper["tree"] = "flat"


def test_steps_of_the_user_are_used():
    solved = solve("mlp")
    coarse, _ = solved.estimate(hzo.plan(solved.chain, assume="nothing", step=0.5))
    fine, _ = solved.estimate(hzo.plan(solved.chain, assume="nothing", step=1e-4))
    errors = [max(float((g[n] - solved.exact[n]).norm()) for n in solved.exact) for g in (coarse, fine)]
    assert errors[0] > 1e-3
    assert errors[1] < 1e-7


def test_deep_chains_plan_quickly():
    """The programme looks at all edges: fine for hundreds of stages."""
    chain = hzo.trace(nn.Sequential(*(nn.Linear(2, 2) for _ in range(100))), torch.randn(2, 2))
    for tree in TRIED:
        assert len(hzo.plan(chain, tree=tree, assume="nothing").nodes) == 99

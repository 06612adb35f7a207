"""Standard architectures out of the box, in training mode, with the default assumptions, against autograd."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.plans.plan import describe
from support import oracles
from support.architectures import NETWORKS
from support.cases import Problem

TOLERANCE = 1e-6


@pytest.fixture(scope="module", params=NETWORKS)
def problem(request):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, x, y = NETWORKS[request.param]()
    return Problem(model.double().train(), F.cross_entropy, x, y)


def test_gradients_and_counts(problem):
    chain = hzo.trace(problem.model, problem.x)
    plan = hzo.plan(chain)
    torch.manual_seed(oracles.SEED)
    with oracles.undisturbed(problem.module), hzo.count_queries() as count:
        found, loss = hzo.grad_and_value(chain, F.cross_entropy, problem.x, problem.y, plan=plan)
    torch.manual_seed(oracles.SEED)
    exact, exact_loss = oracles.gradients(problem)
    assert set(found) == set(dict(problem.model.named_parameters()))
    assert oracles.worst(oracles.relative_errors(found, exact)) <= TOLERANCE
    torch.testing.assert_close(loss, exact_loss)
    predicted = (plan.queries, plan.stage_evaluations, plan.forward_equivalents, plan.adjoints)
    assert (count.queries, count.stage_evaluations, count.forward_equivalents, count.adjoints) == predicted


def test_buffers_and_random_state_are_as_after_one_forward_pass(problem):
    ordinary, model = copy.deepcopy(problem.model), copy.deepcopy(problem.model)
    torch.manual_seed(oracles.SEED)
    ordinary(problem.x)
    state = torch.get_rng_state()
    torch.manual_seed(oracles.SEED)
    hzo.grad_and_value(model, F.cross_entropy, problem.x, problem.y)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, expected), buffer in zip(ordinary.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


PLAIN = re.compile(
    r"^  (?P<where>.+) from .+: (?P<kind>\w+) probe, (?P<directions>\d+) directions .*\((?P<share>[\d.]+)%\)$"
)


def plain_nodes(plan):
    return [node for node in plan.nodes if node.probe is not None and node.probe.kind != "elementwise"]


def test_what_takes_plain_queries_is_named_with_its_share(problem):
    """Only maps smaller than the canvas that measures a convolution: then coordinates are the cheaper way."""
    chain = hzo.trace(problem.model, problem.x)
    plan = hzo.plan(chain)
    rows = [match for line in describe(plan, width=300).splitlines() if (match := PLAIN.match(line))]
    listed = [(row["where"], int(row["directions"])) for row in rows if row["kind"] != "elementwise"]
    assert listed == [(plan.labels[node.target], node.probe.directions) for node in plain_nodes(plan)]
    assert not plan.perturbed
    shapes = [chain.traced.values[node.value].shape for node in plain_nodes(plan)]
    assert all(size == 1 for shape in shapes for size in shape[2:])


def test_an_operation_of_which_nothing_is_known_is_named():
    class Cumulative(nn.Module):
        def forward(self, x):
            return x.cumsum(1)

    model = nn.Sequential(nn.Linear(8, 8), hzo.declare(Cumulative()), nn.Linear(8, 3)).double()
    plan = hzo.plan(hzo.trace(model, torch.randn(4, 8, dtype=torch.float64)))
    (row,) = [match for line in describe(plan, width=300).splitlines() if (match := PLAIN.match(line))]
    assert row["where"] == "boundary 1"
    assert int(row["directions"]) == 8
    assert 0 < float(row["share"]) < 100

"""What a plan says of processes that share it; that they do so, tests/distributed sees."""

import pytest
import torch
from torch import nn

import hzo
from hzo.errors import InputError, PlanError


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return hzo.trace(model, torch.randn(12, 5, dtype=torch.float64))


FLAT = {"tree": "flat", "assume": "nothing"}


def test_directions_and_samples_are_divided(chain):
    whole = hzo.plan(chain, **FLAT)
    assert whole.mesh is None
    assert whole.queries == 12 * 2 * (7)  # the boundary behind the first layer, from the end
    for samples, ways in [(1, 1), (2, 1), (1, 4), (5, 2), (12, 7)]:
        plan = hzo.plan(chain, mesh=(samples, ways), **FLAT)
        here = plan.mesh.here
        assert (here.along_sample, here.along_query) == (samples, ways)
        assert here.batch == -(-12 // samples)
        assert here.queries == here.batch * 2 * -(-7 // ways)
        assert here.forward_equivalents == pytest.approx(whole.forward_equivalents * here.queries / whole.queries)
        assert plan == whole, "a mesh is no decision"
    alone = hzo.plan(chain, mesh=(1, 1), **FLAT).mesh.here
    assert (alone.words, alone.exchanges) == (0, 0)


def test_what_is_sent(chain):
    of_query = hzo.plan(chain, mesh=(1, 7), **FLAT).mesh.here
    assert of_query.words == 12 * 7  # the node's cotangent
    parameters = 5 * 7 + 7 + 7 * 3 + 3
    of_sample = hzo.plan(chain, mesh=(4, 1), **FLAT).mesh.here
    assert of_sample.words == parameters + 4 + 1  # gradients, of which there are some, the loss


def test_it_says_which_dimension(chain):
    rules = hzo.plan(chain, mesh=(1, 4)).mesh
    assert (rules.best.along_sample, rules.best.along_query) == (4, 1), "rules have nothing to divide along query"
    assert 'better: "sample" alone, 4 × 1' in str(hzo.plan(chain, mesh=(1, 4)))
    few = hzo.trace(chain.model, torch.randn(1, 5, dtype=torch.float64))
    of_one = hzo.plan(few, mesh=(4, 1), **FLAT).mesh
    assert (of_one.best.along_sample, of_one.best.along_query) == (1, 4), "there is one sample"
    assert 'better: "query" alone' in str(of_one)
    both = hzo.plan(chain, mesh=(1, 48), **FLAT)
    assert (both.mesh.best.along_sample, both.mesh.best.along_query) == (12, 4)
    assert "better: both dimensions, 12 × 4" in str(both)
    assert "better" not in str(hzo.plan(chain, mesh=(12, 4), **FLAT))


def test_seconds_have_those_of_exchanges(chain):
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    known = hzo.calibrate(chain, x, nn.functional.cross_entropy, y, assume="nothing")
    options = {"calibration": known, **FLAT}
    alone = hzo.plan(chain, mesh=(1, 1), **options)
    assert alone.mesh.here.seconds == pytest.approx(alone.expected.seconds)
    shared = hzo.plan(chain, mesh=(3, 4), **options).mesh.here
    assert alone.mesh.here.seconds / 12 <= shared.seconds < alone.mesh.here.seconds / 2
    linked = hzo.plan(chain, mesh=(3, 4), link=(0.5, 10.0), **options).mesh
    assert linked.here.seconds == pytest.approx(shared.seconds + 0.5 * shared.exchanges + shared.words / 10)
    assert linked.best.seconds <= linked.here.seconds
    assert hzo.plan(chain, mesh=(3, 4), **FLAT).mesh.here.seconds is None


def test_a_budget_is_that_of_each_process(chain):
    options = {"tree": "flat", "assume": "nothing", "noise": 1e-3, "budget": 40.0}
    alone = hzo.plan(chain, **options)
    shared = hzo.plan(chain, mesh=(1, 7), **options)
    assert alone.forward_equivalents <= 40
    assert shared.mesh.here.forward_equivalents <= 40 < shared.forward_equivalents
    assert shared.expected.cosine > alone.expected.cosine
    with pytest.raises(PlanError, match="cheapest plan takes"):
        hzo.plan(chain, mesh=(1, 7), **options | {"budget": 1e-3})


def test_samples_that_influence_each_other():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    chain = hzo.trace(model, torch.randn(8, 4))
    assert "statistics of its own (BatchNorm)" in str(hzo.plan(chain, mesh=(2, 1)))


@pytest.mark.parametrize("mesh", [4, (2,), (0, 2), (2, 1.5), (True, 2), "2x4"])
def test_meshes_are_checked(chain, mesh):
    with pytest.raises(InputError, match="expected mesh to be"):
        hzo.plan(chain, mesh=mesh)


@pytest.mark.parametrize("link", [1.0, (1.0,), (1e-4, 0.0), (-1.0, 1.0)])
def test_links_are_checked(chain, link):
    with pytest.raises(InputError, match=r"link|words a second"):
        hzo.plan(chain, mesh=(1, 2), link=link)
    with pytest.raises(InputError, match="beside mesh="):
        hzo.plan(chain, link=(1e-4, 1e8))

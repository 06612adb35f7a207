"""Chains: what is understood of a model, how it is cut into stages, and chains by hand."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import hzo
from hzo.errors import InputError, TraceError
from support.cases import CASES
from support.oracles import normal, solve


@pytest.mark.parametrize("name", CASES)
def test_stages_and_printing(name):
    solved = solve(name)
    graph = solved.chain.traced
    assert graph.boundaries[0] == 0
    assert graph.boundaries[-1] == len(graph.operations)
    assert list(graph.boundaries) == sorted(graph.boundaries)
    if isinstance(solved.problem.model, nn.Sequential):
        assert len(solved.chain) == len(solved.problem.model)
    assert f"Chain of {len(solved.chain)} stages" in str(solved.chain)
    assert "queries" in str(hzo.plan(solved.chain))


def test_whole_modules_are_cut_between_blocks_first():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(CASES["residual_mlp"].build().model[1:4])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    chain = hzo.trace(Net(), normal(3, 4))
    graph = chain.traced
    single = [len([v for v in graph.live[p] if v not in graph.inputs]) for p in graph.boundaries[1:]]
    assert single == [1] * len(chain)
    assert len(chain) >= 3


def test_chain_by_hand():
    with pytest.raises(InputError, match="at least one stage"):
        hzo.Chain([])
    with pytest.raises(InputError, match="stage 1 is a int; a stage must be callable"):
        hzo.Chain([torch.sin, 3])
    chain = hzo.Chain([nn.Linear(3, 3), torch.sin])
    assert len(chain) == 2
    assert "not traced" in str(chain)
    assert len(list(chain.parameters())) == 2
    with pytest.raises(TraceError, match=r"call chain = hzo.trace\(chain, x\) first"):
        hzo.plan(chain)
    x = torch.randn(2, 3)
    assert torch.equal(hzo.trace(chain, x)(x), chain(x))


def test_empty_stages():
    """A stage that hands on what it gets is a stage, and costs nothing."""
    layers = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    chain = hzo.trace(
        hzo.Chain([lambda x: x, layers[0], lambda x: x, lambda x: x, layers[1], lambda x: x]), normal(3, 3)
    )
    assert len(chain) == 6
    for tree in ("flat", "bisect", "stagewise", "planned"):
        found = hzo.cotangents(chain, lambda out: out.square().sum(1), normal(3, 3), tree=tree)
        assert len(found) == 7
        assert torch.equal(found[2], found[4])
        assert torch.equal(found[0], found[1])


def test_a_traced_chain_is_copied_and_not_pickled():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    chain = hzo.trace(model, torch.randn(5, 3))
    assert copy.copy(chain).model is model
    own = copy.deepcopy(chain)
    assert own.model is not model
    assert own.traced.fingerprint == chain.traced.fingerprint
    hzo.backward(own, lambda out: out.square().mean(), torch.randn(5, 3))
    assert own.model[0].weight.grad is not None
    assert model[0].weight.grad is None
    for write in (pickle.dumps, lambda c: torch.save(c, io.BytesIO())):
        with pytest.raises(TraceError, match=r"cannot be pickled.*hzo\.save_plan"):
            write(chain)
    loaded = pickle.loads(pickle.dumps(hzo.Chain(model)))
    torch.testing.assert_close(loaded(torch.ones(1, 3)), model(torch.ones(1, 3)))

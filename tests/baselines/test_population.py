"""Queries of a population on workers: what they find is what they find one by one, to the bit."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from threading import Lock

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hzo
from hzo.baselines import _two_point, forward_gradient, mezo, spsa
from hzo.errors import InputError, QueryError
from support.oracles import normal

X, Y = normal(6, 5), torch.arange(6) % 3


def model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Tanh(), nn.Linear(4, 3)).double()


def found(method, network, executor, samples=4):
    torch.manual_seed(3)
    with hzo.count_queries() as count:
        loss = method(network, cross_entropy, X, Y, samples=samples, executor=executor)
    after = torch.rand(())
    return loss, [p.grad for p in network.parameters()], [b.clone() for b in network.buffers()], after, count.queries


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def one_by_one(monkeypatch):
    for file in (_two_point, hzo.baselines._forward_gradient):
        monkeypatch.setattr(file, "_slopes_together", lambda *_: None)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", [spsa, mezo, forward_gradient])
def test_the_same_bits(method, dropout, processes, one_by_one):
    """Gradient, loss, buffers, random numbers that come after, and the count."""
    first, second = found(method, model(dropout), None), found(method, model(dropout), processes)
    assert torch.equal(first[0], second[0])
    for a, b in zip((*first[1], *first[2]), (*second[1], *second[2]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first[3], second[3])
    assert first[4] == second[4]


@pytest.mark.parametrize("method", [spsa, forward_gradient])
def test_threads(method, one_by_one):
    with ThreadPoolExecutor(3) as executor:
        first, second = found(method, model(), None), found(method, model(), executor)
        for a, b in zip((*first[1], *first[2]), (*second[1], *second[2]), strict=True):
            assert torch.equal(a, b)
        with pytest.raises(InputError, match=r"a query of the population: .* executor of processes"):
            found(method, model(0.3), executor)


def test_all_go_out_at_once(one_by_one):
    """As many queries wait as there are, before the first is answered."""
    waiting = []

    class Noting(ThreadPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            waiting.append(sum(not f.done() for f in asked))
            asked.append(super().submit(fn, *args, **kwargs))
            return asked[-1]

    asked = []
    with Noting(1) as executor:
        found(spsa, model(), executor, samples=5)
    assert len(waiting) == 10
    assert max(waiting) >= 2


def test_what_cannot_be_sent(processes):
    lock = Lock()  # no pickle holds it, cloudpickle's neither
    network = model()
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(QueryError, match=r"a query of the population: .* cannot be sent to a worker"):
        spsa(network, lambda out, y: cross_entropy(out, y) + 0 * lock.locked(), X, Y, executor=processes)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(network.parameters(), before, strict=True))

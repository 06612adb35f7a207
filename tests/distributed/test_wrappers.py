"""Gradients of models that are spread over processes are those of the wrapper, or there is an error that says how."""

import pytest
import torch
from torch import nn

import hzo
from hzo.errors import DistributedError
from support import ranks, wrapped


def same(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def found():
    """What two ranks found, by name of the test."""
    return ranks.results(wrapped.data_parallel, 2)


class TestDataParallel:
    def test_as_its_own_backward(self, found):
        """Uneven shards, a parameter that one rank alone uses, buffers sent by rank 0, two gradients added up."""
        for rank in found:
            (by_hzo, mean, loss), (exact, exact_mean, exact_loss) = rank["own backward"]
            same(by_hzo, exact)
            assert mean == exact_mean
            assert loss == pytest.approx(exact_loss, rel=1e-12)

    def test_no_sync(self, found):
        for rank in found:
            same(*rank["no_sync"])

    def test_by_a_plan(self, found):
        for rank in found:
            by_plan, own, named = rank["plan"]
            same(by_plan, own)
            same(named, own)

    @pytest.mark.parametrize("name", wrapped.BASELINES)
    def test_baselines(self, found, name):
        same(*found[0][name])
        assert found[0][name][0] == found[1][name][0], "ranks drift apart"

    def test_each_rank_checks_its_own(self, found):
        assert [rank["check"] for rank in found] == [True, True]


@pytest.mark.parametrize("form", ["FSDP2", "tensor parallel"])
def test_shares_are_refused(form):
    for found, by_backprop in ranks.results(wrapped.refused, 2, form):
        assert found.keys() == wrapped.ENTRIES.keys()
        for message in found.values():
            assert "hzo.module(" in message
            assert ("FSDP" if form == "FSDP2" else "DTensor") in message
        assert by_backprop


@pytest.fixture
def single():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_inside_of_a_model_the_error_says_where(single):
    model = nn.Sequential(nn.Linear(2, 2), nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
    with pytest.raises(DistributedError, match=r"the module '1' of the model is wrapped in DistributedDataParallel"):
        hzo.backward(model, torch.sum, torch.ones(1, 2))


def test_traces_are_made_of_the_model_inside(single):
    with pytest.raises(DistributedError, match=r"trace the model inside of it \(model.module\)"):
        hzo.trace(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), torch.ones(1, 2))

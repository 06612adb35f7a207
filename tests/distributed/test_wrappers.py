"""Gradients of models that are spread over processes are those of the wrapper, or there is an error that says how."""

import re

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


FULLY_SHARD = "Take FSDP2 (torch.distributed.fsdp.fully_shard), and have hzo work inside of it: wrap hzo.module(model)"


def refused_by_all(model):
    """What everything says that takes a model."""
    x, loss_fn = torch.ones(2, 4), lambda out, y=None: out.sum()

    def record():
        with hzo.record(model):
            model(x)

    entries = {
        "backward": lambda: hzo.backward(model, loss_fn, x),
        "grad_and_value": lambda: hzo.grad_and_value(model, loss_fn, x),
        "with a plan": lambda: hzo.backward(model, loss_fn, x, tree="flat", assume="nothing"),
        "record": record,
        "trace": lambda: hzo.trace(model, x),
        "module": lambda: hzo.module(model),
        "spsa": lambda: hzo.baselines.spsa(model, loss_fn, x),
        "mezo": lambda: hzo.baselines.mezo(model, loss_fn, x),
    }
    said = {}
    for name, entry in entries.items():
        try:
            entry()
            said[name] = "nothing"
        except DistributedError as error:
            said[name] = str(error)
    return said


@pytest.mark.parametrize("flat", [True, False])
def test_the_first_fsdp_is_refused(single, flat):
    def sharded():
        layers = [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)]
        how = {"device_id": torch.device("cpu"), "use_orig_params": not flat}
        return torch.distributed.fsdp.FullyShardedDataParallel(nn.Sequential(*layers), **how)

    for model in (sharded(), nn.Sequential(sharded(), nn.ReLU())):
        for name, message in refused_by_all(model).items():
            assert "wrapped in FullyShardedDataParallel (FSDP's first version)" in message, name
            assert FULLY_SHARD in message, name
    if not flat:
        for name, message in refused_by_all(sharded().module).items():
            assert re.search(r"parameter .* belongs to FullyShardedDataParallel", message), name


@pytest.mark.parametrize("flat", [True, False])
def test_a_module_under_the_first_fsdp_says_that_nothing_would_be_trained(single, flat):
    how = {"device_id": torch.device("cpu"), "use_orig_params": not flat}
    model = torch.distributed.fsdp.FullyShardedDataParallel(hzo.module(nn.Linear(4, 3)), **how)
    with pytest.raises(hzo.errors.TapeError, match="nothing would be trained: so it is with the parameters of FSDP's"):
        model(torch.ones(2, 4))
    with torch.no_grad():
        model(torch.ones(2, 4))


class DeepSpeedEngine(nn.Module):
    """Known by its name and where it is from, as the real one is, which is not installed here."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class PipelineEngine(DeepSpeedEngine):
    __module__ = "deepspeed.runtime.pipe.engine"


@pytest.mark.parametrize("engine", [DeepSpeedEngine, PipelineEngine])
def test_deepspeed_is_refused(engine):
    for model in (engine(nn.Linear(4, 3)), nn.Sequential(engine(nn.Linear(4, 3)))):
        for name, message in refused_by_all(model).items():
            assert f"wrapped in DeepSpeed's {engine.__name__}" in message, name
            assert FULLY_SHARD in message, name
    inner = nn.Linear(4, 3)
    inner.weight.ds_id = 0  # ZeRO's mark on a parameter that it has spread
    for name, message in refused_by_all(inner).items():
        assert re.search(r"parameter .* belongs to DeepSpeed \(ZeRO, stage 3\)", message), name
    hzo.backward(type("DeepSpeedEngine", (nn.Linear,), {})(4, 3), torch.sum, torch.ones(2, 4))  # only a namesake

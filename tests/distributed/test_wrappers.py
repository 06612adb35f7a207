"""Gradients of models that are spread over processes are those of the wrapper, or there is an error that says how."""

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

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

    def test_parameters_that_it_leaves_alone(self, found):
        for rank in found:
            same(*rank["ignored"])
        assert found[0]["ignored"][0]["first.weight"] != found[1]["ignored"][0]["first.weight"]

    def test_micro_batches_without_averaging_are_averaged_with_the_next(self, found):
        """DDP averages what .grad holds by then: else ranks would drift apart."""
        for rank in found:
            by_hzo, by_differences, by_autograd = rank["micro-batches"]
            for here, near, exact in zip(by_hzo, by_differences, by_autograd, strict=True):
                same(here, exact)
                for name in exact:
                    if exact[name] is not None and near[name] is not None:
                        torch.testing.assert_close(
                            torch.tensor(near[name]), torch.tensor(exact[name]), rtol=1e-6, atol=1e-6
                        )
        for way in (0, 1):
            assert found[0]["micro-batches"][way][2:] == found[1]["micro-batches"][way][2:], "ranks drift apart"
            assert found[0]["micro-batches"][way][1] != found[1]["micro-batches"][way][1]

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


def test_backprop_of_what_is_spread():
    """The baseline is loss.backward(), also where modules swap their parameters in the middle of a step."""
    for found in ranks.results(wrapped.backprop_of_spread, 2):
        for form in wrapped.SPREAD:
            for by_baseline, own in zip(*found[form], strict=True):
                torch.testing.assert_close(torch.tensor(by_baseline), torch.tensor(own), rtol=1e-12, atol=1e-12)


def test_collectives_inside_of_a_model():
    """Gradients are autograd's where that has one; what cannot be followed, and what queries would ask, is refused."""
    for found in ranks.results(wrapped.collectives, 2):
        for kind in wrapped.KINDS:
            for name in ("backward", "record"):
                if kind in ("in place", "functional"):
                    assert "ran in the recording, on a tensor that carries a gradient" in found[kind, name], kind
                    assert "torch.autograd.Function" in found[kind, name]
                else:
                    same(found[kind, name], found[kind, "backprop"])
            for name in ("check_gradient", "spsa", "mezo", "coordinate_wise", "forward_gradient", "a box"):
                assert "a collective (" in found[kind, name], (kind, name)
        assert "which takes the backward of a custom Function" in found["custom Function", "backward by a plan"]
        assert "which takes the backward of a custom Function" in found["custom Function", "trace"]


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


class Scaled(nn.parallel.DistributedDataParallel):
    def forward(self, *args):
        return 3 * super().forward(*args)


def data_parallel_with(what):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    if what == "delayed":
        later = model[0].weight
        return nn.parallel.DistributedDataParallel(
            model, delay_all_reduce_named_params=[("0.weight", later)], param_to_hook_all_reduce=model[1].weight
        )
    if what == "a forward of its own":
        return Scaled(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if what == "a hook":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif what == "a hook in C++":
        wrapped._register_builtin_comm_hook(torch.distributed.BuiltinCommHookType.FP16_COMPRESS)
    elif what == "a hook for buffers":
        wrapped._register_buffer_comm_hook(None, lambda state, buffers: None)
    elif what == "hooks of modules":
        wrapped.register_forward_hook(lambda module, args, out: 3 * out)
    elif what == "another forward":
        plain = wrapped.forward
        wrapped.forward = lambda *args: 3 * plain(*args)
    elif what == "mixed precision":
        wrapped.mixed_precision = SimpleNamespace(param_dtype=None)  # making one needs a GPU
    return wrapped


MORE = {
    "a hook": "with a communication hook for gradients",
    "a hook in C++": "with a communication hook for gradients",
    "a hook for buffers": "with a communication hook for buffers",
    "delayed": "with delay_all_reduce_named_params=",
    "a forward of its own": r"with a forward\(\) of its own",
    "another forward": r"with a forward\(\) of its own",
    "hooks of modules": "with hooks of modules on the wrapper itself",
    "mixed precision": "with mixed_precision=",
    "join": r"inside of its join\(\)",
}


@pytest.mark.parametrize("what", MORE)
def test_more_than_averaging_is_refused(single, what):
    model = data_parallel_with(what)
    with model.join() if what == "join" else contextlib.nullcontext():
        said = refused_by_all(model)
    for name in said.keys() - {"record"}:  # which refuses the gradient, not the forward pass
        assert re.search(MORE[what], said[name]), (name, said[name])
        assert "DistributedDataParallel(hzo.module(model)), then loss.backward()" in said[name]


def test_replicate_is_refused(single):
    for model in (replicate(nn.Linear(4, 3)), nn.Sequential(replicate(nn.Linear(4, 3)))):
        for name, message in refused_by_all(model).items():
            assert "was given to replicate(), which averages gradients" in message or "ran inside" in message, name
            assert "replicate(hzo.module(model)), then loss.backward()" in message, name


class Hiding(nn.Module):
    """Holds a module where nobody finds it."""

    def __init__(self, module):
        super().__init__()
        self.own, self.hidden = nn.Linear(4, 4), [module]

    def forward(self, x):
        return self.hidden[0](self.own(x))


def test_out_of_sight_it_is_refused_when_it_runs(single):
    model, x = Hiding(nn.parallel.DistributedDataParallel(nn.Linear(4, 3))), torch.ones(2, 4)
    replaced = Hiding(nn.parallel.DistributedDataParallel(nn.Linear(4, 3)))
    replaced.hidden[0].forward = replaced.hidden[0].forward  # one that was taken before the recording
    for each in (model, replaced):
        for options in ({}, {"tree": "flat", "assume": "nothing"}):
            with pytest.raises(DistributedError, match="averaged over the processes by hooks of autograd"):
                hzo.backward(each, lambda out: out.sum(), x, **options)
        with pytest.raises(DistributedError, match="ran inside of a model that is planned for"):
            hzo.trace(each, x)


@pytest.mark.parametrize("f", [nn.parallel.DistributedDataParallel, replicate])
def test_no_black_box_of_a_wrapper(single, f):
    with pytest.raises(DistributedError, match=r"make a black box of the module inside|replicate\(hzo.module"):
        hzo.blackbox(f(nn.Linear(4, 3)))


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, out, y=None):
        return (out * self.weight).sum()


def test_a_loss_that_is_spread_is_refused(single):
    loss_fn, model, x = nn.parallel.DistributedDataParallel(Weighted()), nn.Linear(4, 3), torch.ones(2, 4)
    for call in (hzo.backward, hzo.grad_and_value, hzo.baselines.spsa, hzo.baselines.coordinate_wise):
        with pytest.raises(DistributedError, match="the loss is wrapped in DistributedDataParallel"):
            call(model, loss_fn, x)
    with pytest.raises(DistributedError, match="the loss is wrapped in DistributedDataParallel"):
        hzo.backward(model, loss_fn, x, tree="flat", assume="nothing")


def test_data_parallel_of_threads():
    x = torch.ones(2, 4)
    model = nn.DataParallel(nn.Linear(4, 3))
    for estimate in (hzo.backward, hzo.baselines.forward_gradient, hzo.baselines.spsa):
        model.zero_grad()
        estimate(model, lambda out: out.sum(), x)
        assert model.module.weight.grad.abs().sum() > 0
    model.device_ids = [0, 1]  # as on a machine with two
    for name, message in refused_by_all(model).items():
        assert "DataParallel over several devices" in message, name
        assert "take DistributedDataParallel" in message, name


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

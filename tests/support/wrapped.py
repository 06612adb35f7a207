"""What ranks do in tests of wrapped models: one function each, returning numbers."""

import contextlib
import copy
from functools import partial

import torch
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hzo
from hzo.errors import DistributedError


class Branching(nn.Module):
    """A parameter that only one of two ranks uses, BatchNorm, and an input that all use."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.own = nn.Linear(8, 8)

    def forward(self, x, side=False):
        x = self.norm(self.first(x)).tanh()
        return self.last(self.own(x) if side else x)


def network():
    torch.manual_seed(0)
    return Branching().double()


def batch(rank, size=5):
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randn(size, 6, dtype=torch.float64, generator=generator), torch.arange(size) % 3


def gradients(model):
    return {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()}


def beside_backprop(rank):
    """Gradient, buffers and loss by hzo, and by autograd's own backward, of one rank; uneven shards."""
    found = []
    for by_hzo in (True, False):
        model = network()
        if rank:  # the wrapper sends those of rank 0
            model.norm.running_mean += 1
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        x, y = batch(rank, 5 + 2 * rank)
        for _ in range(2):
            x = {"x": x, "side": bool(rank)} if isinstance(x, torch.Tensor) else x
            if by_hzo:
                loss = hzo.backward(wrapped, cross_entropy, x, y)
            else:
                loss = cross_entropy(wrapped(**x), y)
                loss.backward()
        found.append((gradients(model), model.norm.running_mean.tolist(), float(loss)))
    return found


def ignoring(rank):
    """A parameter that the wrapper was told to leave alone, by hzo and by autograd."""
    found = []
    for by_hzo in (True, False):
        model = network().eval()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["first.weight"])
        wrapped, (x, y) = DistributedDataParallel(model, find_unused_parameters=True), batch(rank)
        loss = hzo.backward(wrapped, cross_entropy, x, y) if by_hzo else cross_entropy(wrapped(x), y).backward()
        assert loss is None or loss.isfinite()
        found.append(gradients(model))
    return found


def micro_batches(rank):
    """.grad after each of four micro-batches, two of them inside of no_sync(), and the last two are sums of all: by
    hzo, by the baseline that comes closest, and by autograd."""
    found = []
    for way in (hzo.backward, hzo.baselines.coordinate_wise, hzo.baselines.backprop):
        model = network().eval()
        wrapped, sums = DistributedDataParallel(model, find_unused_parameters=True), []
        for micro in range(4):
            x, y = batch(rank + 2 * micro)
            with wrapped.no_sync() if micro in (0, 1) else contextlib.nullcontext():
                way(wrapped, cross_entropy, {"x": x, "side": bool(rank)}, y)
            sums.append(gradients(model))
        found.append(sums)
    return found


def without_averaging(rank):
    model = network()
    wrapped, (x, y) = DistributedDataParallel(model, find_unused_parameters=True), batch(rank)
    with wrapped.no_sync():
        hzo.backward(wrapped, cross_entropy, x, y)
    local = gradients(model)
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    return local, gradients(model)


def by_plan(rank):
    """A plan made of the model inside goes with the wrapped one; the mean of the ranks' own gradients by that plan."""
    model = network().eval()
    x, y = batch(rank)
    plan = hzo.plan(hzo.trace(model, x), tree="bisect", assume="nothing")
    hzo.backward(model, cross_entropy, x, y, plan=plan)
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for g in own.values():
        torch.distributed.all_reduce(g)
        g.div_(2)
    model.zero_grad()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    hzo.backward(wrapped, cross_entropy, x, y, plan=plan)
    named, _ = hzo.grad_and_value(wrapped, cross_entropy, x, y, plan=plan)
    return (
        {n: p.grad.tolist() for n, p in model.named_parameters() if p.grad is not None},
        {n: g.tolist() for n, g in own.items()},
        {n.removeprefix("module."): g.tolist() for n, g in named.items()},
    )


BASELINES = {
    "backprop": {},
    "coordinate_wise": {},
    "spsa": {"samples": 3},
    "mezo": {},
    "forward_gradient": {"samples": 2},
    "node_perturbation": {},
}


def data_parallel(rank):
    """All of the above and below, by name: starting processes takes longer."""
    return {
        "own backward": beside_backprop(rank),
        "no_sync": without_averaging(rank),
        "plan": by_plan(rank),
        "check": check(rank),
        "ignored": ignoring(rank),
        "micro-batches": micro_batches(rank),
        **{name: baseline(rank, name, options) for name, options in BASELINES.items()},
    }


def baseline(rank, name, options):
    """A baseline's gradient of the wrapped model, and the mean over ranks of that of the model itself."""
    estimate = getattr(hzo.baselines, name)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    wrapped, (x, y) = DistributedDataParallel(model), batch(rank)
    torch.manual_seed(rank)  # of the directions: ranks need not agree
    estimate(wrapped, cross_entropy, x, y, **options)
    inner = copy.deepcopy(model)
    inner.zero_grad()
    torch.manual_seed(rank)
    estimate(inner, cross_entropy, x, y, **options)
    for p in inner.parameters():
        torch.distributed.all_reduce(p.grad)
        p.grad /= 2
    return gradients(model), gradients(inner)


def check(rank):
    """Each rank tests its own gradient against its own loss."""
    wrapped, (x, y) = DistributedDataParallel(network(), find_unused_parameters=True), batch(rank)
    return hzo.check_gradient(wrapped, cross_entropy, x, y).holds


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def spread(form):
    """A model that a wrapper has spread, alike on all processes."""
    mesh, model = init_device_mesh("cpu", (2,)), layers()
    if form == "a part by FSDP2":
        fully_shard(model[0], mesh=mesh)
        return model
    if form == "FSDP's first version":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    return fully_shard(model, mesh=mesh)


SPREAD = ("FSDP2", "a part by FSDP2", "FSDP's first version")


def backprop_of_spread(rank):
    """By form: the gradients' own parts after two steps of the baseline backprop, and of loss.backward() itself."""
    found = {}
    for form in SPREAD:
        for by_baseline in (True, False):
            model, (x, y) = spread(form), batch(rank)
            for _ in range(2):
                if by_baseline:
                    hzo.baselines.backprop(model, cross_entropy, x, y)
                else:
                    cross_entropy(model(x), y).backward()
            grads = [p.grad for p in model.parameters()]
            own = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
            found.setdefault(form, []).append([g.tolist() for g in own])
    return found


class Reduced(nn.Module):
    """The mean over processes, as code takes it: in place, functional, by a custom Function, of data alone."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "in place":
            x = x * 1.0
            torch.distributed.all_reduce(x)
            return x / 2
        if self.how == "functional":
            return functional.all_reduce(x, "sum", torch.distributed.group.WORLD) / 2
        if self.how == "custom Function":
            return OwnReduce.apply(x) / 2
        if self.how == "gathered":  # the others' as data, its own with a gradient, as in contrastive losses
            everybody = [torch.zeros_like(x) for _ in range(2)]
            torch.distributed.all_gather(everybody, x)
            everybody[torch.distributed.get_rank()] = x
            return everybody[0] * everybody[1]
        with torch.no_grad():
            size = x.abs().mean()
            torch.distributed.all_reduce(size)
        return x / size


class OwnReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        torch.distributed.all_reduce(g)
        return g


KINDS = ("in place", "functional", "custom Function", "data", "gathered")


def collectives(rank):
    """By kind and entry the error's message, or the gradients; backprop's under "backprop"."""
    found = {}
    for kind in KINDS:
        for name, entry in {**ENTRIES, "backprop": partial(_by, "backprop"), "a box": _in_a_box}.items():
            model, (x, y) = layers(), batch(rank)
            model.insert(1, Reduced(kind))
            try:
                entry(model, x, y)
                found[kind, name] = gradients(model)
            except DistributedError as error:
                found[kind, name] = str(error)
    return found


def _in_a_box(model, x, y):
    model[1] = hzo.blackbox(model[1], batch_dim=None)
    cross_entropy(model(x), y).backward()


def sharded(form):
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    mesh = init_device_mesh("cpu", (2,))
    if form == "FSDP2":
        for layer in model:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _recorded(model, x, y):
    with hzo.record() as tape:
        loss = cross_entropy(model(x), y)
    tape.backward(loss)


def _by(name, model, x, y):
    return getattr(hzo.baselines, name)(model, cross_entropy, x, y)


ENTRIES = {
    "backward": lambda m, x, y: hzo.backward(m, cross_entropy, x, y),
    "backward by a plan": lambda m, x, y: hzo.backward(m, cross_entropy, x, y, tree="bisect"),
    "grad_and_value": lambda m, x, y: hzo.grad_and_value(m, cross_entropy, x, y),
    "cotangents": lambda m, x, y: hzo.cotangents(m, cross_entropy, x, y),
    "record": _recorded,
    "trace": lambda m, x, y: hzo.trace(m, x),
    "check_gradient": lambda m, x, y: hzo.check_gradient(m, cross_entropy, x, y),
    "compare_gradients": lambda m, x, y: hzo.compare_gradients(m, cross_entropy, x, y),
    **{name: partial(_by, name) for name in BASELINES.keys() - {"backprop"}},
}


def refused(rank, form):
    """By entry the error's message, for a model whose parameters are shares; and what backprop says."""
    found = {}
    for name, entry in ENTRIES.items():
        x, y = batch(0)
        try:
            entry(sharded(form), x, y)
        except DistributedError as error:
            found[name] = str(error)
    model = sharded(form)
    hzo.baselines.backprop(model, cross_entropy, *batch(0))
    return found, all(p.grad is not None for p in model.parameters())

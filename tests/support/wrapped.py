"""What ranks do in tests of wrapped models: one function each, returning numbers."""

import copy
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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

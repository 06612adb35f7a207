"""What ranks do in tests of meshes: gradients on (sample, query) meshes, and what becomes of failures."""

import os
import time

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

import hzo
from hzo.distributed import mesh as mesh_of_processes
from hzo.errors import HzoError
from hzo.rules import divided


def network(norm=False, dropout=0.0, box=False):
    torch.manual_seed(0)
    middle = hzo.blackbox(lambda z: z.cumsum(1).sin(), name="box") if box else nn.Tanh()
    layers = [nn.Linear(5, 6), *([nn.BatchNorm1d(6)] if norm else []), middle, nn.Dropout(dropout), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


class Called(nn.Module):
    """A box that is called with more than tensors: no operation of a plan."""

    def __init__(self, box):
        super().__init__()
        self.box = box

    def forward(self, z):
        return self.box(z, gain=1.0)


def part(z, gain=1.0):
    return gain * z.cumsum(1).sin()


def box_on_mesh(rank, shape):
    """For a box that is an operation of a network and one that is not: queries here, words and exchanges for it."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("sample", "query"))
    at, found, sent = mesh.get_local_rank("sample"), {}, []
    shares = mesh_of_processes.Shares
    sum_, joined = shares.sum_, shares.joined
    shares.sum_ = lambda here, tensor, where: (sent.append(tensor.numel()), sum_(here, tensor, where))[1]

    def noted(here, parts, count, where):
        result = joined(here, parts, count, where)
        sent.append(sum(t.numel() for t in result))
        return result

    shares.joined = noted
    for name, around in (("operation", nn.Identity), ("called", Called)):
        torch.manual_seed(0)
        box = hzo.blackbox(part, name="box")
        model = nn.Sequential(nn.Linear(5, 3), around() if around is nn.Identity else around(box)).double()
        if around is nn.Identity:
            model.append(box)
        x, y = batch(slice(6 * at, 6 * at + 6) if shape[0] > 1 else slice(None))
        for _ in range(2):  # the first time it is tested that samples are apart
            sent.clear()
            with hzo.count_queries() as counted:
                hzo.backward(model, cross_entropy, x, y, mesh=mesh)
        found[name] = counted.boxes.get("box", 0), sum(sent)  # of three directions one of four processes asks none
    shares.sum_, shares.joined = sum_, joined
    return found


def batch(rows):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    return x[rows], (torch.arange(12) % 3)[rows]


PLAN = {"tree": "bisect", "assume": "nothing"}
CASES = {  # options of the network, of the gradient, and how twelve samples are divided
    "by rules": ({}, {}, (6, 6)),
    "uneven": ({}, {}, (9, 3)),
    "a plan": ({}, PLAN, (6, 6)),
    "a plan, uneven": ({}, PLAN, (4, 8)),
    "a box": ({"box": True}, {}, (6, 6)),
    "dropout": ({"dropout": 0.4}, {}, (6, 6)),
    "BatchNorm": ({"norm": True}, {}, (6, 6)),
}


def one(name, rows=slice(None), at=1):
    """By one process: loss, gradients, buffers and queries."""
    build, options, _ = CASES[name]
    model = network(**build)
    torch.manual_seed(at)
    with hzo.count_queries() as count:
        loss = hzo.backward(model, cross_entropy, *batch(rows), **options)
    return float(loss), [p.grad for p in model.parameters()], [b.tolist() for b in model.buffers()], count.queries


def on_mesh(rank, shape):
    """By name of the case: loss, gradients, buffers and queries here, and which samples these were."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("sample", "query"))
    at = mesh.get_local_rank("sample")
    found = {}
    for name, (build, options, sizes) in CASES.items():
        first, count = (0, 12) if shape[0] == 1 else (sum(sizes[:at]), sizes[at])
        rows = slice(first, first + count)
        model = network(**build)
        torch.manual_seed(1 + at)  # the same for those who share samples
        with hzo.count_queries() as counted:
            loss = hzo.backward(model, cross_entropy, *batch(rows), mesh=mesh, **options)
        grads, _ = hzo.grad_and_value(
            network(**build) if name != "dropout" else model, cross_entropy, *batch(rows), mesh=mesh, **options
        )
        assert len(grads) == len([*model.parameters()])
        found[name] = (
            float(loss),
            [p.grad.tolist() for p in model.parameters()],
            [b.tolist() for b in model.buffers()],
            counted.queries,
            (first, first + count),
        )
    return found


class Weights(nn.Module):
    """One of each kind whose weights are read by large probes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 6, 3, groups=2, padding=1), nn.ConvTranspose2d(6, 4, 2)
        self.last = nn.Linear(36, 5)
        self.left, self.right = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(4, 5, 6))

    def forward(self, x):
        z = self.second(self.first(x).tanh()).tanh()
        z = (z.transpose(0, 1).flatten(2)[:, :, :5] @ self.right).transpose(0, 1).flatten(1)
        z = torch.cat([z, z.sin()], 1)[:, :36]
        return (self.left @ self.last(z).sin().T).T


def weights(rank, ways, dtype, keep=None):
    """Gradients over a query dimension of so many ways (None: by this process alone), and the queries asked here."""
    divided._WORTH = 0
    model = Weights().to(dtype)
    x = torch.randn(7, 2, 3, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    mesh = None if ways is None else init_device_mesh("cpu", (ways,), mesh_dim_names=("query",))
    torch.manual_seed(1)
    with hzo.count_queries() as count:
        for _ in range(1 if keep is None else 2):
            hzo.backward(model, lambda out: out.square().sum(1), x, mesh=mesh, keep=keep)
    return [p.grad.tolist() for p in model.parameters()], count.queries


def few_directions(rank, ways):
    """A plan whose nodes have fewer directions than there are ways: gradients, and the queries asked here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh()).double()
    mesh = None if ways is None else init_device_mesh("cpu", (ways,), mesh_dim_names=("query",))
    torch.manual_seed(1)
    with hzo.count_queries() as count:
        hzo.backward(model, lambda out: out.sum(1), torch.ones(3, 4).double(), mesh=mesh, tree="flat", assume="nothing")
    return [p.grad.tolist() for p in model.parameters()], count.queries


def planned(rank, shape, options):
    """What a plan says of each process of a mesh, and what this one did: queries, words, exchanges."""
    made, init = [], mesh_of_processes.Shares.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    mesh_of_processes.Shares.__init__ = noted
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("sample", "query"))
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), hzo.declare(nn.Linear(7, 4), "affine"), nn.Tanh(), nn.Linear(4, 3), nn.ReLU()]
    model = nn.Sequential(*layers).double()
    x, y = batch(slice(None))
    plan = hzo.plan(hzo.trace(model, x), mesh=mesh, **options)
    here = plan.mesh.here
    assert (here.along_sample, here.along_query) == shape
    at = mesh.get_local_rank("sample")
    rows = slice(12 * at // shape[0], 12 * (at + 1) // shape[0])
    torch.manual_seed(1)
    with hzo.count_queries() as count:
        hzo.backward(model, cross_entropy, x[rows], y[rows], plan=plan, mesh=mesh)
    said = here.queries, here.words, here.exchanges, here.forward_equivalents
    did = made[-1]
    forward_equivalents = count.forward_equivalents * (rows.stop - rows.start) / 12
    return said, (count.queries, did.words, did.exchanges, forward_equivalents)


DTYPES = torch.float64, torch.float32, torch.bfloat16


def all_weights(rank, ways):
    kept = weights(rank, ways, torch.float32, keep=True)
    return [*(weights(rank, ways, dtype) for dtype in DTYPES), kept, few_directions(rank, ways)]


class Temperature(nn.Module):
    """A loss with a parameter that is trained."""

    def __init__(self, at):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at, dtype=torch.float64))

    def forward(self, out, y):
        return cross_entropy(out / self.at, y)


def trained_loss(rank, shape, options):
    """Gradients of the model and of the loss's own parameter, of twelve samples over a mesh, unevenly."""
    mesh, model, loss_fn = (
        init_device_mesh("cpu", shape, mesh_dim_names=("sample", "query")),
        network(),
        Temperature(2.0),
    )
    at = mesh.get_local_rank("sample")
    rows = slice(None) if shape[0] == 1 else (slice(0, 9), slice(9, 12))[at]
    torch.manual_seed(1)
    hzo.backward(model, loss_fn, *batch(rows), mesh=mesh, **options)
    return [p.grad.tolist() for p in (*model.parameters(), loss_fn.at)]


def told(call):
    try:
        call()
    except (HzoError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failures(rank):
    """On a 2 x 2 mesh: by what goes wrong, what each rank is told, and whether its network is as before."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sample", "query"))
    sample = mesh.get_local_rank("sample")
    rows = slice(6 * sample, 6 * sample + 6)
    found = {}

    def attempt(what, change, options=PLAN, build=None, loss_fn=cross_entropy):
        model = network(**(build or {"norm": True})).eval()
        torch.manual_seed(1)
        x, y = batch(rows)
        given = {"model": model, "x": x, "y": y, "options": dict(options), "loss": loss_fn}
        change(given)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        message = told(
            lambda: hzo.backward(model, given["loss"], given["x"], given["y"], mesh=mesh, **given["options"])
        )
        kept = all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        found[what] = (message, kept and all(p.grad is None for p in model.parameters()))

    def on_rank(r, change):
        return lambda given: change(given) if rank == r else None

    def weights(given):
        given["model"][0].weight.data[0, 0] += 1e-9

    def nan(given):
        given["x"] = torch.full_like(given["x"], torch.nan)

    def raising(given):
        def loss(out, y):
            if rank == 2:
                raise ValueError("of rank 2 alone")
            return cross_entropy(out, y)

        given["loss"] = loss

    def box_raises(given):
        box = given["model"][1]

        def wrong(z):
            if len(z) > 6:
                raise ValueError("the chip is too hot")
            return z

        box.stages = hzo.blackbox(wrong, name="box").eval().stages

    def other_order(given):  # of the same numbers
        layer = given["model"][0]
        weight, bias = layer.weight, layer.bias
        del layer.weight, layer.bias
        layer.bias, layer.weight = bias, weight

    attempt("weights", on_rank(3, weights))
    attempt("plan", on_rank(1, lambda given: given["options"].update(tree="flat")))
    attempt("batch", on_rank(2, lambda given: given.update(x=given["x"] + 1e-12)))
    attempt("random state", on_rank(1, lambda given: torch.manual_seed(7)))
    attempt("NaN", nan if sample == 0 else lambda given: None)
    attempt("loss", raising)
    attempt("no samples", on_rank(1, lambda given: given.update(x=given["x"][:0], y=given["y"][:0])))
    attempt("a part", on_rank(3, box_raises), options={}, build={"box": True})
    odd = {
        "order": on_rank(2, other_order),
        "frozen": on_rank(2, lambda given: given["model"][0].bias.requires_grad_(False)),
        "another model": on_rank(1, lambda given: given["model"].__setitem__(2, nn.Sigmoid().eval())),
        "another loss": on_rank(1, lambda given: given.update(loss=lambda out, y: 2 * cross_entropy(out, y))),
        "scale": on_rank(1, lambda given: given["options"].update(scale=2.0)),
        "buffers": on_rank(1, lambda given: given["model"][1].running_mean.add_(1)),
        "loss weights": lambda given: given.update(loss=Temperature(1.0 + (rank == 3))),
        "input": on_rank(2, lambda given: given["x"].requires_grad_()),
        "nothing": lambda given: None,
    }
    for what, change in odd.items():
        attempt(what, change)
    return found


def lost(rank, how):
    """One rank ends, or hangs, in the middle of a gradient; the others are told within the group's time limit."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sample", "query"))
    model = network(box=True)

    def part(z):
        if rank == 3 and len(z) > 6:
            if how == "killed":
                os.kill(os.getpid(), 9)
            time.sleep(12)
        return z.cumsum(1).sin()

    model[1] = hzo.blackbox(part)
    torch.manual_seed(1)
    rows = slice(6 * (rank // 2), 6 * (rank // 2) + 6)
    message = told(lambda: hzo.backward(model, cross_entropy, *batch(rows), mesh=mesh, timeout=5.0))
    return message, all(p.grad is None for p in model.parameters())

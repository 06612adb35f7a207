"""What ranks do in tests of meshes: gradients on (sample, query) meshes, and what becomes of failures."""

import os
import time

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

import hzo
from hzo.errors import HzoError


def network(norm=False, dropout=0.0, box=False):
    torch.manual_seed(0)
    middle = hzo.blackbox(lambda z: z.cumsum(1).sin(), name="box") if box else nn.Tanh()
    layers = [nn.Linear(5, 6), *([nn.BatchNorm1d(6)] if norm else []), middle, nn.Dropout(dropout), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


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
            raise ValueError("of rank 2 alone")

        given["loss"] = loss

    def box_raises(given):
        box = given["model"][1]

        def wrong(z):
            if len(z) > 6:
                raise ValueError("the chip is too hot")
            return z

        box.stages = hzo.blackbox(wrong, name="box").eval().stages

    attempt("weights", on_rank(3, weights))
    attempt("plan", on_rank(1, lambda given: given["options"].update(tree="flat")))
    attempt("batch", on_rank(2, lambda given: given.update(x=given["x"] + 1e-12)))
    attempt("random state", on_rank(1, lambda given: torch.manual_seed(7)))
    attempt("NaN", nan if sample == 0 else lambda given: None)
    attempt("loss", on_rank(2, raising))
    attempt("no samples", on_rank(1, lambda given: given.update(x=given["x"][:0], y=given["y"][:0])))
    attempt("a part", on_rank(3, box_raises), options={}, build={"box": True})
    attempt("nothing", lambda given: None)
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

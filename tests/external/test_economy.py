"""As few evaluations as the structure of a part allows, said before they are asked."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import hzo
from hzo.errors import InputError
from hzo.external.guard import Guarded
from support.boxes import TOLERANCE
from support.oracles import normal

torch.manual_seed(0)
W, S, K = torch.randn(32, 32).double(), torch.randn(32, 32).double(), torch.randn(2, 2, 3, 3).double()
S = S + S.T
B, N = 6, 32


def banded(z):
    return torch.nn.functional.pad(z, (1, 1))[:, :-2] * 2 + z


def conv(z):
    return torch.nn.functional.conv2d(z, K, padding=1)


SPACE = (hzo.Local(2, -1, 1), hzo.Local(3, -1, 1))
CASES = {
    "nothing": (lambda z: torch.tanh(z @ W), (N,), {}, 2 * N * B),
    "nothing, forward": (lambda z: torch.tanh(z @ W), (N,), {"scheme": "forward"}, N * B),
    "nothing to infer": (lambda z: torch.tanh(z @ W), (N,), {"promises": "inferred"}, 2 * N * B),
    "elementwise": (torch.tanh, (N,), {"elementwise": True}, 2 * B),
    "elementwise, inferred": (torch.tanh, (N,), {"promises": "inferred"}, 2 * B),
    "affine": (lambda z: z @ W + 1, (N,), {"promises": "affine"}, N),
    "affine, inferred": (lambda z: z @ W + 1, (N,), {"promises": "inferred"}, N),
    "affine and elementwise": (lambda z: 3 * z + 1, (N,), {"elementwise": True, "promises": "affine"}, 1),
    "reindexing": (lambda z: z.flip(1), (N,), {"promises": "reindexing"}, 1),
    "local": (lambda z: banded(z).tanh(), (N,), {"promises": hzo.Local(1, -1, 0)}, 2 * 2 * B),
    "local and affine": (banded, (N,), {"promises": ("affine", hzo.Local(1, -1, 0))}, 2),
    "tokens": (lambda z: torch.tanh(z @ W[:8, :5]), (6, 8), {"promises": "tokens"}, 2 * 8 * B),
    "tokens, inferred": (lambda z: torch.tanh(z @ W[:8, :5]), (6, 8), {"promises": "inferred"}, 2 * 8 * B),
    "convolution": (conv, (2, 8, 8), {"promises": ("affine", "stationary", *SPACE)}, 2 * 9),
    "convolution, inferred": (conv, (2, 8, 8), {"promises": "inferred"}, 2 * 9),
    "behind a convolution": (lambda z: conv(z).tanh(), (2, 8, 8), {"promises": SPACE}, 2 * 2 * 9 * B),
}
AT_MOST = {
    "symmetric": (lambda z: torch.tanh(z @ S) @ torch.eye(N).double() * 0 + z @ S, (N,), {"promises": "symmetric"}),
    "symmetric, inferred": (nn.Softmax(-1), (N,), {"promises": "inferred"}),
    "a gradient": (lambda z: (z @ S).cosh().log() @ torch.eye(N).double() * 0 + z @ S, (N,), {"promises": "symmetric"}),
}


def compare(f, shape, options):
    x = normal(B, *shape)
    box = hzo.blackbox(f, **options)
    a = x.clone().requires_grad_()
    box(a).square().sum().backward()
    a.grad = None
    with hzo.count_queries() as count:
        box(a).square().sum().backward()
    (exact,) = torch.autograd.grad(f(a).square().sum(), a)
    assert float((a.grad - exact).norm()) <= TOLERANCE * float(exact.norm())
    return count, box.plan_for(x)


@pytest.mark.parametrize("name", CASES)
def test_queries(name):
    f, shape, options, queries = CASES[name]
    count, plan = compare(f, shape, options)
    assert count.queries == queries == plan.queries
    assert queries <= plan.coordinate_queries
    assert plan.seconds > 0


@pytest.mark.parametrize("name", AT_MOST)
def test_a_symmetric_jacobian_is_its_own_transpose(name):
    count, plan = compare(*AT_MOST[name])
    assert count.queries <= plan.queries == 2 * 2 * B


@pytest.mark.parametrize(("options", "calls"), [({}, 3), ({"batched": False}, 65), ({"batched": 4}, 98)])
def test_calls_are_as_planned(options, calls):
    seen = []

    def part(z):
        seen.append(len(z))
        return torch.tanh(z @ W)

    box, x = hzo.blackbox(part, **options), normal(B, N).requires_grad_()
    y = box(x)
    seen.clear()
    y.sum().backward()
    assert len(seen) == calls == box.plan_for(x).calls


def test_a_plan_leaves_no_trace():
    class Env:
        def __init__(self):
            self.q = np.zeros((3, 2))

        def step(self, a):
            self.q = self.q + a
            return self.q

    env = Env()
    box = hzo.blackbox(env.step, numpy=True)
    text = str(box.plan_for(normal(3, 2)))
    assert "step: 12 queries in 5 calls" in text
    assert "element by element" in text
    assert not env.q.any()


class TestMesh:
    def test_queries_of_each_are_those_that_were_counted(self):
        """``benchmarks/mesh.py`` counted them in the processes themselves."""
        record = json.loads((Path(__file__).parents[2] / "results/benchmarks/mesh.json").read_text())["rows"]
        plan = hzo.blackbox(lambda z: z.sin() * z.sum(1, keepdim=True)).plan_for(normal(8, 32))
        assert len(record) == 10
        for row in record:
            assert plan.on_mesh(row["sample"], row["query"]).queries == row["queries"]

    def test_along_which_dimension(self):
        """``sample`` where it divides as well: less is sent; what neither divides evenly is asked by some."""
        plan = hzo.blackbox(lambda z: z.sin() * z.sum(1, keepdim=True)).plan_for(normal(3, 5))
        text = str(plan.on_mesh(1, 4))
        assert text.startswith(
            "sample × query 1 × 4: 12 queries of each process, 3 samples, 15 words in 2 exchanges, about "
        )
        assert text.endswith(" s; better 2 × 2")
        share = plan.on_mesh(2, 2)
        assert (share.queries, share.samples, share.best) == (12, 2, (2, 2))
        assert plan.on_mesh(1, 8).queries == 6, "of fewer directions than processes some ask one"
        assert plan.on_mesh(1, 8).best == (1, 8)
        assert "better" not in str(share)
        affine = hzo.blackbox(lambda z: z @ W, promises="affine").plan_for(normal(4, 32))
        assert affine.on_mesh(4, 1).queries == affine.queries, "one sample's answer is all samples'"
        elementwise = hzo.blackbox(torch.sin, promises="elementwise").plan_for(normal(4, 5))
        assert elementwise.on_mesh(1, 4).queries == elementwise.queries
        assert elementwise.on_mesh(1, 4).best == (4, 1)

    def test_words(self):
        """Cotangents where the box is an operation of a network, outputs where it is called with more than tensors."""
        box = hzo.blackbox(lambda z, gain=1.0: gain * z[:, :2].sin() * z.sum(1, keepdim=True))
        plan = box.plan_for(normal(4, 6))
        assert [(plan.on_mesh(1, 3).words, plan.on_mesh(2, 3).words, plan.on_mesh(4, 1).words)] == [(24, 12, 0)]
        assert [plan.on_mesh(*shape).exchanges for shape in ((1, 1), (1, 3), (2, 2))] == [0, 2, 2]
        called = box.plan_for(normal(4, 6), gain=2.0)
        assert [called.on_mesh(1, 3).words, called.on_mesh(2, 3).words] == [2 * 6 * 4 * 2, 2 * 6 * 2 * 2]
        assert called.on_mesh(1, 8).queries == called.queries, "fewer directions than processes are not divided"
        layer = hzo.blackbox(nn.Linear(6, 2).double()).plan_for(normal(4, 6))
        assert layer.on_mesh(2, 1).words == 14, "gradients of its own parameters"
        assert layer.on_mesh(1, 2).words == 24 + 14

    def test_seconds(self):
        """From the time of one call, with what a link takes; which then decides."""
        plan = hzo.blackbox(lambda z: z.sin() * z.sum(1, keepdim=True)).plan_for(normal(4, 6))
        plan = replace(plan, seconds_of_sample=0.1)
        assert plan.on_mesh(1, 1).seconds == pytest.approx(0.1 * (48 + 4))
        assert plan.on_mesh(2, 2).seconds == pytest.approx(0.1 * (12 + 2))
        assert plan.on_mesh(2, 2, link=(0.5, 10.0)).seconds == pytest.approx(0.1 * (12 + 2) + 2 * 0.5 + 12 / 10)
        assert plan.on_mesh(3, 1).best == (1, 3), "two samples of each ask more than a third of the directions"
        assert plan.on_mesh(3, 1, link=(9.0, 10.0)).best == (3, 1)

    def test_a_list_of_parts(self):
        """What ``hzo.plan(mesh=)`` says of it."""
        parts = [lambda z: z[:, :2].sin() * z.sum(1, keepdim=True), lambda z: z.cumsum(1)]
        plan = hzo.blackbox(parts).plan_for(normal(4, 6))
        share = plan.on_mesh(2, 2)
        assert share.here.queries == plan.queries // 4
        assert (share.here.batch, share.best.along_sample) == (2, 4)
        assert 0 < share.here.words < share.here.words + share.here.exchanges
        with pytest.raises(InputError, match="at most as many processes along sample as there are samples, 4, got 5"):
            plan.on_mesh(5, 1)

    def test_numbers_that_are_none(self):
        plan = hzo.blackbox(torch.sin).plan_for(normal(3, 2))
        with pytest.raises(InputError, match="at most as many processes along sample as there are samples, 3, got 4"):
            plan.on_mesh(4, 1)
        with pytest.raises(InputError, match="query"):
            plan.on_mesh(1, 0)


def test_shared_tensors_and_parameters_are_in_the_plan():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4).double())

        def forward(self, x, t):
            return (x * self.w + t).sin()

    plan = hzo.blackbox(Part()).plan_for(normal(5, 4), torch.ones(()).double())
    assert [site.queries for site in plan.sites] == [2 * 4 * 5, 2 * 5, 2 * 4 * 5]
    assert [site.name for site in plan.sites] == ["input x", "input t", "parameter 0.f.w"]


def test_a_broken_symmetry_is_not_inferred():
    found = hzo.infer_structure(nn.Sequential(nn.Linear(5, 5)).double(), normal(3, 5))
    assert "symmetric" not in found.promises
    assert not dict(found.tested)["symmetric"].holds


def narrow(z):
    return torch.tanh(z @ W[:, :4])


def wide(z):
    return torch.tanh(z @ W[:4])


def affine(z):
    return z @ W + 1


def elementwise(z):
    return torch.tanh(2 * z)


def coordinate(*sizes):
    """Directions of differences over parts, each from its own inputs."""
    return sum(2 * B * n for n in sizes)


CHAINS = {
    # Parts, inputs, and the queries of the cheapest tree.
    "a narrow boundary is worth a stop": ([narrow, wide], N, {}, coordinate(N, 4)),
    "a wide one is not": ([wide, lambda z: torch.tanh(z @ W[:, :3])], 4, {}, coordinate(4)),
    "one part": ([narrow], N, {}, coordinate(N)),
    "forward": ([narrow, wide], N, {"scheme": "forward"}, coordinate(N, 4) // 2),
    "nothing to infer": ([narrow, wide], N, {"promises": "inferred"}, coordinate(N, 4)),
    "elementwise, inferred": ([elementwise, elementwise], N, {"promises": "inferred"}, 2 * B),
    "elementwise before a part, inferred": ([narrow, elementwise], N, {"promises": "inferred"}, coordinate(N) + 2 * B),
    "affine and elementwise, inferred": ([affine, elementwise], N, {"promises": "inferred"}, N + 1 + 2 * B),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name):
    parts, n, options, queries = CHAINS[name]
    box, x = hzo.blackbox(parts, **options), normal(B, n).requires_grad_()
    plan = box.plan_for(x)
    box(x).square().sum().backward()
    x.grad = None
    with hzo.count_queries() as count:
        y = box(x)
        y.square().sum().backward()
    (exact,) = torch.autograd.grad(nn.Sequential(*map(Whole, parts))(x).square().sum(), x)
    assert float((x.grad - exact).norm()) <= TOLERANCE * float(exact.norm())
    assert count.queries == plan.queries == queries
    assert plan.forward_equivalents == pytest.approx(count.forward_equivalents)
    assert plan.forward_equivalents <= plan.coordinate_equivalents == (1 if "scheme" in options else 2) * n
    assert plan.seconds > 0
    assert f"element by element {plan.coordinate_equivalents:.0f} passes" in str(plan)


class Whole(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


def test_a_plan_of_a_chain_leaves_no_trace():
    class Neuron:
        def __init__(self):
            self.calls = 0.0

        def __call__(self, z):
            self.calls = self.calls + 1.0
            return self.calls * z

    part = Neuron()
    hzo.blackbox([part, torch.tanh], promises="inferred").plan_for(normal(3, 2))
    assert part.calls == 0.0


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4).double())

    def forward(self, x):
        return (x * self.w).sin(), (x * self.w).sum()


class Counter:
    """A state beside a result for each sample."""

    def __init__(self):
        self.s = torch.zeros(3, 4).double()

    def __call__(self, x):
        self.s = 0.5 * self.s + x
        return self.s.sin()


X, T, C = normal(3, 4), normal(4), torch.complex(normal(3, 4), normal(3, 4))
# A part (or what makes one), its options and its arguments.
SIGNATURES = {
    "one for each sample": (torch.sin, {}, (X,)),
    "and one for all": (lambda x: (x.sin(), x.sum()), {}, (X,)),
    "and one for all that does not depend on it": (lambda x: (x.sin(), torch.ones(()).double()), {}, (X,)),
    "only one for all": (lambda x: x.sin().sum(), {}, (X,)),
    "one for all, elementwise beside it": (lambda x: x.sin() + 0 * x, {"elementwise": True}, (X,)),
    "and a whole number": (lambda x: (x.sin(), (x > 0).long()), {}, (X,)),
    "and an index": (lambda x: (x.sin(), x.argmax()), {"integers": "kept"}, (X,)),
    "an index for each sample": (lambda x: (x.sin(), x.argmax(1)), {"integers": "kept"}, (X,)),
    "a shared tensor": (lambda x, t: (x * t).sin(), {}, (X, T)),
    "a shared tensor, and one for all": (lambda x, t: ((x * t).sin(), t.square().sum()), {}, (X, T)),
    "a dict of both": (lambda x: {"y": x.sin(), "norm": x.norm()}, {}, (X,)),
    "no batch": (lambda t: t.sin().sum(), {"batch_dim": None}, (T,)),
    "complex": (lambda z: z * z, {}, (C,)),
    "complex, and one for all": (lambda z: (z * z, z.abs().square().sum()), {}, (C,)),
    "parameters": (Scaled, {}, (X,)),
    "forward": (lambda x: (x.sin(), x.sum()), {"scheme": "forward"}, (X,)),
    "smoothed": (lambda x: (x.sin(), x.sum()), {"mu": 0.1, "draws": 3}, (X,)),
    "one batch at a time": (lambda x: (x.sin(), x.sum()), {"batched": False}, (X,)),
    "two samples at a time": (torch.sin, {"batched": 2}, (X,)),
    "local, and one for all": (lambda x: (x.sin(), x.sum()), {"promises": hzo.Local(1, 0, 0)}, (X,)),
    "a state": (Counter, {}, (X,)),
    "bounds": (lambda x: (x.sin(), x.sum()), {"bounds": (-5, 5)}, (X,)),
    "kept": (lambda x: (x.sin(), x.sum()), {"on_failure": "zero"}, (X,)),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_plans_count_what_is_asked(name, monkeypatch):
    part, options, given = SIGNATURES[name]
    box, calls, ask = hzo.blackbox(part() if isinstance(part, type) else part, **options), [], Guarded._one

    def counted(self, *arguments):
        calls.append(self)
        return ask(self, *arguments)

    monkeypatch.setattr(Guarded, "_one", counted)

    def step():
        out = box(*(t.clone().requires_grad_() for t in given))
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
        box.detach_state()
        calls.clear()
        with hzo.count_queries() as count:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        return count.queries, len(calls)

    step()
    plan = box.plan_for(*given)
    assert step() == (plan.queries, plan.calls)


def pooled(z):
    return torch.nn.functional.avg_pool2d(z, 2).tanh()


def wide_band(z):
    return sum((k + 1) * torch.nn.functional.pad(z, (3, 3))[:, k : k + z.shape[1]] for k in range(7)).tanh()


# A part that is local, what is promised of it, and the shape of a sample.
COLORED = {
    "banded": (wide_band, hzo.Local(1, -3, 3), (N,)),
    "banded, below the diagonal": (lambda z: banded(z).tanh(), hzo.Local(1, -1, 0), (N,)),
    "shorter than its band": (wide_band, hzo.Local(1, -3, 3), (5,)),
    "a stencil in space": (lambda z: conv(z).tanh(), SPACE, (2, 8, 8)),
    "pooling": (pooled, (hzo.Local(1), hzo.Local(2, 0, 1, 2), hzo.Local(3, 0, 1, 2)), (2, 8, 8)),
}


@pytest.mark.parametrize("name", COLORED)
def test_no_direct_method_has_fewer_directions(name):
    """Elements on which one output depends are told apart by as many directions (Curtis, Powell and Reid, 1974)."""
    f, promised, shape = COLORED[name]
    count, plan = compare(f, shape, {"promises": promised})
    x = normal(1, *shape)
    jacobian = torch.autograd.functional.jacobian(f, x).reshape(-1, x.numel())
    assert plan.sites[0].directions == int((jacobian != 0).sum(1).max())
    assert count.queries == plan.queries == 2 * B * plan.sites[0].directions <= plan.coordinate_queries

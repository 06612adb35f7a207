"""``trace``: what it understands, what it refuses and how it says so, and what it must not take for granted."""

import math

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Problem
from oracles import solve
from torch import nn

import hzo
from hzo.errors import CoupledSamplesError, InputError, NondeterministicError, TraceError


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Calls(nn.Module):
    """A layer, and a function of it and its input."""

    def __init__(self, function, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width).double()
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def assert_right(model, x, loss_fn=None, y=None, tolerance=oracles.CENTRAL, **options):
    """Gradients as by autograd, without assumptions and with all."""
    problem = Problem(model, loss_fn or (lambda out: out.square().flatten(1).sum(1)), x, y)
    for assume in ("nothing", "structure"):
        torch.manual_seed(oracles.SEED)
        found, _ = hzo.grad_and_value(*problem, assume=assume, **options)
        torch.manual_seed(oracles.SEED)
        exact, _ = oracles.gradients(problem)
        assert oracles.worst(oracles.relative_errors(found, exact)) <= tolerance


UNDERSTOOD = {
    "unbind": lambda h: sum(part * k for k, part in enumerate(h.unbind(1))).unsqueeze(1),
    "iteration": lambda h: torch.stack([a.sin() for a in h.T]).T,
    "einsum": lambda h: torch.einsum("bi,bj->bij", h, h.tanh()).flatten(1),
    "time first": lambda h: torch.tanh(h.view(-1, 2, 2).transpose(0, 1)).transpose(0, 1).flatten(1),
    "folded batch": lambda h: F.softmax(h.view(h.shape[0] * 2, 2), -1).view(h.shape[0], 4),
    "sizes": lambda h: h.new_ones(h.shape[0], 1) * h + torch.zeros_like(h) + torch.zeros(len(h), 1),
    "split": lambda h: torch.cat([a * b for a, b in [h.split([1, 3], 1)] for a in (a,)], 1),
    "written slice": lambda h: torch.zeros_like(h).index_copy_(1, torch.tensor([0, 2]), h[:, :2].sin()),
    "gather": lambda h: h.gather(1, torch.tensor([[0, 2]]).expand(h.shape[0], 2)),
    "sorted": lambda h: h.sort(1).values.tanh(),
    "where": lambda h: torch.where(h > 0, h.sin(), h * 2),
    "masked": lambda h: h.masked_fill(torch.tensor([True, False, False, False]), -math.inf).softmax(-1),
    "out argument": lambda h: torch.mul(h, 2.0).add_(h),
    "empty": lambda h: torch.cat([h, h[:, :0]], 1),
    "cumulative": lambda h: h.cumsum(1).tanh(),
    "complex": lambda h: torch.fft.rfft(h).abs(),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understands(name):
    assert_right(nn.Sequential(nn.Linear(4, 4).double(), nn.Tanh(), Calls(UNDERSTOOD[name])), normal(3, 4))


REFUSED = {
    "a number": (lambda h: h * h.sum().item(), TraceError, "reads values out of a tensor|mixed|grow in proportion"),
    "a branch": (lambda h: h * 2 if h[0, 0] > 0 else h, TraceError, "reads values out of a tensor"),
    "numpy": (lambda h: torch.as_tensor(np.tanh(h.numpy())), TraceError, "reads values out of a tensor"),
    "nonzero": (lambda h: h[h.nonzero()[:, 0]], TraceError, "reads values out of a tensor"),
    "boolean mask": (lambda h: h[h > 0], TraceError, "expected one dimension to grow in proportion"),
    "masked_select": (lambda h: h.masked_select(h > 0), TraceError, "reads values out of a tensor"),
    "detach": (lambda h: h * h.detach(), TraceError, "finite differences see through it"),
    "data": (lambda h: h * h.data, TraceError, "finite differences see through it"),
    "assigned data": (lambda h: setattr(h, "data", h * 2) or h, TraceError, "use an out-of-place call"),
    "a mean over the batch": (lambda h: h - h.mean(0), TraceError, "samples are mixed"),
    "a product of samples": (lambda h: h @ h.T, TraceError, "expected one dimension to grow in proportion"),
    "one sample more": (lambda h: h[: h.shape[0] - 1], TraceError, "not a multiple of the batch size"),
    "a part of the batch": (lambda h: h[:2], TraceError, "expected one dimension to grow in proportion"),
    "a branch on the batch": (lambda h: h.sin() if len(h) == 3 else h.cos(), TraceError, "does different things"),
    "a view written to": (lambda h: (h[:, 0].mul_(2), h)[1], TraceError, "shares memory with another"),
    "a mean of the loss": (lambda h: h.mean(), TraceError, "samples are mixed"),
    "no output": (lambda h: None, TraceError, "output is not computed from its input"),
    "a constant": (lambda h: torch.ones(3), TraceError, "output is not computed from its input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    function, error, message = REFUSED[name]
    model = Calls(function)
    call, before = nn.Module.__call__, torch.get_rng_state()
    with pytest.raises(error, match=message):
        hzo.trace(model, normal(3, 4))
    assert nn.Module.__call__ is call
    assert torch.equal(torch.get_rng_state(), before)


COUPLED = {
    "centred": lambda h: h - h.mean(0, keepdim=True).expand(h.shape[0], -1),
    "cumulative": lambda h: h.cumsum(0),
    "rolled": lambda h: h.roll(1, 0),
    "flipped": lambda h: h.flip(0),
    "batch softmax": lambda h: h.softmax(0),
    "divided by the size": lambda h: h / h.shape[0],
    "time first, folded": lambda h: h.view(-1, 2, 2).transpose(0, 1).reshape(2 * h.shape[0], 2).view(-1, 4),
    "indexed by position": lambda h: h[torch.arange(h.shape[0])],
    "batch norm": nn.BatchNorm1d(4).double(),
    "batch norm and dropout": nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.1)).double(),
}


@pytest.mark.parametrize("x", ["normal", "zeros", "ones", "one sample"])
@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_influence_each_other(name, x):
    """Refused, and seen for what it is whatever the input was traced with."""
    x = {"normal": normal(4, 4), "zeros": normal(4, 4) * 0, "ones": normal(4, 4) * 0 + 1, "one sample": normal(1, 4)}[x]
    if x.shape[0] == 1 and "batch norm" in name:
        pytest.skip("BatchNorm refuses one sample by itself")
    with pytest.raises((CoupledSamplesError, TraceError), match="influence each other|grow in proportion"):
        hzo.plan(hzo.trace(Calls(COUPLED[name]), x), tree="bisect", assume="nothing")


def test_opaque_random_stage_that_couples_is_seen():
    """Its queries run copy by copy, so that no larger batch would show it."""

    class Odd(nn.Module):
        hzo_opaque = True

        def forward(self, x):
            return F.dropout(x, 0.5) - x.mean(0, keepdim=True)

    chain = hzo.trace(nn.Sequential(nn.Linear(3, 3), Odd()), torch.randn(4, 3))
    with pytest.raises(CoupledSamplesError, match="influence each other"):
        hzo.plan(chain, assume="nothing")


def test_a_stage_that_does_not_repeat():
    generator = torch.Generator().manual_seed(0)
    noisy = Calls(lambda h: h + 1e-3 * torch.randn(h.shape, generator=generator, dtype=h.dtype))
    chain = hzo.trace(nn.Sequential(nn.Linear(4, 4).double(), noisy), normal(3, 4))
    with pytest.raises(NondeterministicError, match=r"gave two results for the same input.*noise="):
        hzo.plan(chain)
    assert hzo.plan(chain, noise=1e-3).noise == 1e-3


def test_numpy_noise_is_seen():
    generator = np.random.default_rng(0)
    stage = lambda h: torch.as_tensor(h.numpy() + generator.normal(size=h.shape))  # noqa: E731
    chain = hzo.trace(hzo.Chain([nn.Linear(4, 4).double(), stage]), normal(3, 4))
    with pytest.raises(NondeterministicError, match="gave two results"):
        hzo.plan(chain)


class TestOpaqueStages:
    """Stages that look at values: one operation each, whose parameters are perturbed."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(normal(3) * 0.5)

        def forward(self, x):
            # A choice for every sample by itself, made in Python.
            rows = [row * self.weight if float(row[0]) > 0 else torch.sin(row + self.weight) for row in x]
            return torch.stack(rows)

    def test_parameters_are_perturbed(self):
        model = nn.Sequential(nn.Linear(3, 3), self.Branching(), nn.Linear(3, 2)).double()
        assert_right(model, normal(4, 3))

    def test_numpy_between_layers(self):
        first, last = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
        chain = hzo.Chain([first, lambda h: torch.as_tensor(np.sinh(h.numpy())), last])
        x = normal(4, 3)
        found, _ = hzo.grad_and_value(chain, lambda out: out.square().sum(1), x)
        same = Problem(nn.Sequential(first, Calls(torch.sinh, 3), last), lambda out: out.square().sum(1), x, None)
        with torch.no_grad():
            same.model[1].layer.weight.copy_(torch.eye(3))
            same.model[1].layer.bias.zero_()
        exact, _ = oracles.gradients(same, dict(zip(found, [p for p in chain.parameters()], strict=False)))
        assert oracles.worst(oracles.relative_errors(found, exact)) <= oracles.CENTRAL

    def test_input_written_to_by_numpy(self):
        """NumPy writes where no version counter looks."""

        def doubled(h):
            a = h.numpy()
            a *= 2
            return torch.as_tensor(a)

        x = normal(4, 3)
        layers = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
        found, _ = hzo.grad_and_value(hzo.Chain([layers[0], doubled, layers[1]]), lambda out: out.square().sum(1), x)
        copy = x.clone()
        hzo.grad_and_value(hzo.Chain([doubled, *layers]), lambda out: out.square().sum(1), x)
        assert torch.equal(x, copy)
        (layers[1](2 * layers[0](x))).square().sum(1).mean().backward()
        assert oracles.relative_errors(found, {n: p.grad for n, p in zip(found, [], strict=False)} or found)
        assert torch.allclose(found["0.weight"], layers[0].weight.grad, rtol=1e-6)

    def test_memory_used_again_is_refused(self):
        """A result that the next call overwrites would make every difference zero."""
        buffer = np.empty((64, 3))

        def simulate(h):
            np.sin(h.numpy(), out=buffer[: len(h)])
            return torch.as_tensor(buffer[: len(h)])

        with pytest.raises(TraceError, match="same memory"):
            hzo.trace(hzo.Chain([nn.Linear(3, 3).double(), simulate]), normal(4, 3))

    def test_hidden_trainable_layer_is_refused(self):
        hidden = nn.Linear(3, 3).double()
        chain = hzo.Chain([nn.Linear(3, 3).double(), lambda h: torch.as_tensor(np.sin(hidden(h).detach().numpy()))])
        with pytest.raises(TraceError, match="trainable tensor.*gradient would be lost"):
            hzo.trace(chain, normal(4, 3))
        hidden.requires_grad_(False)
        hzo.trace(chain, normal(4, 3))


def test_trainable_tensors_that_no_module_holds():
    loose = normal(4).requires_grad_()
    for tensor in (loose, loose * 2):  # a leaf, and one made of it under autograd
        with pytest.raises(TraceError, match=r"trainable tensor of shape \(4,\) that no module holds"):
            hzo.trace(Calls(lambda h, t=tensor: h + t), normal(3, 4))


def test_a_parameter_written_to_is_refused():
    """max_norm rewrites the weight in the forward pass: tracing and queries would move it."""
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Flatten(), nn.Linear(6, 2))
    before = model[0].weight.clone()
    with pytest.raises(TraceError, match="changes its parameter 'weight' in its forward pass"):
        hzo.trace(model, torch.randint(5, (3, 2)))
    assert torch.equal(model[0].weight, before)


def test_a_buffer_replaced_is_refused():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4).double())

        def forward(self, x):
            self.mean = self.mean * 0.9 + 0.1
            return x + self.mean

    model = nn.Sequential(nn.Linear(4, 4).double(), Running())
    with pytest.raises(TraceError, match="assigns|buffer|not seen"):
        hzo.trace(model, normal(3, 4))
    assert float(model[1].mean.sum()) == 0


def test_error_names_the_stage():
    model = nn.Sequential(nn.Linear(4, 4).double(), Calls(lambda h: h.detach()))
    with pytest.raises(TraceError, match=r"^1:Calls: the forward pass calls detach"):
        hzo.trace(model, normal(3, 4))


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

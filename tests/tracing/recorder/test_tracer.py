"""``trace``: what it refuses, how it says so, and what it must not take for granted."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import CoupledSamplesError, NondeterministicError, PlanError, TraceError
from hzo.tape.marks import Marks
from support import oracles
from support.networks import Calls
from support.oracles import normal

LOOSE = normal(4).requires_grad_()
UNDERSTOOD = {
    "a number": lambda h: h * h.sum().item(),
    "a branch": lambda h: h * 2 if h[0, 0] > 0 else h,
    "nonzero": lambda h: h[h.nonzero()[:, 0]],
    "boolean mask": lambda h: torch.cat([h[h > 0].sum().expand(h.shape[0], 1), h], 1),
    "masked_select": lambda h: h + h.masked_select(h > 0).sum(),
    "detach": lambda h: h * h.detach(),
    "data": lambda h: h * h.data,
    "a mean over the batch": lambda h: h - h.mean(0),
    "a product of samples": lambda h: h @ h.T,
    "one sample more": lambda h: h[: h.shape[0] - 1],
    "a part of the batch": lambda h: h[:2],
    "a branch on the batch": lambda h: h.sin() if len(h) == 3 else h.cos(),
    "a view written to": lambda h: (h[:, 0].mul_(2), h)[1],
    "a mean of the loss": lambda h: h.mean().reshape(1, 1),
    "a parameter that no module holds": lambda h: h + LOOSE,
}


@pytest.mark.parametrize("assume", ["nothing", "locality", "structure"])
@pytest.mark.parametrize("batch", [3, 9])
@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_autograd_sees_is_what_is_planned(name, batch, assume):
    """Values that a forward pass reads are constants, as for autograd; samples that influence each other are refused
    where they would be perturbed."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Calls(UNDERSTOOD[name])).double(), normal(batch, 4)
    before = torch.get_rng_state()
    expected = torch.autograd.grad(oracles.distance(model(x)).mean(), list(model.parameters()))
    chain = hzo.trace(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    try:
        tree = "planned" if assume == "structure" else "bisect"
        found, _ = hzo.grad_and_value(chain, oracles.distance, x, tree=tree, assume=assume)
    except (CoupledSamplesError, PlanError) as error:
        assert assume != "structure", error  # noqa: PT017
        return
    for (parameter, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-6, atol=1e-9)


REFUSED = {
    "numpy": (lambda h: torch.as_tensor(np.tanh(h.numpy())), "reads values out of a tensor"),
    "no output": (lambda h: None, "no tensor was found in what the model returned, a NoneType"),
    "complex numbers": (lambda h: torch.fft.rfft(h).abs(), "complex tensor, which has no cotangent"),
    "a constant": (lambda h: torch.ones(3), "output is not computed from its input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    function, message = REFUSED[name]
    model, x = Calls(function), normal(3, 4)
    call, before = nn.Module.__call__, torch.get_rng_state()
    with pytest.raises(TraceError, match=message):
        hzo.trace(model, x)
    assert nn.Module.__call__ is call
    assert torch.equal(torch.get_rng_state(), before)


COUPLED = {
    "centred": lambda h: h - h.mean(0, keepdim=True).expand(h.shape[0], -1),
    "cumulative": lambda h: h.cumsum(0),
    "rolled": lambda h: h.roll(1, 0),
    "flipped": lambda h: h.flip(0),
    "batch softmax": lambda h: h.softmax(0),
    "time first, folded": lambda h: h.view(-1, 2, 2).transpose(0, 1).reshape(2 * h.shape[0], 2).view(-1, 4),
    "batch norm": nn.BatchNorm1d(4).double(),
    "batch norm and dropout": nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.1)).double(),
}


@pytest.mark.parametrize("x", ["normal", "zeros", "ones", "one sample"])
@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_influence_each_other(name, x):
    """Refused, and seen for what it is whatever the input was traced with."""
    if x == "one sample" and name == "time first, folded":
        pytest.skip("one sample is apart from no other")
    x = {"normal": normal(4, 4), "zeros": normal(4, 4) * 0, "ones": normal(4, 4) * 0 + 1, "one sample": normal(1, 4)}[x]
    if x.shape[0] == 1 and "batch norm" in name:
        pytest.skip("BatchNorm refuses one sample by itself")
    model = Calls(COUPLED[name])
    with torch.no_grad():
        model.layer.bias.zero_()  # so that zeros reach the function as zeros
    with pytest.raises((CoupledSamplesError, TraceError), match=r"influence each other|grow in proportion"):
        hzo.plan(hzo.trace(model, x), tree="bisect", assume="nothing")


@pytest.mark.parametrize("x", [normal(4, 4), torch.zeros(4, 4), normal(1, 4)])
def test_samples_that_do_not(x):
    """Nor does what draws numbers for some elements alone, or computes with the samples' number."""
    layers = nn.RReLU(), nn.Dropout(0.4), Calls(lambda h: h + h.new_zeros(h.shape[0], 4)), nn.Softmax(1)
    hzo.plan(hzo.trace(nn.Sequential(nn.Linear(4, 4), *layers).double(), x.double()), tree="bisect", assume="nothing")


def test_opaque_random_stage_that_couples_is_seen():
    """Its queries run copy by copy, so that no larger batch would show it."""

    class Odd(nn.Module):
        hzo_marks = Marks()

        def forward(self, x):
            return F.dropout(x, 0.5) - x.mean(0, keepdim=True)

    chain = hzo.trace(nn.Sequential(nn.Linear(3, 3), Odd()), torch.randn(4, 3))
    with pytest.raises(CoupledSamplesError, match="influence each other"):
        hzo.plan(chain, assume="nothing")


def test_noise_that_is_recorded_repeats():
    """Numbers from a generator of the model's own stand on the tape as constants; an opaque stage draws them anew."""
    generator = torch.Generator().manual_seed(0)
    noisy = Calls(lambda h: h + 1e-3 * torch.randn(h.shape, generator=generator, dtype=h.dtype))
    x = normal(3, 4)
    hzo.plan(hzo.trace(nn.Sequential(nn.Linear(4, 4).double(), noisy), x))
    noisy.hzo_marks = Marks()
    chain = hzo.trace(nn.Sequential(nn.Linear(4, 4).double(), noisy), x)
    with pytest.raises(NondeterministicError, match=r"gave two results for the same input.*noise="):
        hzo.plan(chain)
    assert hzo.plan(chain, noise=1e-3).noise == hzo.Noise(readout=1e-3)


def test_numpy_noise_is_seen():
    generator = np.random.default_rng(0)
    stage = lambda h: torch.as_tensor(h.numpy() + generator.normal(size=h.shape))  # noqa: E731
    chain = hzo.trace(hzo.Chain([nn.Linear(4, 4).double(), stage]), normal(3, 4))
    with pytest.raises(NondeterministicError, match="gave two results"):
        hzo.plan(chain)


class TestOpaqueStages:
    """Stages that look at values: one operation each, whose parameters are perturbed."""

    class Branching(nn.Module):
        hzo_marks = Marks()

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(normal(3) * 0.5)

        def forward(self, x):
            # A choice for every sample by itself, made in Python.
            rows = [row * self.weight if float(row[0]) > 0 else torch.sin(row + self.weight) for row in x]
            return torch.stack(rows)

    def test_parameters_are_perturbed(self):
        model = nn.Sequential(nn.Linear(3, 3), self.Branching(), nn.Linear(3, 2)).double()
        oracles.assert_right(model, normal(4, 3))

    @pytest.mark.parametrize("in_place", [False, True])
    def test_numpy_between_layers(self, in_place):
        """In place, NumPy writes where no version counter looks, and would change what the layer before returned."""

        def stage(h):
            a = h.numpy()
            if in_place:
                a *= 2
                return torch.as_tensor(a)
            return torch.as_tensor(np.multiply(a, 2))

        first, last = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
        chain, x = hzo.Chain([first, stage, nn.Tanh(), last]), normal(4, 3)
        copy = x.clone()
        found, _ = hzo.grad_and_value(chain, lambda out: out.square().sum(1), x)
        hzo.grad_and_value(hzo.Chain([stage, first]), lambda out: out.square().sum(1), x)
        assert torch.equal(x, copy)
        last(torch.tanh(2 * first(x))).square().sum(1).mean().backward()
        exact = {"0.weight": first.weight, "0.bias": first.bias, "3.weight": last.weight, "3.bias": last.bias}
        errors = oracles.relative_errors(found, {name: p.grad for name, p in exact.items()})
        assert oracles.worst(errors) <= oracles.CENTRAL

    def test_memory_used_again_is_copied(self):
        """A result that the next call overwrites would make every difference zero."""
        buffer = np.empty((64, 3))

        def simulate(h):
            np.sin(h.numpy(), out=buffer[: len(h)])
            return torch.as_tensor(buffer[: len(h)])

        first, x = nn.Linear(3, 3).double(), normal(4, 3)
        found, _ = hzo.grad_and_value(hzo.Chain([first, simulate]), oracles.distance, x)
        oracles.distance(first(x).sin()).mean().backward()
        torch.testing.assert_close(found["0.weight"], first.weight.grad, rtol=1e-6, atol=1e-9)

    def test_hidden_trainable_layer_is_refused(self):
        hidden = nn.Linear(3, 3).double()
        chain = hzo.Chain([nn.Linear(3, 3).double(), lambda h: torch.as_tensor(np.sin(hidden(h).detach().numpy()))])
        with pytest.raises(TraceError, match=r"trainable tensor.*gradient would be lost"):
            hzo.trace(chain, normal(4, 3))
        hidden.requires_grad_(False)
        hzo.trace(chain, normal(4, 3))


def test_a_parameter_written_to_is_put_back_after_tracing():
    """max_norm rewrites the weight in the forward pass."""
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Flatten(), nn.Linear(6, 2))
    before = model[0].weight.clone()
    hzo.trace(model, torch.randint(5, (3, 2)))
    assert torch.equal(model[0].weight, before)


def test_a_buffer_replaced_is_put_back_after_tracing():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4).double())

        def forward(self, x):
            self.mean = self.mean * 0.9 + 0.1
            return x + self.mean

    model = nn.Sequential(nn.Linear(4, 4).double(), Running())
    hzo.trace(model, normal(3, 4))
    assert float(model[1].mean.sum()) == 0


def test_a_penalty_among_the_outputs_is_part_of_the_loss():
    class Penalised(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh(), self.weight.square().sum()

    model, x = Penalised(4, 4).double(), normal(3, 4)

    def loss(out):
        return oracles.distance(out[0]).mean() + 0.1 * out[1]

    expected = torch.autograd.grad(loss(model(x)), [model.weight, model.bias])
    for assume in ("nothing", "structure"):
        found, _ = hzo.grad_and_value(hzo.trace(model, x), loss, x, assume=assume)
        for name, gradient in zip(("weight", "bias"), expected, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def test_a_buffer_written_to_through_a_view_is_put_back_after_tracing():
    class Counting(nn.BatchNorm1d):
        def forward(self, x):
            self.running_mean[:2].add_(1)
            return x

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Counting(4)))
    hzo.trace(model, torch.randn(3, 4))
    assert float(model[1][0].running_mean.sum()) == 0


def test_error_names_the_stage():
    hidden = nn.Linear(4, 4).double()
    stage = lambda h: torch.as_tensor(hidden(h).detach().numpy())  # noqa: E731
    with pytest.raises(TraceError, match=r"^1:<lambda>: .*gradient would be lost"):
        hzo.trace(hzo.Chain([nn.Linear(4, 4).double(), stage]), normal(3, 4))

"""A callable without a derivative inside an autograd model, against the same callable with one."""

import copy
import re
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import (
    CoupledSamplesError,
    DerivativeError,
    HzoError,
    InputError,
    NondeterministicError,
    NonFiniteError,
    QueryError,
    QueryTimeoutError,
    TraceError,
)
from support.oracles import normal, relative_errors, worst
from support.state import assert_same, state

# The design asks for this; central differences in float64 leave 1e-9.
TOLERANCE = 1e-5


def physics(x):
    return torch.sin(x) * x.sum(-1, keepdim=True) + torch.tanh(x.flip(-1))


def both(x, y):
    return torch.sigmoid(x @ y.unsqueeze(-1)).squeeze(-1) * y[:, :1] + x[:, :, 0]


class Plain(nn.Module):
    """The callable itself, for autograd to see through."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *inputs):
        return self.f(*inputs)


class Alone(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.a, self.part, self.b = nn.Linear(3, 4), part, nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.part(self.a(x)))


class Twice(Alone):
    def forward(self, x):
        h = torch.tanh(self.part(self.a(x)))
        return self.b(self.part(h) + h)


class First(Alone):
    """The black box stands before all layers: its input needs no gradient, and costs nothing."""

    def forward(self, x):
        return self.b(torch.tanh(self.part(F.pad(x, (0, 1)))))


class TwoInputs(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.a, self.c, self.part, self.b = nn.Linear(3, 12), nn.Linear(3, 4), part, nn.Linear(3, 2)

    def forward(self, x):
        return self.b(self.part(self.a(x).view(-1, 3, 4), self.c(x)))


class Mixed(nn.Module):
    """An integer input stands first."""

    def __init__(self, part):
        super().__init__()
        self.a, self.part, self.b = nn.Linear(3, 4), part, nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.part((x[:, 0] > 0).long(), self.a(x)))


def choose(k, x):
    return torch.where(k.unsqueeze(1) > 0, torch.sin(x), x**3)


def gradients(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


NETWORKS = {Alone: physics, Twice: physics, First: physics, TwoInputs: both, Mixed: choose}


def problem(network=Alone, **options):
    torch.manual_seed(0)
    model = network(hzo.blackbox(NETWORKS[network], **options)).double()
    return model, normal(5, 3), torch.arange(5) % 2


@pytest.mark.parametrize("options", [{}, {"batched": False}, {"memory": 1}])
@pytest.mark.parametrize("network", NETWORKS)
def test_matches_autograd(network, options):
    model, x, y = problem(network, **options)
    found = gradients(model, x, y)
    model.part = Plain(NETWORKS[network])
    assert worst(relative_errors(found, gradients(model, x, y))) <= TOLERANCE


def test_batched_false_never_sees_a_larger_batch():
    sizes = set()

    def watched(x):
        sizes.add(len(x))
        return physics(x)

    model, x, y = problem()
    model.part = hzo.blackbox(watched, batched=False)
    gradients(model, x, y)
    assert sizes == {5}


@pytest.mark.parametrize("batched", [True, 2])
@pytest.mark.parametrize("writes", [False, True])
def test_numpy(writes, batched):
    """Also one that writes into its input, and returns the same memory every time."""
    memory = np.empty((1000, 4))

    def simulate(a):
        result = memory[: len(a)]
        np.copyto(result, np.sin(a) * a.sum(-1, keepdims=True) + np.tanh(a[:, ::-1]))
        if writes:
            a[:] = 0
        return result

    model, x, y = problem()
    model.part = hzo.blackbox(simulate, numpy=True, batched=batched)
    found = gradients(model, x, y)
    model.part = Plain(physics)
    assert worst(relative_errors(found, gradients(model, x, y))) <= TOLERANCE


def test_single_precision_inside():
    """NumPy code that computes in float32 within a float64 model: the step knows."""
    model, x, y = problem()
    model.part = hzo.blackbox(lambda a: np.sin(a.astype(np.float32)), numpy=True)
    found = gradients(model, x, y)
    model.part = Plain(torch.sin)
    limit = 10 * torch.finfo(torch.float32).eps ** (2 / 3)
    assert worst(relative_errors(found, gradients(model, x, y))) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    model, x, y = problem()
    exact = copy.deepcopy(model)
    exact.part = Plain(physics)
    reference = gradients(exact, x, y)
    found = {n: g.double() for n, g in gradients(model.to(dtype), x.to(dtype), y).items()}
    flat = [torch.cat([g[n].flatten() for n in reference]) for g in (found, reference)]
    assert F.cosine_similarity(*flat, dim=0) > (0.99999 if dtype == torch.float32 else 0.99)


def test_cost():
    model, x, y = problem()
    with hzo.count_queries() as count:
        gradients(model, x, y)
    assert count.queries == 2 * 4 * 5
    assert count.base_evaluations == 5 + 5  # the forward pass, and the test that it is deterministic
    assert count.boxes == {"physics": count.queries}
    with hzo.count_queries() as count:
        gradients(*problem(First))
    assert count.queries == count.base_evaluations == 0
    with hzo.count_queries() as count, torch.no_grad():
        model(x)
    assert count.queries == 0


def test_dropout_inside_repeats():
    model, x, y = problem()
    inside = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh()).double().requires_grad_(False)
    model.part = hzo.blackbox(inside)
    torch.manual_seed(1)
    found, after = gradients(model, x, y), torch.get_rng_state()
    model.part = inside
    torch.manual_seed(1)
    assert worst(relative_errors(found, gradients(model, x, y))) <= TOLERANCE
    assert torch.equal(torch.get_rng_state(), after)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return torch.sin(x) * self.passes


def test_buffers_inside_move_once():
    counting = Counting()
    model, x, y = problem()
    model.part = hzo.blackbox(counting)
    for passes in (1, 2):
        found = gradients(model, x, y)
        assert int(counting.passes) == passes
        exact = copy.deepcopy(model)
        exact.part = Plain(lambda x, passes=passes: torch.sin(x) * passes)
        assert worst(relative_errors(found, gradients(exact, x, y))) <= TOLERANCE


def test_samples_that_influence_each_other_are_refused():
    model, x, y = problem()
    model.part = hzo.blackbox(nn.BatchNorm1d(4).double().requires_grad_(False))
    with pytest.raises(CoupledSamplesError, match=r"BatchNorm1d lets the samples.*eval mode"):
        gradients(model, x, y)


class TestErrors:
    """A clear error, weights as they were, and the next step works."""

    class Part:
        """Behaves, until its ``left``-th call from now."""

        def __init__(self, spoil, left=0):
            self.spoil, self.left = spoil, left

        def __call__(self, x):
            self.left -= 1
            return self.spoil(x) if self.left == 0 else physics(x)

    SPOILT: ClassVar = {
        "nan": (lambda x: physics(x) * float("nan"), NonFiniteError, "returned NaN or infinity"),
        "shape": (
            lambda x: physics(x)[:, :2],
            InputError,
            r"returned samples of shape \[\(2,\)\], and \[\(4,\)\] before",
        ),
        "batch": (lambda x: physics(x)[1:], InputError, r"returned shape \(\d+, 4\) for \d+ samples"),
        "scalar": (lambda x: physics(x).sum(), InputError, r"returned shape \(\) for"),
        "nothing": (lambda x: None, InputError, "returned a NoneType; expected tensors or arrays"),
        "exception": (lambda x: 1 / 0, QueryError, "ZeroDivisionError: division by zero"),
        "hanging": (lambda x: time.sleep(10), QueryTimeoutError, "no answer within 0.2 seconds; allow more"),
    }
    # What a step calls for: the forward pass, the test that it is deterministic, and two queries. With a time limit
    # on a busy machine a call may take fewer of the four directions.
    ASKED: ClassVar = [
        "a forward pass",
        "the test that it is deterministic",
        "quer(y|ies) 1( to [2-4])? of 4 .* up",
        "quer(y|ies) 1( to [2-4])? of 4 .* down",
    ]

    @pytest.mark.parametrize("n", [1, 2, 3, 4])
    @pytest.mark.parametrize("name", SPOILT)
    def test_spoilt(self, name, n):
        spoil, error, message = self.SPOILT[name]
        if name == "shape" and n == 1:  # a forward pass may have another shape; here it does not fit the next layer
            error, message = RuntimeError, "shapes cannot be multiplied"
        model, x, y = problem()
        part = self.Part(spoil)
        model.part = hzo.blackbox(part, timeout=0.2 if name == "hanging" else None)
        gradients(model, x, y)  # traces
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before, part.left = state(model), n
        with pytest.raises(error, match=message) as caught:
            F.cross_entropy(model(x), y).backward()
        if error is not RuntimeError:
            assert re.search(f"the black box Part.*{self.ASKED[n - 1]}", str(caught.value))
        assert_same(before, state(model))
        optimizer.zero_grad()
        first = F.cross_entropy(model(x), y)
        first.backward()
        optimizer.step()
        assert F.cross_entropy(model(x), y) < first

    @pytest.mark.parametrize("name", SPOILT)
    def test_spoilt_in_the_first_pass_of_all(self, name):
        """A trial run of a few samples stands before it."""
        spoil, error, message = self.SPOILT[name]
        model, x, y = problem()
        model.part = hzo.blackbox(self.Part(spoil, left=2), timeout=0.2 if name == "hanging" else None)
        with pytest.raises((error, TraceError), match=f"{message}|does different things|expected") as caught:
            gradients(model, x, y)
        assert isinstance(caught.value, HzoError)
        found = gradients(model, x, y)
        model.part = Plain(physics)
        assert worst(relative_errors(found, gradients(model, x, y))) <= TOLERANCE

    def test_does_not_repeat(self):
        readings = iter(np.random.default_rng(0).normal, None)  # no generator that could be found and rewound
        noisy = lambda a: a + 1e-3 * np.reshape([next(readings) for _ in range(a.size)], a.shape)  # noqa: E731
        model, x, y = problem()
        model.part = hzo.blackbox(noisy, numpy=True)
        with pytest.raises(NondeterministicError, match=r"gave two results for the same input.*noise='measured'"):
            gradients(model, x, y)
        model.part = hzo.blackbox(noisy, numpy=True, noise="measured")
        gradients(model, x, y)

    def test_does_not_repeat_any_more(self):
        drift = iter(range(1000))
        calm = True

        def drifting(x):
            return physics(x) + (0 if calm else 1e-3 * next(drift))

        model, x, y = problem()
        model.part = hzo.blackbox(drifting)
        gradients(model, x, y)
        calm = False
        with pytest.raises(NondeterministicError, match="the black box drifting gave two results"):
            gradients(model, x, y)

    def test_options(self):
        with pytest.raises(InputError, match="expected scheme"):
            hzo.blackbox(physics, scheme="backward")
        with pytest.raises(InputError, match="positive finite step"):
            hzo.blackbox(physics, step=0.0)

    def test_second_derivatives_are_refused(self):
        """Their terms would be missing without a word."""
        x = normal(2, 3).requires_grad_()
        (g,) = torch.autograd.grad(hzo.blackbox(torch.sin)(x).square().sum(), x, create_graph=True)
        with pytest.raises(DerivativeError, match="a second derivative of the black box sin was asked for"):
            g.sum().backward()

    @pytest.mark.parametrize(
        "function",
        [
            hzo.blackbox(torch.sin),
            hzo.blackbox([torch.sin, torch.tanh]),
            hzo.blackbox(torch.sin, noise=hzo.Noise(readout=1e-9), step=1e-3),
            hzo.smoothed(lambda z: z.sum(1), draws=2),
        ],
        ids=["single", "list", "noisy", "smoothed"],
    )
    def test_gradient_penalties_are_refused(self, function):
        """Also where no cotangent requires a gradient, as for a sum."""
        x = normal(2, 3).requires_grad_()
        (g,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        with pytest.raises(DerivativeError, match="a second derivative of"):
            (function(x).sum() + g.norm()).backward()

    def test_integers_are_kept_where_they_are_indices(self):
        x = normal(2, 3).requires_grad_()
        found = hzo.blackbox(lambda x: x.argmax(1), integers="kept")(x)
        assert not found.requires_grad
        assert torch.equal(found, x.argmax(1))


def test_trains():
    torch.manual_seed(0)
    x = normal(64, 3)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(3, 16), hzo.blackbox(np.tanh, numpy=True), nn.Linear(16, 2)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 < losses[0]


def test_inside_a_chain_it_is_one_stage():
    model, loss_fn = nn.Sequential(nn.Linear(3, 4), hzo.blackbox(physics), nn.Linear(4, 2)).double(), F.cross_entropy
    x, y = normal(5, 3), torch.arange(5) % 2
    for assume in ("nothing", "structure"):
        found, _ = hzo.grad_and_value(model, loss_fn, x, y, assume=assume)
        F.cross_entropy(model[2](physics(model[0](x))), y).backward()
        assert worst(relative_errors(found, {n: p.grad for n, p in model.named_parameters()})) <= TOLERANCE
        model.zero_grad()

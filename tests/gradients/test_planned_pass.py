"""Under a plan the user's own Python runs once, as for backprop: what it counts, draws or makes moves once."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import HzoError, PlanError, TraceError

PLANS = [{"tree": "bisect", "assume": "nothing"}, {"tree": "stagewise", "assume": "structure"}]
X = torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5).sin()
Y = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3).cos()


class Stateful(nn.Module):
    """Two layers, with something in between that keeps count in Python, where no snapshot looks."""

    def __init__(self, between, state):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.last = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
        self.between, self.state = between, state

    def forward(self, x):
        return self.last(self.between(self.first(x), self.state))


def counts(h, state):
    state[0] += 1
    return h.tanh() * float(state[0])


def takes_the_next(h, state):
    return h.tanh() * next(state)


def alternates(h, state):
    state.append(None)
    return h.tanh() if len(state) % 2 else h.sigmoid().exp()


def grows(h, state):
    state["calls"] = state.get("calls", 0) + 1
    for _ in range(state["calls"]):
        h = h.tanh() + h
    return h


KEPT = {
    "a counter in a list": (counts, lambda: [0]),
    "an iterator": (takes_the_next, lambda: iter([1.0, 2.0, 3.0, 4.0])),
    "a generator": (takes_the_next, lambda: (float(k) for k in itertools.count(1))),
    "branches that alternate": (alternates, list),
    "calls that become more": (grows, dict),
}


def steps(model, step, number=3):
    """The gradients of so many steps, one after the other."""
    found = []
    for _ in range(number):
        model.zero_grad()
        step(model)
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return found


def by_backprop(model):
    F.mse_loss(model(X), Y).backward()


@pytest.mark.parametrize("options", PLANS, ids=str)
@pytest.mark.parametrize("kept", KEPT)
def test_what_the_model_keeps_in_python_moves_once_a_step(kept, options):
    between, state = KEPT[kept]
    expected = steps(Stateful(between, state()), by_backprop)
    found = steps(Stateful(between, state()), lambda model: hzo.backward(model, F.mse_loss, X, Y, **options))
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-7, atol=1e-9, msg=f"step {number}, {name}")


@pytest.mark.parametrize("call", [hzo.grad_and_value, hzo.cotangents], ids=["grad_and_value", "cotangents"])
def test_the_model_runs_once_for_whatever_is_asked_for(call):
    model = Stateful(counts, [0])
    for expected in (1, 2):
        call(model, F.mse_loss, X, Y, **PLANS[0])
        assert model.state == [expected]


def test_a_loss_that_keeps_count_is_called_once():
    calls = []

    def loss(output, y):
        calls.append(None)
        return F.mse_loss(output, y) * len(calls)

    model = Stateful(lambda h, _: h.tanh(), None)
    _, first = hzo.grad_and_value(model, loss, X, Y, **PLANS[0])
    assert len(calls) == 1
    assert first == F.mse_loss(model(X), Y)


def test_a_plan_for_a_trace_that_was_made_before_runs_nothing_twice():
    """``hzo.trace`` runs the model by itself; its trace is known to the step."""
    model = Stateful(lambda h, state: state.append(None) or h.tanh(), [])
    plan = hzo.plan(hzo.trace(model, X), **PLANS[0])
    before = len(model.state)
    hzo.backward(model, F.mse_loss, X, Y, plan=plan)
    assert len(model.state) == before + 1


@pytest.mark.parametrize("options", PLANS, ids=str)
def test_a_last_sample_alone(options):
    """Of one sample nothing can be told about several: what was learned of it is not used for them."""

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x):
            both = torch.cat([x, 2 * x])  # each sample stands there twice
            y = self.layer(both).tanh()
            return y[: len(x)] * y[len(x) :]

    torch.manual_seed(3)
    model = Doubled()
    for x, y in ((X[:1], Y[:1]), (X, Y), (X[:1], Y[:1])):
        found, _ = hzo.grad_and_value(model, F.mse_loss, x, y, **options)
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-7, atol=1e-9)


class Lazy(nn.Module):
    """Makes its weight when it sees an input for the first time."""

    def forward(self, x):
        if not hasattr(self, "weight"):
            torch.manual_seed(3)
            self.weight = nn.Parameter(torch.randn(x.shape[1], 3, dtype=x.dtype))
        return (x @ self.weight).tanh()


@pytest.mark.parametrize("options", PLANS, ids=str)
def test_a_parameter_that_is_made_in_the_first_step(options):
    expected = steps(Lazy(), by_backprop)
    found = steps(Lazy(), lambda model: hzo.backward(model, F.mse_loss, X, Y, **options))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b["weight"], a["weight"], rtol=1e-7, atol=1e-9)


def test_a_trace_of_a_model_that_makes_a_parameter_is_refused():
    """Its weight would go with the trace, and the plan would be of a parameter that is none."""
    model = Lazy()
    with pytest.raises(TraceError, match=r"makes parameters in its first forward pass \(weight\).*run it once"):
        hzo.trace(model, X)
    assert not hasattr(model, "weight")
    model(X)
    chain = hzo.trace(model, X)
    hzo.backward(chain, F.mse_loss, X, Y, plan=hzo.plan(chain))
    assert model.weight.grad is not None


def test_a_plan_that_cannot_be_made_leaves_everything_as_it_was():
    """It is made behind the step that it is for: what that moved goes back."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(PlanError, match="assume"):
        hzo.backward(model, F.mse_loss, X, Y, assume="everything")
    with pytest.raises(HzoError, match="influence each other"):
        hzo.backward(model, F.mse_loss, X, Y, tree="stagewise", assume="nothing")
    assert torch.equal(torch.get_rng_state(), random)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_a_step_that_takes_another_way_is_planned_from_what_it_did():
    """A branch on values, behind calls whose activations were released already: they are computed again."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(5)
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4)).double()
            self.last = nn.Linear(5, 3).double()
            self.calls = []

        def forward(self, x):
            self.calls.append(bool(x.sum() > 0))
            mask = (x > 0).double()
            for layer in self.layers:
                x = F.dropout(layer(x).tanh(), 0.3) * mask
            x = x.sin() if self.calls[-1] else x.cos().exp()
            return self.last(x)

    model = Branches()
    for k in range(6):
        x = X.roll(k, 0) * (-1) ** k
        torch.manual_seed(k)
        found, _ = hzo.grad_and_value(model, F.mse_loss, x, Y, **PLANS[0])
        assert len(model.calls) == 2 * k + 1  # one of backprop for each of ours
        model.zero_grad()
        torch.manual_seed(k)
        F.mse_loss(model(x), Y).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-6, atol=1e-8, msg=f"{k} {name}")
    assert len({*model.calls}) == 2, "the cases must take both ways"


def test_warnings_of_the_model_come_once():
    def warns(h, _):
        warnings.warn("as often as the model runs", stacklevel=1)
        return h.tanh()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hzo.backward(Stateful(warns, None), F.mse_loss, X, Y, **PLANS[0])
    assert len([w for w in caught if "as often" in str(w.message)]) == 1


class Doubling(nn.Module):
    """Writes to its input in place, as some preprocessing does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x, *others):
        return self.layer(x.mul_(2)) + sum(o.sum() for o in others)


@pytest.mark.parametrize("options", [{}, *PLANS])
def test_what_a_model_writes_to_its_input_reaches_the_caller(options):
    model = Doubling()
    for x in (X.clone(), X.clone(), X[:4].clone()):  # the second time the plan is known
        before = x.clone()
        gradient, _ = hzo.grad_and_value(model, F.mse_loss, x, Y[: len(x)], **options)
        assert torch.equal(x, 2 * before)
        F.mse_loss(model(before), Y[: len(x)]).backward()
        torch.testing.assert_close(gradient["layer.weight"], model.layer.weight.grad, rtol=1e-6, atol=1e-8)
        model.zero_grad()
    x = X.clone()
    with pytest.raises(HzoError):
        hzo.backward(model, lambda output: output.sum() * float("nan"), x, **options)
    assert torch.equal(x, X)
    hzo.trace(model, x)
    assert torch.equal(x, X)


def test_two_inputs_of_one_memory_that_is_written_to():
    x = X.clone()
    with pytest.raises(TraceError, match="writes in place to input 0"):
        hzo.backward(Doubling(), F.mse_loss, (x, x), Y, **PLANS[0])
    assert torch.equal(x, X)

"""Nothing but the gradient: all else is as after one ordinary forward pass, and untouched by tracing and planning."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.execution.side_effects import contained
from hzo.tape.marks import Marks
from support import oracles
from support.cases import CASES
from support.oracles import normal
from support.state import assert_same, state


def call(problem):
    return problem.module(**problem.x) if isinstance(problem.x, dict) else problem.module(problem.x)


def with_buffers():
    """Buffers that move in every way: statistics, a counter, a running mean written to twice, one by index."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("running", torch.ones(4, dtype=torch.float64))

        def forward(self, x):
            self.calls += 1
            self.running.mul_(0.9).add_(0.1 * self.calls)
            self.running[0] = 7.0
            return x + self.running

    frozen = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    return nn.Sequential(frozen, Counting(), nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("method", [hzo.backward, hzo.grad_and_value, hzo.cotangents])
@pytest.mark.parametrize("assume", ["nothing", "structure"])
def test_as_after_one_forward_pass(method, assume):
    model, x, y = with_buffers(), normal(5, 4), torch.arange(5) % 3
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, tree="bisect", assume=assume)
    reference = copy.deepcopy(model)
    for _ in range(3):  # also the second and third time, from statistics that have moved
        random = torch.get_rng_state()
        reference(x)
        expected = state(reference)
        torch.set_rng_state(random)
        method(chain, F.cross_entropy, x, y, plan=plan)
        found = state(model)
        expected["identities"] = found["identities"]
        assert_same(expected, found)
    assert int(model[1].calls) == 3
    assert int(model[0][1].num_batches_tracked) == 3


@pytest.mark.parametrize("name", CASES)
def test_every_network_as_after_one_forward_pass(name):
    problem = CASES[name].build()
    given = copy.deepcopy(problem.x)
    chain = hzo.trace(problem.model, problem.x)
    random = torch.get_rng_state()
    before = state(problem.module)
    with torch.no_grad():
        call(problem)
    expected = state(problem.module)
    with torch.no_grad():
        for buffer_name, buffer in problem.module.named_buffers():
            buffer.copy_(before["tensors"][buffer_name])
    torch.set_rng_state(random)
    hzo.backward(chain, problem.loss_fn, problem.x, problem.y)
    assert_same(expected, state(problem.module))
    torch.testing.assert_close(problem.x, given, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_tracing_and_planning_leave_no_trace(name):
    problem = CASES[name].build()
    given, before = copy.deepcopy(problem.x), state(problem.module)
    chain = hzo.trace(problem.model, problem.x)
    for tree in ("flat", "planned", 3):
        str(hzo.plan(chain, tree=tree))
    assert_same(before, state(problem.module))
    torch.testing.assert_close(problem.x, given, rtol=0, atol=0)
    assert all(p.grad is None for p in problem.module.parameters())


class Remembering(nn.Module):
    """What it keeps between calls are attributes: a number, a tensor made anew, one that is written to."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls, self.name, self.h, self.sum = nn.Linear(4, 4), 0, "new", None, torch.zeros(4)

    def forward(self, x):
        self.calls, self.name = self.calls + 1, "used"
        self.h = self.layer(x) if self.h is None else 0.5 * self.h.detach() + self.layer(x)
        self.sum += self.h.detach().sum(0)
        return self.h * self.calls


@pytest.mark.parametrize("calls", [0, 2])
def test_attributes_are_put_back(calls):
    model = Remembering()
    x = torch.randn(5, 4)
    for _ in range(calls):
        model(x)
    before, content = dict(vars(model)), model.sum.clone()
    with contained([model]):
        model(x)
    assert all(vars(model)[name] is value for name, value in before.items())
    assert torch.equal(model.sum, content)


@pytest.mark.parametrize("assume", ["nothing", "structure"])
def test_queries_see_the_buffers_of_the_base_pass(assume):
    """A layer whose result depends on a buffer that every call moves: all queries start from one state."""

    class Counting(nn.Module):
        hzo_marks = Marks()

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return torch.sin(x * self.weight * self.calls)

    model = nn.Sequential(nn.Linear(4, 4), Counting(), nn.Linear(4, 4), Counting(), nn.Linear(4, 3)).double()
    x, y = normal(5, 4), torch.arange(5) % 3
    reference = copy.deepcopy(model)
    for _ in range(2):
        model.zero_grad()
        reference.zero_grad()
        hzo.backward(model, F.cross_entropy, x, y, assume=assume, tree="flat")
        F.cross_entropy(reference(x), y).backward()
        exact = {name: p.grad for name, p in reference.named_parameters()}
        found = {name: p.grad for name, p in model.named_parameters()}
        assert oracles.worst(oracles.relative_errors(found, exact)) <= oracles.CENTRAL


def test_batch_norm_by_its_rule_moves_once():
    """In training mode behind trained layers: the plan with structure handles it, and its statistics move once."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = normal(6, 4), torch.arange(6) % 3
    reference = copy.deepcopy(model)
    F.cross_entropy(reference(x), y).backward()
    hzo.backward(model, F.cross_entropy, x, y)
    for (name, buffer), other in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        # The bias before the norm has a gradient of zero: a floor.
        torch.testing.assert_close(p.grad, q.grad, rtol=oracles.CENTRAL, atol=1e-9)


class TestErrors:
    """Whenever an error comes, everything is as before."""

    class Failing(nn.Module):
        """Raises when it is called for the n-th time after it was armed."""

        def __init__(self):
            super().__init__()
            self.left = None

        def forward(self, x):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise OverflowError("out of ink")
            return torch.tanh(x)

    Failing.hzo_marks = Marks()

    @pytest.mark.parametrize("calls", [0, 1, 2, 5])
    def test_in_the_base_pass_and_in_queries(self, calls):
        model = with_buffers().append(self.Failing())
        x, y = normal(5, 4), torch.arange(5) % 3
        chain = hzo.trace(model, x)
        plan = hzo.plan(chain, tree="flat", assume="nothing")
        before = state(model)
        model[-1].left = calls
        with pytest.raises(OverflowError, match="out of ink"):
            hzo.backward(chain, F.cross_entropy, x, y, plan=plan, memory=1)
        assert_same(before, state(model))
        assert all(p.grad is None for p in model.parameters())
        model[-1].left = None
        hzo.backward(chain, F.cross_entropy, x, y, plan=plan)  # and the next step works
        assert model[-2].weight.grad is not None

    def test_in_the_loss(self):
        def loss(out, y):
            raise OverflowError("out of ink")

        model, x = with_buffers(), normal(5, 4)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = state(model)
        with pytest.raises(OverflowError, match="out of ink"):
            hzo.backward(model, loss, x, x)
        assert_same(before, state(model))
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())

    def test_while_tracing(self):
        model = with_buffers().append(self.Failing())
        before, x = state(model), normal(5, 4)
        before["random"] = torch.get_rng_state()
        model[-1].left = 3
        with pytest.raises(OverflowError, match="out of ink"):
            hzo.trace(model, x)
        assert_same(before, state(model))


def test_contained_puts_back_what_was_replaced_and_resized():
    model = nn.BatchNorm1d(3)
    model.register_buffer("table", torch.zeros(2))
    before = state(model)
    with contained([model]):
        model.running_mean = torch.ones(3)
        model.table.resize_(5)
        model.running_var += 1
        model.eval()
        torch.randn(3)
    assert_same(before, state(model))


def test_training_flags_that_a_forward_pass_changes():
    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            self.drop.eval()
            return self.drop(x)

    model = nn.Sequential(nn.Linear(3, 3), Switching())
    hzo.trace(model, torch.randn(2, 3))
    assert model[1].drop.training


def test_dropout_draws_anew_for_every_gradient():
    problem = CASES["dropout"].build()
    first, _ = hzo.grad_and_value(*problem)
    second, _ = hzo.grad_and_value(*problem)
    assert not torch.allclose(first["0.weight"], second["0.weight"])


def test_models_with_traces_copy_pickle_and_go_away():
    model, loss_fn, x, y = CASES["residual_mlp"].build()
    keys = list(model.state_dict())
    hzo.backward(model, loss_fn, x, y)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        hzo.backward(other, loss_fn, x, y)
        assert other[0].weight.grad is not model[0].weight.grad
        assert torch.equal(other[0].weight.grad, model[0].weight.grad)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_is_returned_has_no_history():
    loss = hzo.backward(*CASES["mlp"].build())
    assert not loss.requires_grad
    assert loss.dim() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inference_mode_makes_ordinary_gradients(dtype):
    """Those that it makes itself could be neither clipped nor added to."""
    model, y = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).to(dtype), torch.arange(3)
    with torch.inference_mode():
        x = normal(3, 4).to(dtype)
        made = [hzo.backward(model, F.cross_entropy, x, y, scale=2.0), *(p.grad for p in model.parameters())]
        made += [
            *hzo.grad_and_value(model, F.cross_entropy, x, y)[0].values(),
            *hzo.cotangents(model, F.mse_loss, x, x[:, :3]),
        ]
    assert not any(t.is_inference() for t in made)
    hzo.backward(model, F.cross_entropy, x.clone(), y)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def test_works_under_no_grad_and_leaves_grad_mode_alone():
    problem = CASES["mlp"].build()
    with torch.no_grad():
        hzo.backward(*problem)
        assert not torch.is_grad_enabled()
    hzo.backward(*problem)
    assert torch.is_grad_enabled()

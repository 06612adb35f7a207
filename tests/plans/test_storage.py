"""Storing a path instead of all: the same bits, the predicted number of stages run again, the predicted bytes."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
import hzo.gradients.backward_sweep
from hzo.errors import InputError, NonFiniteError, PlanError
from hzo.execution.operation import Activations
from hzo.plans import TREES
from hzo.plans.activation_schedule import schedule
from hzo.plans.memory import activation_bytes
from hzo.plans.storage import Event, Pass, last_uses, passes, stages_run_again
from hzo.tape.marks import Marks
from hzo_lab.records import peak_of
from support import oracles
from support.architectures import NETWORKS
from support.cases import CASES, Problem
from support.oracles import SEED, solve


def recurrence(n):
    return 0 if n == 1 else n // 2 + recurrence(n // 2) + recurrence(n - n // 2)


def on_path(chain, plan):
    """The plan with a path stored, whether or not that takes less."""
    graph, path = chain.traced, replace(plan, storage="path")
    again = plan.batch * stages_run_again(len(graph.stages), "path")
    return replace(path, activation_bytes=activation_bytes(graph, schedule(graph, path)), recomputed=again)


def plain(stages, width=4, batch=2):
    layers = (nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(stages))
    return hzo.trace(nn.Sequential(*layers).double(), torch.randn(batch, width, dtype=torch.float64))


# ---- passes and lifetimes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [*range(1, 40), 64, 100, 255, 256])
def test_passes(stages):
    """Every stage is swept once, the last first, from boundaries that are there; the count is the recurrence's."""
    found = passes(stages, "path")
    assert found[0] == Pass(0, stages, stages - 1)
    assert [s for p in found for s in reversed(range(p.swept, p.stop))] == list(reversed(range(stages)))
    assert stages_run_again(stages, "path") == recurrence(stages)
    if stages & (stages - 1) == 0:
        assert recurrence(stages) == stages // 2 * int(math.log2(stages))
    for k, later in enumerate(found[1:], 1):
        assert any(before.start <= later.start < before.stop for before in found[:k])
    assert passes(stages, "all") == [Pass(0, stages, 0)]
    assert stages_run_again(stages, "all") == 0


def test_values_live_from_each_making_to_the_last_reader_before_the_next():
    events = [
        Event(makes=[1, 2]),  # 2 is read by nobody
        Event(reads=[0, 1]),
        Event(reads=[1]),
        Event(reads=[0], makes=[1]),  # 1 once more
        Event(),
        Event(reads=[1]),
    ]
    assert last_uses(events) == [(2,), (), (1,), (0,), (), (1,)]


# ---- the same bits -----------------------------------------------------------------------------------------------


def state(module):
    return [torch.get_rng_state(), *(buffer.clone() for buffer in module.buffers())]


def outcome(chain, problem, plan, function):
    """What a gradient returns and what it leaves behind; then everything is put back."""
    with oracles.undisturbed(problem.module), hzo.count_queries() as count:
        torch.manual_seed(SEED)
        found = function(chain, problem.loss_fn, problem.x, problem.y, plan=plan)
        return found, state(problem.module), count


def assert_same_bits(chain, problem, plan, function=hzo.grad_and_value):
    path = on_path(chain, plan)
    one, left, count = outcome(chain, problem, plan, function)
    other, left_by_path, count_of_path = outcome(chain, problem, path, function)
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    torch.testing.assert_close(left_by_path, left, rtol=0, atol=0)
    stages = plan.batch * len(chain)
    assert count.base_evaluations == stages
    assert count_of_path.base_evaluations == stages + path.recomputed
    assert path.recomputed == plan.batch * recurrence(len(chain))
    assert replace(count_of_path, base_evaluations=stages) == count  # and nothing else is run more often


@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize("tree", [*TREES, 3])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, tree, scheme):
    solved = solve(name)
    for assume in ("structure", "nothing"):
        assert_same_bits(solved.chain, solved.problem, hzo.plan(solved.chain, tree=tree, assume=assume, scheme=scheme))


@pytest.mark.parametrize("name", [name for name in CASES if name != "frozen_start"])
def test_cotangents_at_all_boundaries(name):
    solved = solve(name)
    for tree, scheme in (("bisect", "forward"), ("planned", "central")):
        plan = hzo.plan(solved.chain, tree=tree, scheme=scheme, boundaries="all")
        assert_same_bits(solved.chain, solved.problem, plan, hzo.cotangents)


@pytest.mark.parametrize("name", ["resnet20", "vgg", "densenet", "unet", "gpt", "encoder", "gru"])
def test_architectures_in_training_mode(name):
    """BatchNorm moves its statistics, dropout draws, skips pass over many boundaries, tokens are integers."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, x, y = NETWORKS[name]()
    problem = Problem(model.double().train(), F.cross_entropy, x, y)
    chain = hzo.trace(model, x)
    assert_same_bits(chain, problem, hzo.plan(chain))
    assert_same_bits(chain, problem, hzo.plan(chain, tree="planned", scheme="forward"))


class Counting(nn.Module):
    """A layer whose result depends on a buffer that every call moves."""

    hzo_marks = Marks()

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.sin(x * self.calls)


@pytest.mark.parametrize("tree", TREES)
def test_stages_see_the_buffers_and_random_numbers_of_the_base_pass(tree):
    layers = (m for _ in range(5) for m in (nn.Linear(4, 4), Counting(), nn.Dropout(0.3)))
    model, x = nn.Sequential(*layers).double(), torch.randn(3, 4, dtype=torch.float64)
    chain = hzo.trace(model, x)
    problem = Problem(model, F.mse_loss, x, x.cos())
    assert_same_bits(chain, problem, hzo.plan(chain, tree=tree, assume="nothing"))
    assert_same_bits(chain, problem, hzo.plan(chain, tree=tree, assume="nothing", spacing=None, scheme="forward"))


class ChannelsLast(nn.Module):
    """A map with channels last that is perturbed, and dropout of a function of it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x):
        h = torch.tanh(x.permute(0, 3, 1, 2) * self.scale)
        return F.dropout(h, 0.5).flatten(1)


@pytest.mark.parametrize("storage", ["all", "path"])
def test_random_numbers_fall_in_the_order_of_memory_though_the_operand_is_gone(storage):
    """Inside a query a mask depends on strides of the base pass, of a tensor that nobody holds any more."""
    model, x = ChannelsLast().double(), torch.randn(3, 3, 2, 4, dtype=torch.float64)
    problem = Problem(model, oracles.distance, x, None)
    chain = hzo.trace(model, x)
    plan = replace(hzo.plan(chain, tree="flat", assume="nothing"), storage=storage)
    torch.manual_seed(SEED)
    exact, _ = oracles.gradients(problem)
    torch.manual_seed(SEED)
    found, _ = hzo.grad_and_value(chain, oracles.distance, x, plan=plan)
    assert oracles.worst(oracles.relative_errors(found, exact)) <= oracles.CENTRAL


@pytest.mark.parametrize("calls", [8, 9, 12])
def test_an_error_in_a_stage_run_again_leaves_everything_as_it_was(calls):
    class Failing(Counting):
        left = None

        def forward(self, x):
            if self.left is not None:
                Failing.left -= 1
                if self.left < 0:
                    raise OverflowError("out of ink")
            return super().forward(x)

    model = nn.Sequential(*(Failing() for _ in range(8)), nn.Linear(4, 4)).double()
    model.insert(0, nn.Linear(4, 4).double())
    x = torch.randn(3, 4, dtype=torch.float64)
    chain = hzo.trace(model, x)
    plan = on_path(chain, hzo.plan(chain))
    before = state(model)
    Failing.left = calls
    with pytest.raises(OverflowError, match="out of ink"):
        hzo.backward(chain, F.mse_loss, x, x, plan=plan)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


# ---- bytes -------------------------------------------------------------------------------------------------------


def held_at_most(chain, problem, plan, monkeypatch):
    """The most bytes of activations and cotangents that a gradient held, looked at after every operation and step."""
    graph, highest = chain.traced, 0
    sweeps, kept, gone = [], [], set()
    released, begin = Activations.release, hzo.gradients.backward_sweep.Sweep.__init__

    def looking(self, graph, values):
        nonlocal highest
        present = {id(t): t.nbytes for state in sweeps for at in state.cotangents.values() for t in at.values()}
        for value, (tensor, about) in enumerate(zip(self.values, graph.values, strict=False)):
            made = tensor is not None and about.producer >= 0
            if made and about.batched and id(tensor) not in gone:
                present[value, "activation"] = tensor.nbytes
        highest = max(highest, sum(present.values()))
        released(self, graph, values)
        kept.extend(self.values[value] for value in values)  # no other tensor gets their identity
        gone.update(id(self.values[value]) for value in values if graph.values[value].batched)

    def noted(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        sweeps.append(self)

    with monkeypatch.context() as patched:
        patched.setattr(Activations, "release", looking)
        patched.setattr(hzo.gradients.backward_sweep.Sweep, "__init__", noted)
        outcome(chain, problem, plan, hzo.grad_and_value)
    assert graph.nominal_batch == plan.batch
    return highest


@pytest.mark.parametrize("name", CASES)
def test_predicted_bytes_are_held_bytes(name, monkeypatch):
    solved = solve(name)
    for tree in TREES:
        for scheme in ("central", "forward"):
            plan = hzo.plan(solved.chain, tree=tree, scheme=scheme)
            for each in (plan, on_path(solved.chain, plan)):
                assert held_at_most(solved.chain, solved.problem, each, monkeypatch) == each.activation_bytes


def test_bytes_of_a_chain_grow_with_the_logarithm_of_its_depth():
    """Every doubling adds one boundary to the spine and nothing else; all stored, it doubles."""
    plans = {depth: hzo.plan(plain(depth)) for depth in (8, 16, 32, 64, 128)}
    chains = {depth: plain(depth) for depth in plans}
    path = {depth: on_path(chains[depth], plans[depth]).activation_bytes for depth in plans}
    boundary = 2 * 4 * 8
    assert {path[b] - path[a] for a, b in pairwise(path)} == {boundary}
    assert all(plans[b].activation_bytes > 1.8 * plans[a].activation_bytes for a, b in pairwise(plans))


@pytest.mark.parametrize("tree", TREES)
def test_steps_keep_what_they_read_and_not_what_their_queries_make(tree):
    """A query over many stages reads what it perturbs; the operands inside are its own."""
    chain = plain(32)
    plan = on_path(chain, hzo.plan(chain, tree=tree, assume="nothing"))
    assert plan.activation_bytes <= 2 * 4 * 8 * (5 + 6 + 3)  # spine, pending cotangents, one stage


def test_predicted_bytes_are_allocated_bytes():
    """What a step works with is the same at every depth and either way; all else is as predicted.

    Frozen but for its first bias, the chain has no gradients to hold. Weights that are measured, and the like, take a
    few per cent of a boundary, and are there or not.
    """
    batch, width = 512, 16
    boundary = batch * width * 4
    beyond = []
    for depth in (8, 32):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))
        model.requires_grad_(False)
        model[0][0].bias.requires_grad_(True)
        x = torch.randn(batch, width)
        chain = hzo.trace(model, x)
        everything = hzo.plan(chain)
        for plan in (everything, on_path(chain, everything)):

            def gradient(chain=chain, x=x, plan=plan):
                hzo.grad_and_value(chain, F.mse_loss, x, x, plan=plan, memory=1)

            gradient()
            beyond.append((peak_of(gradient) - plan.activation_bytes) / boundary)
    assert max(beyond) - min(beyond) < 0.1
    assert 0 < min(beyond) < 12  # two perturbed copies, their results, differences in two forms, the step's own means


# ---- the choice --------------------------------------------------------------------------------------------------


def test_the_budget_chooses():
    chain = plain(32)
    everything = hzo.plan(chain)
    path = on_path(chain, everything)
    assert (everything.storage, everything.recomputed) == ("all", 0)
    assert hzo.plan(chain, memory=everything.activation_bytes) == everything
    assert hzo.plan(chain, memory=everything.activation_bytes - 1) == path
    assert hzo.plan(chain, memory=path.activation_bytes) == path
    assert path.recomputed == 2 * recurrence(32)
    with pytest.raises(PlanError) as error:
        hzo.plan(chain, memory=path.activation_bytes - 1)
    for needed in (everything.activation_bytes, path.activation_bytes):
        assert f"{needed:,} bytes" in str(error.value) or f"{needed:,} on a path" in str(error.value)
    for wrong in (0, -5):
        with pytest.raises(InputError, match="memory"):
            hzo.plan(chain, memory=wrong)
    assert f"path stored, at most {path.activation_bytes:,} bytes at once, {path.recomputed:,} stages run again" in str(
        path
    )


def test_a_plan_on_a_path_serves_other_batches_and_adds_up():
    chain = plain(8)
    model, x = chain.model, torch.randn(5, 4, dtype=torch.float64)
    plan = hzo.plan(chain, memory=on_path(chain, hzo.plan(chain)).activation_bytes)
    assert plan.storage == "path"
    for _ in range(2):
        hzo.backward(chain, F.mse_loss, x, x.sin(), plan=plan, memory=1)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    reference = copy.deepcopy(model)
    F.mse_loss(reference(x), x.sin()).backward()
    exact = {name: 2 * p.grad for name, p in reference.named_parameters()}
    assert oracles.worst(oracles.relative_errors(found, exact)) <= oracles.CENTRAL


def test_a_result_that_is_not_finite_is_named():
    chain = plain(8)
    plan = on_path(chain, hzo.plan(chain))
    with pytest.raises(NonFiniteError):
        hzo.backward(chain, lambda out, y: (out / 0).sum(1), torch.randn(2, 4, dtype=torch.float64), 0, plan=plan)

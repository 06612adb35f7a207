"""Gradients and cotangents against autograd in float64, over all networks of support/cases.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.plans import TREES
from support import oracles
from support.cases import CASES
from support.oracles import solve

TRIED = [*TREES, 3, 5]
ASSUME = ["nothing", "locality", "structure"]
SMOOTH = [name for name, case in CASES.items() if not case.kinks]
KINKED = [name for name, case in CASES.items() if case.kinks]


def tolerance(name):
    return oracles.KINKS if CASES[name].kinks else oracles.CENTRAL


@pytest.mark.parametrize("assume", ASSUME)
@pytest.mark.parametrize("tree", TRIED)
@pytest.mark.parametrize("name", CASES)
def test_parameter_gradients(name, tree, assume):
    solved = solve(name)
    found, loss = solved.estimate(hzo.plan(solved.chain, tree=tree, assume=assume))
    assert oracles.worst(oracles.relative_errors(found, solved.exact)) <= tolerance(name)
    torch.testing.assert_close(loss, solved.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tree", ["flat", "bisect", "planned"])
@pytest.mark.parametrize("name", SMOOTH)
def test_forward_differences(name, tree):
    solved = solve(name)
    found, _ = solved.estimate(hzo.plan(solved.chain, tree=tree, scheme="forward"))
    assert oracles.worst(oracles.relative_errors(found, solved.exact)) <= oracles.FORWARD


@pytest.mark.parametrize("tree", ["flat", "bisect", "stagewise", 3, "planned"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "frozen_start"])  # its BatchNorm forbids it
def test_cotangents_at_all_boundaries(name, tree):
    solved = solve(name)
    plan = hzo.plan(solved.chain, tree=tree, boundaries="all")
    found = solved.estimate(plan, hzo.cotangents)
    torch.manual_seed(oracles.SEED)
    exact = oracles.cotangents(solved.problem, solved.chain)
    assert len(found) == len(exact) == len(solved.chain) + 1
    for position, (estimates, references) in enumerate(zip(found, exact, strict=True)):
        if not any(g is not None for g in references):  # integers only
            assert estimates is None
            continue
        estimates = (estimates,) if isinstance(estimates, torch.Tensor) else estimates  # noqa: PLW2901
        scale = max(float(g.norm()) for g in references if g is not None)
        for estimate, reference in zip(estimates, references, strict=True):
            expected = 0.0 if reference is None else reference
            error = 0.0 if estimate is reference is None else float((estimate - expected).norm())
            assert error <= tolerance(name) * scale, f"boundary {position}"


def test_cotangents_are_those_of_retain_grad():
    """The plainest oracle there is, on a Sequential; the input's cotangent included."""
    problem = CASES["mlp"].build()
    activations = [problem.x.clone().requires_grad_()]
    for layer in problem.model:
        activations.append(layer(activations[-1]))
        activations[-1].retain_grad()
    F.cross_entropy(activations[-1], problem.y).backward()
    for estimate, activation in zip(hzo.cotangents(*problem), activations, strict=True):
        torch.testing.assert_close(estimate, activation.grad, rtol=oracles.CENTRAL, atol=1e-9)


def test_cotangents_with_a_plan_are_those_that_it_estimates():
    problem = CASES["mlp"].build()
    chain = hzo.trace(problem.model, problem.x)
    found = hzo.cotangents(chain, *list(problem)[1:], plan=hzo.plan(chain, tree="flat"))
    assert found[0] is None
    assert [g is None for g in found[1:]] == [k % 2 == 0 for k in range(1, len(chain))] + [False]


@pytest.mark.parametrize("name", KINKED)
def test_kinks_shrink_with_the_step(name):
    """A step as large as the activations crosses kinks; the error falls with it until it is gone."""
    solved = solve(name)

    def error(step):
        plan = hzo.plan(solved.chain, tree="bisect", assume="nothing", step=step)
        return oracles.worst(oracles.relative_errors(solved.estimate(plan)[0], solved.exact))

    errors = [error(step) for step in (1.0, 0.1, 1e-2, 1e-3, 1e-5)]
    assert errors[0] > errors[1] > errors[2] >= errors[3]
    assert errors[-1] <= oracles.CENTRAL


@pytest.mark.parametrize("seed", range(10))
def test_kinks_at_the_default_step(seed):
    """Whatever the weights: kinks within 6e-6 of the scale are rare and weigh little."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(12, 12), nn.ReLU())), nn.Linear(12, 3)).double()
    x, y = torch.randn(16, 12, dtype=torch.float64), torch.randint(3, (16,))
    found, _ = hzo.grad_and_value(model, F.cross_entropy, x, y, tree="bisect", assume="nothing")
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    assert oracles.worst(oracles.relative_errors(found, exact)) <= oracles.KINKS


@pytest.mark.parametrize("memory", [1, 2_000, 10**9])
def test_chunks_change_nothing(memory):
    solved = solve("dense_net")
    plan = hzo.plan(solved.chain, tree="bisect", assume="nothing")
    whole, _ = solved.estimate(plan)
    parts, _ = solved.estimate(plan, memory=memory)
    for name, gradient in whole.items():  # a matrix product may sum in another order for another batch
        torch.testing.assert_close(parts[name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "pooling", "attention", "dropout", "language"])
def test_batch_sizes_share_a_plan(name):
    """A plan made for one batch size serves another: one sample, and more than were traced."""
    case, problem = CASES[name], CASES[name].build()
    chain = hzo.trace(problem.model, problem.x)
    plan = hzo.plan(chain)
    for batch in (1, 7):
        x = torch.cat([problem.x] * batch)[-batch:]
        y = torch.arange(batch) % 3
        other = type(problem)(problem.model, problem.loss_fn, x, y)
        torch.manual_seed(oracles.SEED)
        found, _ = hzo.grad_and_value(chain, problem.loss_fn, x, y, plan=plan)
        torch.manual_seed(oracles.SEED)
        exact, _ = oracles.gradients(other)
        assert oracles.worst(oracles.relative_errors(found, exact)) <= tolerance(case.name)


def test_names_are_those_of_the_model():
    for name in ("language", "tied", "own_parameters", "several_inputs"):
        solved = solve(name)
        assert set(hzo.plan(solved.chain).trainable) == set(oracles.parameters_of(solved.problem))


def test_options_and_a_plain_module():
    """No chain, no plan: traced and planned on the first call, the second takes both from memory."""
    model, loss_fn, x, y = CASES["mlp"].build()
    with hzo.count_queries() as first:
        hzo.backward(model, loss_fn, x, y, tree="bisect", assume="nothing")
    with hzo.count_queries() as second:
        hzo.backward(model, loss_fn, x, y, tree="bisect", assume="nothing")
    assert first.queries == second.queries > 0
    assert first.check_evaluations > second.check_evaluations == 0


def test_gradients_own_their_memory():
    """Clipping scales in place: no two gradients may share memory, nor may any with an activation."""
    for name in CASES:
        found, _ = solve(name).estimate(hzo.plan(solve(name).chain))
        storages = [g.untyped_storage().data_ptr() for g in found.values()]
        assert len(set(storages)) == len(storages), name
        assert all(not g.requires_grad and not g.is_inference() for g in found.values())


def test_outputs_that_share_memory():
    """A result and a view of it are both alive where a node takes its differences."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.other = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(3, 1)

        def forward(self, x):
            whole = torch.tanh(self.first(x))
            halves = whole.view(-1, 2, 3)
            return self.last(whole) + self.other(halves).flatten(1)

    model, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    chain, y = hzo.trace(model, x), torch.tensor([0, 1, 0])
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for tree in ("flat", "stagewise", "bisect"):
        found, _ = hzo.grad_and_value(chain, F.cross_entropy, x, y, tree=tree, assume="nothing")
        for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_queries_that_hand_memory_through(scheme):
    """An operation may return an operand that no query moved: its memory belongs to the base pass."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            h, c = torch.tanh(self.first(x)), torch.tanh(self.second(x))
            u, v = torch.broadcast_tensors(torch.sigmoid(h), c)
            return self.last(u * v + v)

    model, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    chain, y = hzo.trace(model, x), torch.tensor([0, 1, 0])
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for tree in TRIED:
        plan = hzo.plan(chain, tree=tree, assume="nothing", scheme=scheme)
        found, _ = hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=plan, memory=1)
        for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"tree": "bisect"}])
def test_an_expanded_cotangent_is_copied_into_grad(options):
    """A cotangent may be a view that shows memory several times; what is handed to the user is not."""

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 3)

        def forward(self, x):
            return self.layer(x.sum(1, keepdim=True))

    model, y = Summed().double(), torch.arange(4) % 3
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # the second adds
        hzo.backward(model, F.cross_entropy, x, y, **options)
        nn.utils.clip_grad_norm_([x, *model.parameters()], 1e-3)
    assert x.grad.stride() == x.stride()

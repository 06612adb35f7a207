"""``hzo.declare``: what a user promises of a module of their own."""

import copy
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.declared import find_adjoint
from hzo.tracing.promises import declared, local_along
from support import oracles
from support.hardware import Opaque


def smooth(x):
    return torch.sin(x) + x


class Scale(nn.Module):
    """A module with a parameter that no table holds."""

    def __init__(self, features):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2, features))

    def forward(self, x):
        return x * self.gain + 0.1


class Mixing(nn.Module):
    """Affine over the last dimension, written in another way than torch's."""

    def __init__(self, inside, outside):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(inside, outside) / inside**0.5)

    def forward(self, x):
        return torch.einsum("...i,io->...o", x, self.matrix) - 1


class Own(nn.Module):
    """A convolution of the user's own."""

    def __init__(self, channels_in, channels_out, **options):
        super().__init__()
        self.inner = nn.Conv2d(channels_in, channels_out, 3, **options)

    def forward(self, x):
        return 2 * self.inner(x)


def space(low, high, stride=1):
    return hzo.Local(2, low, high, stride), hzo.Local(3, low, high, stride)


# module, promises, shape of a sample, how it is carried back, probe
DECLARED = {
    "elementwise": (lambda: Opaque(smooth), ["elementwise"], (4, 3), None),
    "diagonal": (lambda: Scale(3), ["elementwise", "affine"], (4, 3), "affine"),
    "affine": (lambda: Mixing(3, 5), ["affine"], (4, 3), "affine"),
    "tokens": (lambda: Mixing(3, 5), ["affine", "tokens"], (4, 3), "affine"),
    "tokens, one": (lambda: Mixing(3, 5), ["affine", "tokens"], (3,), "affine"),
    "reindexing": (lambda: Opaque(lambda x: x.flip(1).roll(1, 2)), ["reindexing"], (4, 3), "reindexing"),
    "stationary": (lambda: Own(2, 3, padding=1), ["affine", "stationary", *space(-1, 1)], (2, 5, 6), "stationary"),
    "strided": (
        lambda: Own(2, 3, stride=2, padding=1),
        ["affine", "stationary", *space(-1, 1, 2)],
        (2, 5, 6),
        "stationary",
    ),
    "depthwise": (
        lambda: Own(3, 3, padding=1, groups=3),
        ["affine", "stationary", hzo.Local(1), *space(-1, 1)],
        (3, 5, 4),
        "stationary",
    ),
    "dilated": (
        lambda: Own(2, 3, padding=2, dilation=2),
        ["affine", "stationary", *space(-2, 2)],
        (2, 6, 5),
        "stationary",
    ),
    "unpadded": (lambda: Own(2, 3), ["affine", "stationary", *space(0, 2)], (2, 5, 6), "stationary"),
    "nothing": (lambda: Opaque(lambda x: x.cumsum(1).tanh()), [], (4, 3), None),
}


def network(name):
    make, promises, shape, _ = DECLARED[name]
    own = hzo.declare(make(), *promises)
    features = own.double()(torch.zeros(1, *shape, dtype=torch.float64)).numel()
    width = shape[-1]
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), own, nn.Flatten(), nn.Linear(features, 3)).double()
    return model, torch.randn(3, *shape, dtype=torch.float64), torch.arange(3)


@pytest.mark.parametrize("name", DECLARED)
def test_gradients(name):
    """Whatever is declared, gradients are those of autograd, and the declaration passes its own check."""
    model, x, y = network(name)
    hzo.check_structure(model, x)
    for assume in ("nothing", "locality", "structure"):
        found, _ = hzo.grad_and_value(model, F.cross_entropy, x, y, assume=assume)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        exact = {name: p.grad for name, p in model.named_parameters()}
        assert oracles.worst(oracles.relative_errors(found, exact)) <= oracles.CENTRAL


@pytest.mark.parametrize("name", DECLARED)
def test_which_rule(name):
    model, x, _ = network(name)
    graph = hzo.trace(model, x).traced
    (op,) = (op for op in graph.operations if op.module is model[2])
    rule = find_adjoint(graph, op, op.reads[0])
    assert (rule.promise if rule else None) == DECLARED[name][3]


def test_what_declaring_saves():
    """Predicted and counted: an element at a time, a feature at a time, all at once."""
    x, y = torch.randn(5, 4, 3, dtype=torch.float64), torch.arange(5) % 3

    def measurements(*promises):
        own = hzo.declare(Mixing(3, 3), *promises)
        model = nn.Sequential(nn.Linear(3, 3), own, nn.Flatten(), nn.Linear(12, 3)).double()
        own.matrix.requires_grad_(False)
        chain = hzo.trace(model, x)
        plan = hzo.plan(chain)
        with hzo.count_queries() as count:
            hzo.backward(chain, F.cross_entropy, x, y, plan=plan)
        assert count.queries == plan.queries
        return count.queries - 13  # those of the last layer: twelve features and none

    assert measurements() == 5 * 2 * 12  # two for each element and sample
    assert measurements("affine") == 12 + 1  # the coordinates of one sample, and none
    assert measurements("affine", "tokens") == 1  # four impulses are four tokens: one sample


def test_declared_is_all_that_is_assumed():
    """Declaring speaks in place of the type, for the module itself, its copies, and nothing else."""
    layer = hzo.declare(nn.Linear(3, 3))
    other = copy.deepcopy(layer)
    assert declared(layer) == declared(other) == ()
    assert declared(nn.Linear(3, 3)) is None
    model = nn.Sequential(nn.Linear(3, 3), other).double()
    plan = hzo.plan(hzo.trace(model, torch.randn(2, 3, dtype=torch.float64)))
    assert [node.probe.kind for node in plan.nodes] == ["coordinate"]
    assert sum(probe.elements for probe in plan.perturbed) == 12
    hzo.declare(other, "affine")
    plan = hzo.plan(hzo.trace(model, torch.randn(2, 3, dtype=torch.float64)))
    assert [str(node.estimator) for node in plan.nodes] == ["adjoint (affine)"]


def test_declaring_anew_traces_anew():
    model = nn.Sequential(nn.Linear(3, 3), Opaque(smooth), nn.Linear(3, 2)).double()
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.arange(2)

    def queries():
        with hzo.count_queries() as count:
            hzo.backward(model, F.cross_entropy, x, y)
        return count.queries

    before = queries()
    hzo.declare(model[1], "elementwise")
    assert queries() == before - 2 * 2 * 2  # one direction in place of three, central, two samples


def test_a_container_is_one_operation():
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), hzo.declare(inner)).double()
    graph = hzo.trace(model, torch.randn(2, 4, dtype=torch.float64)).traced
    assert [op.module for op in graph.operations if op.batched] == [None, model[1]]


def test_unknown_promises():
    with pytest.raises(hzo.errors.InputError, match="affine, tokens, reindexing, symmetric, stationary and"):
        hzo.declare(nn.Identity(), "linear")
    with pytest.raises(hzo.errors.InputError, match="expected an nn"):
        hzo.declare(torch.tanh, "elementwise")
    with pytest.raises(hzo.errors.InputError, match="batch"):
        hzo.declare(nn.Identity(), hzo.Local(0))
    with pytest.raises(hzo.errors.InputError, match="low ≤ high"):
        hzo.declare(nn.Identity(), hzo.Local(1, 1, 0))
    with pytest.raises(hzo.errors.InputError, match="3 axes"):
        local_along([hzo.Local(3)], 3)


@pytest.mark.parametrize(
    ("local", "inputs", "outputs", "rows"),
    [
        (hzo.Local(1), 3, 3, [{0}, {1}, {2}]),
        (hzo.Local(1, -1, 1), 4, 4, [{0, 1}, {0, 1, 2}, {1, 2, 3}, {2, 3}]),
        (hzo.Local(1, 0, 1, 2), 5, 2, [{0, 1}, {2, 3}]),
        (hzo.Local(1, Fraction(-1, 2), 0, Fraction(1, 2)), 2, 4, [{0}, {0}, {1}, {1}]),
        (hzo.Local(1, 5, 6), 3, 2, [set(), set()]),
        (hzo.Local(1, -6, -5), 3, 2, [set(), set()]),
    ],
)
def test_matrix_of_a_local(local, inputs, outputs, rows):
    found = [{i for i in range(inputs) if row >> i & 1} for row in local.matrix(inputs, outputs)]
    assert found == rows


def test_locality_reaches_the_plan():
    """Tokens that do not mix are perturbed at once, where a plan assumes locality."""
    own = hzo.declare(Opaque(lambda x: (x + x.roll(1, 2)).tanh()), hzo.Local(1))
    model = nn.Sequential(nn.Linear(3, 3), own, nn.Linear(3, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.arange(2)
    hzo.check_structure(model, x)
    plan = hzo.plan(hzo.trace(model, x), assume="locality", boundaries="all")
    graph = hzo.trace(model, x).traced
    (node,) = (n for n in plan.nodes if own in {graph.operations[k].module for k in n.operations})
    assert node.probe.directions == 3  # features; four tokens at once
    found, _ = hzo.grad_and_value(model, F.cross_entropy, x, y, plan=plan)
    F.cross_entropy(model(x), y).backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    assert oracles.worst(oracles.relative_errors(found, exact)) <= oracles.CENTRAL

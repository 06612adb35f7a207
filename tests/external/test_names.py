"""State in variables: closed over, global, attributes of functions, slots, defaults, queues, generators."""

import itertools
import random
from collections import deque

import numpy as np
import pytest
import torch

import hzo
from hzo.errors import NondeterministicError
from support.boxes import TOLERANCE
from support.oracles import normal

MEMBRANE = 0.0
FIELD = np.zeros((5, 4))
NUMPY, PYTHON = np.random.default_rng(0), random.Random(0)


def rebinds_a_global(x):
    global MEMBRANE  # noqa: PLW0603
    MEMBRANE = 0.5 * MEMBRANE + x
    return np.sin(MEMBRANE)


class Rebinds:
    def __call__(self, x):
        return rebinds_a_global(x)


def drives(x):
    FIELD[...] = 0.5 * FIELD + x


def writes_into_a_global(x):
    drives(x)  # two functions that name one array
    return np.sin(FIELD)


def closure():
    v = 0.0

    def moves(x):
        nonlocal v
        v = 0.5 * v + x

    def f(x):
        moves(x)
        return np.sin(v)

    return f


def attribute():
    def f(x):
        f.v = 0.5 * f.v + x
        return np.sin(f.v)

    f.v = 0.0
    return f


class InSlots:
    __slots__ = ("v",)

    def __init__(self):
        self.v = 0.0

    def __call__(self, x):
        self.v = 0.5 * self.v + x
        return np.sin(self.v)


class InQueue:
    def __init__(self):
        self.line = deque([np.zeros((5, 4))], maxlen=1)

    def __call__(self, x):
        self.line.append(0.5 * self.line[0] + x)
        return np.sin(self.line[0])


def default():
    def f(x, line=[0.0]):  # noqa: B006
        line[0] = 0.5 * line[0] + x
        return np.sin(line[0])

    return f


def exact(x):
    v = x
    first = v.sin()
    return (first * (0.5 * v + 2 * x).sin()).sum()


@pytest.mark.parametrize(
    "make",
    [lambda: rebinds_a_global, Rebinds, lambda: writes_into_a_global, closure, attribute, InSlots, InQueue, default],
)
def test_gradients_flow_through_it(make):
    global MEMBRANE
    MEMBRANE, FIELD[...] = 0.0, 0.0
    box, x = hzo.blackbox(make(), numpy=True), normal(5, 4).requires_grad_()
    y = (box(x) * box(2 * x)).sum()
    assert torch.allclose(y, exact(x))
    (found,), (reference,) = torch.autograd.grad(y, x), torch.autograd.grad(exact(x), x)
    assert torch.allclose(found, reference, rtol=TOLERANCE)
    with torch.no_grad():  # the third call goes on from the second
        assert torch.allclose(box(x), torch.sin(0.5 * (0.5 * x + 2 * x) + x))


def test_a_forward_pass_moves_it_on_once():
    v = 0.0

    def f(x):
        nonlocal v
        v = v + 1.0
        return x * v

    x = normal(5, 4).requires_grad_()
    hzo.blackbox(f)(x).sum().backward()
    assert v == 1.0
    assert torch.allclose(x.grad, torch.ones_like(x), rtol=TOLERANCE)


@pytest.mark.parametrize("numpy", [True, False])
def test_generators_that_are_global(numpy):
    def draw():
        return NUMPY.normal() if numpy else PYTHON.random()

    x = normal(5, 4).requires_grad_()
    y = hzo.blackbox(lambda a: np.sin(a) * draw(), numpy=True)(x)
    y.sum().backward()
    assert torch.allclose(x.grad, (y / x.sin() * x.cos()).detach(), rtol=TOLERANCE)


def test_an_iterator_is_not_seen_and_said_so():
    steps, x = itertools.count(1), normal(5, 4).requires_grad_()
    with pytest.raises(NondeterministicError, match="state that hzo cannot see"):
        hzo.blackbox(lambda a: a * next(steps))(x).sum().backward()


def test_numbers_that_a_part_returns_are_double():
    box, x = hzo.blackbox(lambda v: float(np.sum(v**3)), numpy=True), normal(5).requires_grad_()
    box(x).backward()
    assert torch.allclose(x.grad, 3 * x.detach() ** 2, rtol=TOLERANCE)


class TestScratch:
    """What is written before it is read is no state: calls are folded, and may be split."""

    def part(self, kind):
        memory, log = np.empty((100, 4)), []

        def buffer(x):
            found = memory[: len(x)]
            np.copyto(found, np.sin(x) * x.sum(-1, keepdims=True))
            return found

        def logs(x):
            log.append(float(np.abs(x).mean()))
            return np.sin(x) * x.sum(-1, keepdims=True)

        class Last:
            def __init__(self):
                self.seen = None

            def __call__(self, x):
                self.seen = x
                return np.sin(x) * x.sum(-1, keepdims=True)

        return {"buffer": buffer, "logs": logs, "last": Last()}[kind]

    @pytest.mark.parametrize("batched", [True, 2])
    @pytest.mark.parametrize("kind", ["buffer", "logs", "last"])
    def test_is_no_state(self, kind, batched):
        box, x = hzo.blackbox(self.part(kind), numpy=True, batched=batched), normal(6, 4).requires_grad_()
        box(x)
        y = box(x)
        (found,) = torch.autograd.grad(y.sum(), x)
        (reference,) = torch.autograd.grad((x.sin() * x.sum(1, keepdim=True)).sum(), x)
        assert torch.allclose(found, reference, rtol=TOLERANCE)
        assert box.plan_for(x).calls == (3 if batched is True else 3 + 2 * 12)

    def test_what_a_later_call_reads_is_state(self):
        """A threshold that does not yet show what it remembers."""

        class Neuron:
            def __init__(self):
                self.v = torch.zeros(5, 4, dtype=torch.float64)

            def __call__(self, x):
                self.v = 0.9 * self.v + x.abs() / 10
                return torch.where(self.v > 0.5, self.v**2, 0.0)

        part = Neuron()
        box, x = hzo.blackbox(part), (1 + normal(5, 4).abs()).requires_grad_()
        v, total = 0.0, 0.0
        for _ in range(8):
            v = 0.9 * v + x.abs() / 10
            total = total + torch.where(v > 0.5, v**2, 0.0).sum()
        (found,) = torch.autograd.grad(sum(box(x).sum() for _ in range(8)), x)
        (reference,) = torch.autograd.grad(total, x)
        assert torch.allclose(found, reference, rtol=TOLERANCE)


class TestClocks:
    """Whole numbers that a part counts in."""

    class Environment:
        def __init__(self):
            self.t, self.x, self.calls = 0, np.zeros((4, 2)), []

        def step(self, a):
            self.t += 1
            self.x = 0.9 * self.x + np.tanh(a)
            self.calls.append(len(a))
            return self.x.copy(), self.t >= 3, {"t": self.t}

    def test_go_back_where_they_come_out(self):
        env = self.Environment()
        box, x = hzo.blackbox(env.step, numpy=True), normal(4, 2).requires_grad_()
        for t in (1, 2, 3):
            y, done, info = box(x)
            assert info["t"] == t
            assert done == (t >= 3)
        y.sum().backward()
        assert env.t == 3

    def test_count_queries_where_they_do_not(self):
        calls, x = 0, normal(4, 2).requires_grad_()

        def f(z):
            nonlocal calls
            calls += 1
            return z.sin()

        box = hzo.blackbox(f)
        box(x)
        before = calls
        box(x).sum().backward()
        assert calls - before == 1 + box.plan_for(x).calls


def test_arrays_of_other_libraries():
    class Foreign:
        def __init__(self, values):
            self.values, self.dtype = values, values.dtype

        def __array__(self, dtype=None, copy=None):
            return self.values

    x = normal(4, 2).requires_grad_()
    hzo.blackbox(lambda z: {"y": Foreign(np.sin(z))}, numpy=True)(x)["y"].sum().backward()
    assert torch.allclose(x.grad, x.detach().cos(), rtol=TOLERANCE)

"""Parts that remember: queries start where the forward pass did, which moves the state on once."""

import functools
import pickle
import random
import types
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

import hzo
from hzo.errors import HzoError, InputError, NondeterministicError, QueryError
from support.boxes import TOLERANCE
from support.oracles import normal


class Plain:
    def __init__(self):
        self.v = None

    def __call__(self, x):
        self.v = np.sin(x) if self.v is None else 0.8 * self.v + np.sin(x)
        return np.tanh(self.v) * self.v


class InPlace:
    """A view of its memory must stay one."""

    def __init__(self):
        self.v = np.zeros((5, 4))
        self.top = self.v[:2]

    def __call__(self, x):
        self.v *= 0.8
        self.v += np.sin(x)
        assert np.shares_memory(self.top, self.v)
        return np.tanh(self.v) * self.v


class InDict:
    def __init__(self):
        self.memory = {"v": 0.0, "log": []}

    def __call__(self, x):
        self.memory["v"] = 0.8 * self.memory["v"] + np.sin(x)
        return np.tanh(self.memory["v"]) * self.memory["v"]


class InList:
    def __init__(self):
        self.h = [np.zeros((5, 4)), 0]

    def __call__(self, x):
        self.h[0] = 0.8 * self.h[0] + np.sin(x)
        return np.tanh(self.h[0]) * self.h[0]


class Wrapped:
    def __init__(self):
        self.inner = Plain()

    def step(self, x):
        return self.inner(x)


class Buffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("v", torch.zeros(5, 4, dtype=torch.float64))

    def forward(self, x):
        self.v = 0.8 * self.v + x.sin()
        return torch.tanh(self.v) * self.v


class Attribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = None

    def forward(self, x):
        self.v = x.sin() if self.v is None else 0.8 * self.v + x.sin()
        return torch.tanh(self.v) * self.v


class InTuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = (0.0, 0)

    def forward(self, x):
        v = 0.8 * self.v[0] + x.sin() if isinstance(self.v[0], torch.Tensor) else x.sin()
        self.v = (v, self.v[1] + 1)
        return torch.tanh(v) * v


PARTS = {
    "attribute": (Plain, True, lambda part: part),
    "in place": (InPlace, True, lambda part: part),
    "dict": (InDict, True, lambda part: part),
    "list": (InList, True, lambda part: part),
    "method of an object in an object": (Wrapped, True, lambda part: part.step),
    "closure": (Plain, True, lambda part: lambda x: 1.0 * part(x)),
    "partial": (Plain, True, lambda part: functools.partial(part.__call__)),
    "buffer": (Buffer, False, lambda part: part),
    "attribute of a module": (Attribute, False, lambda part: part),
    "module in a closure": (Attribute, False, lambda part: lambda x: 1.0 * part(x)),
    "tuple": (InTuple, False, lambda part: part),
}


def exact(x, steps):
    v, total = 0, 0
    for k in range(steps):
        v = 0.8 * v + x.sin()
        total = total + (k + 1) * torch.tanh(v) * v
    return total.sum()


@pytest.mark.parametrize("name", PARTS)
def test_gradients_flow_through_time(name):
    make, numpy, reach = PARTS[name]
    box = hzo.blackbox(reach(make()), numpy=numpy)
    x = normal(5, 4).requires_grad_()
    total = sum((k + 1) * box(x) for k in range(3)).sum()
    assert torch.allclose(total, exact(x, 3))
    (found,), (reference,) = torch.autograd.grad(total, x), torch.autograd.grad(exact(x, 3), x)
    assert torch.allclose(found, reference, rtol=TOLERANCE)
    # The backward pass has left the state as it was: the fourth call goes on from the third.
    with torch.no_grad():
        after = box(x).sum()
    assert torch.allclose(4 * after, exact(x, 4) - exact(x, 3))


def test_on_the_tape():
    box, p = hzo.blackbox(Plain(), numpy=True), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = normal(5, 4)
    for steps in range(2):
        with hzo.record() as step:
            loss = (box(x * p) + 2 * box(x * p)).sum()
        step.backward(loss)
        if steps == 0:
            (reference,) = torch.autograd.grad(exact(x * p, 2), p)
            assert torch.allclose(p.grad, reference, rtol=TOLERANCE)


class Hidden:
    """Its state is where nobody looks."""

    def __init__(self):
        self.save, self.load, self.call = self.made()

    @staticmethod
    def made():
        memory = bytearray(np.zeros((5, 4)).tobytes())  # stands for a library in C, or another process

        def save():
            return {"v": np.frombuffer(memory).reshape(5, 4).copy()}

        def load(saved):
            memory[:] = saved["v"].tobytes()

        def call(x):
            v = 0.8 * save()["v"] + np.sin(x)
            load({"v": v})
            return np.tanh(v) * v

        return save, load, call


class TestHooks:
    @pytest.mark.parametrize("as_object", [False, True])
    def test_numbers(self, as_object):
        part = Hidden()
        box = hzo.blackbox(part.call, numpy=True, batched=False, state=part if as_object else (part.save, part.load))
        x = normal(5, 4).requires_grad_()
        (found,) = torch.autograd.grad(sum((k + 1) * box(x) for k in range(3)).sum(), x)
        (reference,) = torch.autograd.grad(exact(x, 3), x)
        assert torch.allclose(found, reference, rtol=TOLERANCE)

    def test_what_is_no_number_ends_the_gradient_by_word_only(self):
        part = Hidden()
        box = hzo.blackbox(
            part.call,
            numpy=True,
            batched=False,
            state=(lambda: pickle.dumps(part.save()), lambda saved: part.load(pickle.loads(saved))),
        )
        x = normal(5, 4).requires_grad_()
        (found,) = torch.autograd.grad(box(x).sum(), x)
        (reference,) = torch.autograd.grad(exact(x, 1), x)
        assert torch.allclose(found, reference, rtol=TOLERANCE)
        box(x)
        with pytest.raises(InputError, match=r"keeps a state.*detach_state\(\)"):
            box(x)
        box.detach_state()
        box(x)

    def test_without_them_it_is_found_out(self):
        part, x = Hidden(), normal(5, 4).requires_grad_()
        for batched in (False, True):
            with pytest.raises(NondeterministicError, match=r"state that hzo cannot see.*state=\(save, load\)"):
                hzo.blackbox(part.call, numpy=True, batched=batched)(x).sum().backward()


class Environment:
    """Moves on with a clock and a counter, all of which matter."""

    def __init__(self):
        self.q, self.t, self.n = np.zeros((5, 4)), 0.0, 0

    def step(self, a):
        self.t += 0.1
        self.n += 1
        self.q = self.q + a * np.cos(self.t) + self.n * a
        return self.q * np.sin(self.t)


def test_a_clock_and_a_counter_cost_no_sample_by_sample_queries():
    env = Environment()
    box, a = hzo.blackbox(env.step, numpy=True, elementwise=True), normal(5, 4).requires_grad_()
    total = sum(box(a) for _ in range(3)).sum()
    assert env.n == 3
    with hzo.count_queries() as count:
        total.backward()
    assert count.queries <= 3 * (2 + 2 + 2) * 5
    q, y = 0, 0
    for k in (1, 2, 3):
        q = q + a * np.cos(0.1 * k) + k * a
        y = y + q * np.sin(0.1 * k)
    (reference,) = torch.autograd.grad(y.sum(), a)
    assert torch.allclose(a.grad, reference, rtol=TOLERANCE)


def test_a_counter_that_matters_once_there_is_something_to_count():
    """At the first call nothing shows of it; the second must find it as the first had left it."""

    class Weighing:
        def __init__(self):
            self.n, self.log = 0, []

        def __call__(self, x):
            self.n += 1
            y = np.sin(x) + self.n * sum(self.log)
            self.log.append(float(x.sum()))
            return y

    part, x = Weighing(), normal(5, 4).requires_grad_()
    box = hzo.blackbox(part, numpy=True)
    box(x)
    assert part.n == 1
    out = box(x)
    assert torch.allclose(out, torch.sin(x) + 2 * x.sum())
    out.sum().backward()
    assert torch.allclose(x.grad, torch.cos(x) + 2 * x.numel(), rtol=1e-3)
    assert part.n == 2


class Counting:
    """A schedule: what comes out depends on how often it was called."""

    def __init__(self):
        self.n, self.fails = 0, False

    def __call__(self, x):
        self.n += 1
        if self.fails:
            raise KeyError("as it says")
        return x.sin() * self.n


def test_a_counter_alone_carries_no_gradient_from_call_to_call():
    part, x = Counting(), normal(5, 4).requires_grad_()
    box = hzo.blackbox(part)
    sum(box(x) for _ in range(3)).sum().backward()
    assert part.n == 3
    assert torch.allclose(x.grad, 6 * x.cos(), rtol=TOLERANCE)


@pytest.mark.parametrize("held", [[0], {"n": 0}, [[0, "a schedule"]]], ids=["a list", "a dict", "a list of lists"])
def test_a_counter_in_a_container_that_matters_later(held):
    """One more call changes nothing, and after three the slope is another one."""

    def scheduled(x):
        inner = held if isinstance(held, dict) or not isinstance(held[0], list) else held[0]
        inner["n" if isinstance(inner, dict) else 0] += 1
        return x * (1 + inner["n" if isinstance(inner, dict) else 0] // 3)

    box = hzo.blackbox(scheduled)
    for step in range(1, 7):
        x = normal(5, 4).requires_grad_()
        box(x).sum().backward()
        assert torch.allclose(x.grad, torch.full_like(x, 1 + step // 3), rtol=TOLERANCE), step


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("calls", [0, 2])
def test_a_call_that_fails_moves_nothing_on(calls, grad):
    """A membrane from the first call on, a whole number as soon as it is known that it is no mere count of calls."""

    class Both(Counting):
        def __init__(self):
            super().__init__()
            self.v = torch.zeros(5, 4, dtype=torch.float64)

        def __call__(self, x):
            self.v = self.v + 1
            return super().__call__(x) + self.v

    part, x = Both(), normal(5, 4).requires_grad_(grad)
    box = hzo.blackbox(part)
    for _ in range(calls):
        box(x)
    part.fails = True
    with pytest.raises(QueryError, match="as it says"):
        box(x)
    assert bool((part.v == calls).all())
    assert part.n == calls or not calls
    part.fails = False
    assert torch.allclose(box(x), x.sin() * part.n + calls + 1)


class TestHistory:
    def test_ends_where_a_backward_pass_has_been(self):
        """As training goes on step by step, each step's gradient is its own."""
        box = hzo.blackbox(Plain(), numpy=True)
        for _ in range(3):
            x = normal(5, 4).requires_grad_()
            box(x).sum().backward()
            assert x.grad is not None

    @pytest.mark.parametrize("how", ["anew", "in place"])
    def test_ends_where_the_state_is_reset(self, how):
        part = Buffer()
        box, x = hzo.blackbox(part), normal(5, 4).requires_grad_()
        first = box(x)
        if how == "anew":
            part.v = torch.zeros_like(part.v)
        else:
            part.v.zero_()
        second = box(x)
        assert torch.allclose(first, second)
        (found,) = torch.autograd.grad(second.sum(), x)
        (reference,) = torch.autograd.grad(exact(x, 1), x)
        assert torch.allclose(found, reference, rtol=TOLERANCE)

    def test_what_is_remembered_and_never_read_costs_a_test_alone(self):
        class Watching(nn.Module):
            def __init__(self):
                super().__init__()
                self.last = None

            def forward(self, x):
                self.last = x.sin()
                return x.cos()

        box, x = hzo.blackbox(Watching()), normal(5, 4).requires_grad_()
        with hzo.count_queries() as count:
            (box(x) + box(x)).sum().backward()
        assert count.queries == 2 * (2 * 5 * 4)


class Threshold:
    """Below its threshold a repeat shows nothing of the state, and queries that went on from it would be wrong."""

    def __init__(self):
        self.v = np.zeros((5, 4))

    def __call__(self, x):
        self.v = 0.5 * self.v + x
        fired = self.v > 1.0
        self.v = self.v * (1 - fired)
        return fired


def test_a_state_that_does_not_show():
    part, x = Threshold(), torch.full((5, 4), 0.8, dtype=torch.float64, requires_grad=True)
    hzo.blackbox(part, numpy=True, elementwise=True, step=0.5)(x).sum().backward()
    assert torch.allclose(x.grad, torch.ones_like(x))
    assert np.allclose(part.v, 0.8)


class TestNoiseIsNoState:
    @pytest.mark.parametrize("noise", ["measured", 0.01])
    def test_queries_start_where_the_forward_pass_did(self, noise):
        env = Environment()
        a = normal(5, 4).requires_grad_()
        box = hzo.blackbox(env.step, numpy=True, batched=5, noise=noise)
        box(a).sum().backward()
        assert env.n == 1
        assert torch.allclose(a.grad, torch.full_like(a, (np.cos(0.1) + 1) * np.sin(0.1)), rtol=1e-2)

    def test_a_term_is_never_left_out(self):
        box, x = hzo.blackbox(Plain(), numpy=True, noise=0.01), normal(5, 4).requires_grad_()
        box(x)
        with pytest.raises(HzoError, match="A state is no noise"):
            box(x)


class TestRandomNumbers:
    def test_of_a_generator_of_its_own(self):
        class Chip:
            def __init__(self):
                self.generator = np.random.default_rng(0)

            def __call__(self, x):
                return np.sin(x) * (1 + self.generator.normal(size=x.shape))

        chip, x = Chip(), normal(5, 4).requires_grad_()
        y = hzo.blackbox(chip, numpy=True)(x)
        y.sum().backward()
        assert torch.allclose(x.grad, (y / x.sin() * x.cos()).detach(), rtol=TOLERANCE)
        other = np.random.default_rng(0)
        other.normal(size=(5, 4))
        assert chip.generator.normal() == other.normal()  # drawn once

    @pytest.mark.parametrize("draw", [np.random.normal, random.random])
    def test_of_global_generators(self, draw):
        np.random.seed(0)
        x = normal(5, 4).requires_grad_()
        y = hzo.blackbox(lambda a: np.sin(a) * draw(), numpy=True)(x)
        after = draw()
        y.sum().backward()
        assert torch.allclose(x.grad, (y / x.sin() * x.cos()).detach(), rtol=TOLERANCE)
        assert after != draw()


def test_nothing_holds_on_to_a_graph_that_no_state_needs():
    import gc
    import weakref

    box, x = hzo.blackbox(np.sin, numpy=True), normal(5, 4).requires_grad_()
    y = box(x)
    node = weakref.ref(y.grad_fn)
    del y
    gc.collect()
    assert node() is None


class Shared:
    """Two instruments on one plant."""

    def __init__(self, lib):
        self.lib, self.v = lib, 0.0

    def push(self, x):
        self.v = self.v + x
        return self.lib.sin(self.v)

    def scale(self, x):
        self.v = self.v * x
        return self.lib.cos(self.v)


class TestTwoBoxesOfOneState:
    @staticmethod
    def total(push, scale, x):
        return (push(x) + scale(2 * x) + push(x) * scale(x)).sum()

    def test_gradients_flow_from_one_to_the_other(self):
        part, plain = Shared(np), Shared(torch)
        push, scale = (hzo.blackbox(f, numpy=True) for f in (part.push, part.scale))
        x = normal(5, 4).requires_grad_()
        (found,) = torch.autograd.grad(self.total(push, scale, x), x)
        (reference,) = torch.autograd.grad(self.total(plain.push, plain.scale, x), x)
        assert torch.allclose(found, reference, rtol=TOLERANCE)
        assert torch.allclose(torch.from_numpy(part.v), plain.v)

    def test_either_ends_them(self):
        part = Shared(np)
        push, scale = (hzo.blackbox(f, numpy=True) for f in (part.push, part.scale))
        x = normal(5, 4).requires_grad_()
        push(x)
        scale.detach_state()
        (found,) = torch.autograd.grad(scale(2 * x).sum(), x)
        assert torch.allclose(found, -2 * x * torch.sin(2 * x * x), rtol=TOLERANCE)


PLANT = {"v": 0.0}
level = 0.0


def push_global(x):
    global level  # noqa: PLW0603
    level = level + x
    return torch.sin(level)


def scale_global(x):
    global level  # noqa: PLW0603
    level = level * x
    return torch.cos(level)


def reset_global():
    global level  # noqa: PLW0603
    level = torch.zeros(5, 4, dtype=torch.float64)


def push_dict(x):
    PLANT["v"] = PLANT["v"] + x
    return torch.sin(PLANT["v"])


def scale_dict(x):
    PLANT["v"] = PLANT["v"] * x
    return torch.cos(PLANT["v"])


def reset_dict():
    PLANT["v"] = torch.zeros(5, 4, dtype=torch.float64)


def closed_over():
    v = torch.zeros(5, 4, dtype=torch.float64)

    def push(x):
        nonlocal v
        v = v + x
        return torch.sin(v)

    def scale(x):
        nonlocal v
        v = v * x
        return torch.cos(v)

    def reset():
        nonlocal v
        v = torch.zeros(5, 4, dtype=torch.float64)

    return push, scale, reset


def in_a_module():
    code = (
        "def push(x):\n    plant.v = plant.v + x\n    return torch.sin(plant.v)\n"
        "def scale(x):\n    plant.v = plant.v * x\n    return torch.cos(plant.v)\n"
    )
    plant, instruments = types.ModuleType("plant"), types.ModuleType("instruments")
    vars(instruments).update(plant=plant, torch=torch)
    exec(code, vars(instruments))

    def reset():
        plant.v = torch.zeros(5, 4, dtype=torch.float64)

    return instruments.push, instruments.scale, reset


def in_a_class():
    class Plant:
        v = None

        @classmethod
        def push(cls, x):
            cls.v = cls.v + x
            return torch.sin(cls.v)

        def scale(self, x):
            Plant.v = self.v * x
            return torch.cos(self.v)

    def reset():
        Plant.v = torch.zeros(5, 4, dtype=torch.float64)

    return Plant.push, Plant().scale, reset


VARIABLES = {
    "of a module": in_a_module,
    "of a class": in_a_class,
    "a global variable": lambda: (push_global, scale_global, reset_global),
    "a global dict": lambda: (push_dict, scale_dict, reset_dict),
    "a variable that both close over": closed_over,
}


@pytest.mark.parametrize("name", VARIABLES)
def test_two_boxes_of_one_variable(name):
    push, scale, reset = VARIABLES[name]()
    x, total = normal(5, 4).requires_grad_(), TestTwoBoxesOfOneState.total
    reset()
    (reference,) = torch.autograd.grad(total(push, scale, x), x)
    reset()
    (found,) = torch.autograd.grad(total(hzo.blackbox(push), hzo.blackbox(scale), x), x)
    assert float((found - reference).norm()) <= TOLERANCE * float(reference.norm())


def written_in_place():
    buffer = torch.zeros(5, 4, dtype=torch.float64)

    def write(x):
        buffer.copy_(2 * x)
        return x.sin()

    return write, lambda x: x * buffer


def written_to_a_class():
    class Plant:
        v = None

        @classmethod
        def write(cls, x):
            cls.v = 2 * x
            return x.sin()

        @classmethod
        def read(cls, x):
            return x * cls.v

    return Plant.write, Plant.read


@pytest.mark.parametrize("made", [written_in_place, written_to_a_class])
def test_what_another_part_reads_is_no_scratch(made):
    """Whoever writes it never reads it; taken alone, it would be a log."""
    write, read = (hzo.blackbox(f, batched=False) for f in made())
    x = normal(5, 4).requires_grad_()
    (found,) = torch.autograd.grad((write(x) + read(3 * x)).sum(), x)
    exact = x.cos() + 12 * x
    assert float((found - exact).norm()) <= TOLERANCE * float(exact.norm())


def appended(made):
    """Functions of a list, a deque or a dict that is empty before the first call."""
    held = made()

    def write(x):
        held.update({len(held): x.sin()}) if isinstance(held, dict) else held.append(x.sin())
        return 2 * x

    return write, lambda x: x * sum(held.values() if isinstance(held, dict) else held)


def a_whole_number_at_first(made):
    class Sum:
        def __init__(self):
            self.v = made()

        def write(self, x):
            self.v = self.v / 2 + x.sin()
            return 2 * x

        def read(self, x):
            return x * self.v

    part = Sum()
    return part.write, part.read


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize(
    ("of", "made"),
    [(appended, list), (appended, deque), (appended, dict), (a_whole_number_at_first, int)],
    ids=["list", "deque", "dict", "number"],
)
def test_what_is_no_number_until_the_first_call(of, made, calls):
    """An empty list, or a zero, looks like a mere counter, which queries need not put back."""
    x = normal(5, 4).requires_grad_()

    def gradient(wrap):
        write, read = map(wrap, of(made))
        return torch.autograd.grad(sum(write((k + 1) * x).sum() for k in range(calls)) + read(x).sum(), x)[0]

    exact = gradient(lambda f: f)
    assert float((gradient(hzo.blackbox) - exact).norm()) <= TOLERANCE * float(exact.norm())

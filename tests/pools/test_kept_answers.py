"""Answers that came before an error: a gradient that is tried again asks for what is missing, and for no less."""

import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from threading import Lock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import NondeterministicError, NonFiniteError, QueryError, QueryTimeoutError
from hzo.pools import Pool, one_gradient
from hzo.pools.kept_answers import KeptAnswers, questions
from support.oracles import normal

CALLS = {"a model": 52, "a box": 56, "a list": 56, "a recording": 56}
"""Of one gradient, one sample each: forward pass, perhaps a test that it repeats, and 2 · 6 queries of four samples."""


class Part:
    """Counts what it is asked, and does something else in one of its calls. Told apart from others by ``version``."""

    asked: list[bytes] = []  # noqa: RUF012  # of the class: an instance that changes is another part
    spoil = 10**9
    trouble = staticmethod(lambda z: None)
    lock = Lock()

    def __init__(self, version=1.0):
        self.version = version

    def __call__(self, z):
        with Part.lock:
            Part.asked.append(z.tobytes())
            spoiled = len(Part.asked) == Part.spoil
        found = Part.trouble(z) if spoiled else None
        return self.version * np.sin(z) * z.sum(-1, keepdims=True) if found is None else found


def fails(z):
    raise ValueError("once")


def interrupted(answers):
    raise KeyboardInterrupt


def hangs(z):
    time.sleep(1.0)


@pytest.fixture(autouse=True)
def _whole():
    yield
    Part.asked, Part.spoil, Part.trouble = [], 10**9, staticmethod(lambda z: None)


def of(shape, part=None, **options):
    """A function that takes a gradient of a layer before a box, and the box."""
    torch.manual_seed(0)
    layer, x, y = nn.Linear(6, 6).double(), normal(4, 6), normal(4, 6)
    box = hzo.blackbox(part or Part(), numpy=True, batched=1, state=None, **options)
    model = nn.Sequential(layer, hzo.blackbox([box, torch.tanh]) if shape == "a list" else box)

    def gradient():
        Part.asked = []
        layer.zero_grad()
        if shape == "a model":
            hzo.backward(model, F.mse_loss, x, y)
        elif shape == "a recording":
            with hzo.record() as tape:
                loss = F.mse_loss(model(x), y)
            tape.backward(loss)
        else:
            F.mse_loss(model(x), y).backward()
        return layer.weight.grad

    gradient.layer = layer
    gradient()  # what a first pass tests is known
    expected = gradient()
    assert len(Part.asked) == CALLS[shape]
    return gradient, box, expected


def spoil(gradient, at, trouble=fails, error=QueryError, **named):
    """Have a gradient fail; how many answers were there before."""
    Part.spoil, Part.trouble = at, staticmethod(trouble)
    with pytest.raises(error, **named):
        gradient()
    Part.spoil = 10**9


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as found:  # one: calls are answered in order
        yield found


class TestWhatIsAskedAgain:
    @pytest.mark.parametrize("at", [2, 7, 30, "last"])
    @pytest.mark.parametrize("shape", CALLS)
    def test_what_is_missing_and_up_to_eight_more(self, executor, shape, at):
        """The call that failed, those behind it, and some of those before: do they still answer as they did?"""
        gradient, box, expected = of(shape, executor=executor)
        at = CALLS[shape] if at == "last" else at
        spoil(gradient, at)
        kept = len(box._guard.pool.kept)
        assert kept >= at - 1
        found = gradient()
        assert torch.equal(found, expected)
        assert len(Part.asked) == CALLS[shape] - kept + min(kept, 8)
        gradient()  # nothing is left of it
        assert len(Part.asked) == CALLS[shape]

    def test_after_several_errors(self, executor):
        gradient, _, expected = of("a model", executor=executor)
        for at in (20, 2, 2):
            spoil(gradient, at)
        found = gradient()
        assert torch.equal(found, expected)
        assert len(Part.asked) <= 52 - 19 + 8

    def test_where_a_call_hangs(self):
        with ThreadPoolExecutor(2) as executor:
            gradient, _, expected = of("a model", executor=executor, timeout=0.3)
            spoil(gradient, 30, hangs, QueryTimeoutError, match="no answer within")
        with ThreadPoolExecutor(2) as executor:
            gradient, box, expected = of("a model", executor=lambda: ThreadPoolExecutor(2), timeout=0.3)
            spoil(gradient, 30, hangs, QueryTimeoutError, match="no answer within")
            assert torch.equal(gradient(), expected)
            assert len(Part.asked) < 30
            box.close()

    @pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("shape", ["a model", "a box", "a recording"])
    def test_where_something_else_fails(self, executor, shape, interrupt):
        """Behind all queries, and before there is a gradient."""
        gradient, _, expected = of(shape, executor=executor)
        stops = [interrupt("elsewhere")]

        def stop(g):
            if stops:
                raise stops.pop()

        handle = gradient.layer.weight.register_hook(stop)
        with pytest.raises(interrupt, match="elsewhere"):
            gradient()
        handle.remove()
        assert torch.equal(gradient(), expected)
        assert len(Part.asked) == 8

    def test_samples_that_fail_are_left_out(self, executor):
        """A list of calls that fails is asked one by one, and finds what was answered."""
        gradient, _, _ = of("a box", executor=executor, on_failure="zero")
        Part.spoil, Part.trouble = 30, staticmethod(fails)
        gradient()
        assert len(Part.asked) < 56 + 16

    def test_processes(self, tmp_path):
        with ProcessPoolExecutor(2) as executor:
            part = partial(in_a_process, str(tmp_path))
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Linear(6, 6).double(), hzo.blackbox(part, numpy=True, batched=1, executor=executor)
            )
            x, y = normal(4, 6), normal(4, 6)
            hzo.backward(model, F.mse_loss, x, y)
            expected = model[0].weight.grad.clone()
            for name in [path.name for path in tmp_path.iterdir()]:
                (tmp_path / name).unlink()
            (tmp_path / "fail").touch()
            model.zero_grad()
            with pytest.raises(QueryError, match="forty"):
                hzo.backward(model, F.mse_loss, x, y)
            before = len([*tmp_path.iterdir()])
            hzo.backward(model, F.mse_loss, x, y)
            assert torch.equal(model[0].weight.grad, expected)
            assert len([*tmp_path.iterdir()]) - before < 20


def in_a_process(folder, z):
    from pathlib import Path
    from uuid import uuid4

    if len([*Path(folder).iterdir()]) > 40:
        try:
            (Path(folder) / "fail").unlink()
        except FileNotFoundError:
            pass
        else:
            time.sleep(0.2)  # what the other one answers arrives before
            raise ValueError("forty")
    (Path(folder) / uuid4().hex).touch()
    return np.sin(z) * z.sum(-1, keepdims=True)


class TestNothingStale:
    def test_a_part_that_is_another_now(self, executor):
        """Its weights are part of the question."""
        part = Part()
        gradient, _, _ = of("a model", part, executor=executor)
        spoil(gradient, 40)
        part.version = 2.0
        found = gradient()
        assert len(Part.asked) == 52
        assert torch.equal(found, of("a model", Part(2.0), executor=executor)[2])

    def test_a_module_with_other_weights(self, executor):
        """Tensors count by their numbers, not by where they are."""
        weight = nn.Parameter(torch.ones(3), requires_grad=False)
        part = nn.Linear(3, 3)
        asked = questions(part, [((torch.ones(2, 3),), {})])
        assert asked == questions(part, [((torch.ones(2, 3).clone(),), {})])
        assert asked != questions(part, [((torch.ones(2, 3) * 2,), {})])
        with torch.no_grad():
            part.bias += 1
        assert asked != questions(part, [((torch.ones(2, 3),), {})])
        assert questions(np.sin, [((weight,), {})]) != questions(np.sin, [((torch.ones(3),), {})])

    def test_a_function_within_a_function(self):
        """Code counts with what it refers to, where cloudpickle is installed to read it."""
        pytest.importorskip("cloudpickle")

        def made(gain):
            return lambda z: gain * z

        one, other = (questions(made(gain), [((1.0,), {})]) for gain in (1.0, 2.0))
        assert one is not None
        assert one != other
        assert one == questions(made(1.0), [((1.0,), {})])

    def test_a_device_that_was_reset(self, executor):
        """What cannot be seen from outside: one answer is asked again, and none of them is used."""
        settings = {"gain": 1.0}
        part = reading(settings)
        assert questions(part, [((np.ones(3),), {})]) is not None
        gradient, _, _ = of("a model", part, executor=executor)
        spoil(gradient, 40)
        settings["gain"] = Part.gain = 3.0
        found = gradient()
        assert len(Part.asked) == 52
        Part.asked = []
        assert torch.equal(found, gradient())

    @pytest.mark.parametrize("at", [5, 7, 30])
    def test_a_device_that_was_reset_and_a_blank_sample(self, executor, at):
        """Its answer is zero whatever the gain, and says nothing of the others."""
        part = reading({"gain": 1.0})
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 6, bias=False).double(),
            hzo.blackbox(part, numpy=True, batched=1, state=None, executor=executor),
        )
        x, y = normal(4, 6), normal(4, 6)
        x[0] = 0

        def gradient():
            Part.asked = []
            model.zero_grad()
            hzo.backward(model, F.mse_loss, x, y)
            return model[0].weight.grad.clone()

        gradient()
        spoil(gradient, at)
        Part.gain = 3.0
        found = gradient()
        assert torch.equal(found, gradient())

    def test_noise(self, executor):
        """Readings that are never the same twice: none stands for another one."""
        inner = hzo.blackbox(Noisy(), numpy=True, batched=1, state=None, executor=executor)
        box = hzo.blackbox([inner, torch.tanh], noise=1e-3)
        x = normal(4, 6).requires_grad_()
        box(x).sum().backward()
        Part.asked = []
        x.grad = None
        box(x).sum().backward()
        whole = len(Part.asked)
        Part.asked, Part.spoil, Part.trouble = [], 40, staticmethod(fails)
        with pytest.raises(QueryError):
            box(x).sum().backward()
        Part.asked, Part.spoil = [], 10**9
        box(x).sum().backward()
        assert len(Part.asked) >= whole

    @pytest.mark.parametrize(
        ("trouble", "error"),
        [(lambda z: z * np.nan, NonFiniteError), (lambda z: z + 1.0, NondeterministicError)],
        ids=["NaN", "two results"],
    )
    def test_what_is_in_doubt(self, executor, trouble, error):
        """An error that says that an answer was wrong keeps none of them."""
        gradient, box, expected = of("a box", executor=executor)
        spoil(gradient, 6, trouble, error)
        assert len(box._guard.pool.kept) == 0
        assert torch.equal(gradient(), expected)
        assert len(Part.asked) == 56

    def test_the_test_that_it_repeats_is_a_test(self, executor):
        """A question that is put twice in one gradient is asked twice."""
        gradient, _, _ = of("a box", executor=executor)
        gradient()
        assert sorted(map(Part.asked.count, set(Part.asked))) == [1] * 48 + [2] * 4


def reading(settings):
    """A part that reads what its content does not show."""
    Part.gain = settings["gain"]
    return Reading()


class Unreadable:
    def __reduce__(self):
        return int, ("nothing",)


class Noisy(Part):
    generator = np.random.default_rng(0)

    def __call__(self, z):
        return super().__call__(z) + 1e-3 * Noisy.generator.normal(size=z.shape)


class Reading(Part):
    def __call__(self, z):
        return Part.gain * super().__call__(z)


class TestKeptAnswers:
    def test_of_a_list_that_failed_all_are_there(self, executor):
        """Those of an earlier try, and those that came now: the calls are asked in smaller lists next."""
        pool, calls = Pool(executor), [((np.full((1, 2), float(k)),), {}) for k in range(18)]
        with pytest.raises(KeyboardInterrupt), one_gradient():
            interrupted(pool.ask(Part(), calls[:12]))
        Part.asked, Part.spoil, Part.trouble = [], 14, staticmethod(fails)  # eight tests, calls 12 to 17
        with one_gradient():
            with pytest.raises(ValueError, match="once"):
                pool.ask(Part(), calls)
            Part.asked = []
            for k in range(18):
                pool.ask(Part(), calls[k : k + 1])
        assert len(Part.asked) == 8 + 1

    def test_tests_are_spread_over_all(self):
        kept = KeptAnswers()
        assert kept.to_test([5, 3]) == [3, 5]
        assert kept.to_test(range(100)) == [0, 14, 28, 42, 56, 70, 84, 99]

    def test_another_thread_whose_gradient_succeeds(self, executor):
        """Nothing is kept then; what was found before is used all the same."""
        pool, calls = Pool(executor), [((np.full((1, 2), float(k)),), {}) for k in range(10)]
        with one_gradient():
            expected = pool.ask(Part(), calls)
        with pytest.raises(KeyboardInterrupt), one_gradient():
            interrupted(pool.ask(Part(), calls))
        Part.asked, Part.spoil, Part.trouble = [], 2, staticmethod(lambda z: pool.kept.clear())
        with one_gradient():
            found = pool.ask(Part(), calls)
        assert all(map(np.array_equal, found, expected))
        assert len(Part.asked) == 8

    def test_an_answer_that_cannot_be_read_is_asked_again(self):
        kept = KeptAnswers()
        kept.add(b"q", Unreadable(), used=False)
        assert kept.answers(kept.take([b"q"])) == {}

    def test_each_is_used_once_in_a_try(self):
        kept = KeptAnswers()
        for answer in (1, 2):
            kept.add(b"q", answer, used=True)
        assert kept.take([b"q"]) == {}
        kept.again()
        assert kept.answers(kept.take([b"q", b"p", b"q", b"q"])) == {0: 1, 2: 2}
        assert kept.take([b"q"]) == {}
        kept.clear()
        assert len(kept) == 0

    def test_memory_is_bounded(self):
        """The oldest go first."""
        kept = KeptAnswers(most=10_000)
        for k in range(100):
            kept.add(bytes([k]), np.full(100, k), used=False)
        assert 5 < len(kept) < 12
        assert kept.take([bytes([0]), bytes([99])]).keys() == {1}
        assert len(KeptAnswers()) == 0

    def test_what_cannot_be_read_is_not_kept(self):
        lock = Lock()
        assert KeptAnswers().add(b"q", lock, used=True) is None
        assert questions(np.sin, [((lock,), {})]) is None
        assert questions(np.sin, [((np.zeros(2**22),), {})]) is None  # too large to be read for every call

    def test_what_all_are_given_is_read_once(self):
        """The model of a population, say."""
        read = []

        class Large:
            def __reduce__(self):
                read.append(1)
                return str, ("large",)

        large = Large()
        found = questions(np.sin, [((large, k), {}) for k in range(20)])
        assert len(read) == 1
        assert len(set(found)) == 20

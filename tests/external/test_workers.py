"""``workers=``: a box with processes of its own, among which calls and samples are divided."""

import os
import time
from functools import partial

import numpy as np
import pytest
import torch

import hzo
from hzo.errors import InputError, NondeterministicError, QueryError
from support.boxes import TOLERANCE
from support.oracles import normal


def work(z):
    return np.sin(z) * z.sum(1, keepdims=True)


def noting(folder, z):
    """Leaves a file of the name of its process."""
    (folder / str(os.getpid())).touch()
    time.sleep(0.02 * len(z))
    return work(z)


def mean_and_work(z):
    return work(z), z.mean()


def in_place(z):
    z *= 2.0
    return np.sin(z)


class Neuron:
    def __init__(self):
        self.v = 0.0

    def __call__(self, z):
        self.v = 0.5 * self.v + 1.0
        return z + self.v


def gradient(box, x):
    x = x.detach().clone().requires_grad_()
    out = box(x)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    return x.grad


@pytest.fixture
def made():
    """Boxes whose processes are ended behind the test."""
    boxes = []

    def make(f, **options):
        boxes.append(hzo.blackbox(f, numpy=True, **options))
        return boxes[-1]

    yield make
    for box in boxes:
        box.close()


@pytest.fixture
def sizes(monkeypatch):
    """Samples of every call that goes to a pool, one list for all that go together."""
    found = []
    ask = hzo.pools.Pool.ask

    def noting(self, f, calls, *rest, **named):
        found.append([len(args[0]) for args, _ in calls])
        return ask(self, f, calls, *rest, **named)

    monkeypatch.setattr(hzo.pools.Pool, "ask", noting)
    return found


@pytest.mark.parametrize("batched", [True, 2, False])
def test_the_same_bits(made, batched):
    x = normal(5, 4)
    box = made(work, workers=3, batched=batched)
    for _ in range(2):  # what is known of it by then changes how the second one is divided
        assert torch.equal(gradient(box, x), gradient(hzo.blackbox(work, numpy=True, batched=batched), x))


def test_a_function_within_a_function(made):
    pytest.importorskip("cloudpickle")
    scale = 2.0
    x = normal(5, 4)
    box = made(lambda z: scale * work(z), workers=2)
    assert torch.allclose(gradient(box, x), 4 * gradient(hzo.blackbox(work, numpy=True), x), rtol=TOLERANCE)


def test_what_cannot_be_sent_says_so(made, tmp_path):
    with (tmp_path / "log").open("w") as file:

        def logged(z):
            file.write("called")
            return z

        with pytest.raises(QueryError, match="cannot be sent to a worker"):
            gradient(made(logged, workers=2), normal(5, 4))


def test_calls_are_divided_until_each_worker_has_one(made, sizes):
    box, x = made(work, workers=12), normal(7, 2)
    gradient(box, x)
    assert sizes[0] == [7]  # nothing is known yet: samples may influence each other
    del sizes[:]
    plan = box.plan_for(x)
    del sizes[:]
    gradient(box, x)
    # The forward pass and the test that it repeats, then two elements up and down, three pieces each.
    assert sizes == [[1] * 7, [1] * 7, [3, 3, 1] * 4]
    assert plan.calls == 7 + 3 * 4


def test_what_tells_of_the_whole_batch_is_not_divided(made, sizes):
    box, x = made(mean_and_work, workers=8), normal(4, 2)
    reference = hzo.blackbox(mean_and_work, numpy=True)
    for _ in range(2):
        assert torch.equal(gradient(box, x), gradient(reference, x))
    assert {size for together in sizes for size in together if size < 4} <= {1}  # the test that a worker forgets


def test_several_processes_answer(made, tmp_path):
    box, x = made(partial(noting, tmp_path), workers=4), normal(8, 2)
    gradient(box, x)
    names = {int(path.name) for path in tmp_path.iterdir()}
    assert len(names) > 1
    assert os.getpid() not in names


def test_a_state_is_refused(made):
    """Each call gets the part as it is here, and a state would be lost with every one."""
    with pytest.raises(NondeterministicError, match=r"gave two results .* keep a state"):
        gradient(made(Neuron(), workers=2), normal(5, 4))
    with pytest.raises(InputError, match="cannot keep a state"):
        made(work, workers=2, state=(lambda: 0, lambda now: None))


def test_closed_and_opened_again(made):
    box, x = made(work, workers=2), normal(5, 4)
    first = gradient(box, x)
    box.close()
    assert torch.equal(gradient(box, x), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers to be a whole number from 1 on"),
        ({"workers": 2, "executor": object()}, "give it, or executor=, not both"),
        ({"workers": 2, "noise": 0.1}, "workers is an option of a single callable without noise="),
        ({"retries": 5}, "give workers= or executor=, too"),
        ({"hedge": 3.0}, "give workers= or executor=, too"),
        ({"target_cosine": 0.9}, r"Leave target_cosine= out, or say how noisy the part is: noise='measured'"),
        ({"budget": 100}, "Leave budget= out"),
        ({"tree": "flat"}, "Leave tree= out"),
        ({"relative": True}, "relative=True says what step= is a share of"),
        ({"relative": True, "step": "measured"}, "relative=True says what step= is a share of"),
    ],
)
def test_options_that_would_do_nothing_are_errors(options, message):
    with pytest.raises(InputError, match=message):
        hzo.blackbox(work, numpy=True, **options)


def test_a_part_that_writes_into_what_it_is_given(made):
    """It keeps no state for that."""
    x = normal(4, 3)
    assert torch.equal(gradient(made(in_place, workers=2), x), gradient(made(in_place), x))

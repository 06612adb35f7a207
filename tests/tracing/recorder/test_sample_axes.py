"""Where samples stand, by what moving one of them changes: how results are compared."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from torch import nn

import hzo
from hzo.errors import QueryTimeoutError
from hzo.tracing.recorder import sample_axes
from support.oracles import normal


@pytest.mark.parametrize("turned", [False, True])
def test_large_values_are_compared_in_pieces(monkeypatch, turned):
    """The same places as at once, whatever the layout."""
    a = torch.randn(3, 50, 7)
    a = a.transpose(1, 2).contiguous().transpose(1, 2) if turned else a
    b = a.clone()
    b[1, 2, 3] += 1e-2
    b[2, 6] *= 1 + 1e-7
    whole = sample_axes._changed(a, b)
    monkeypatch.setattr(sample_axes, "_PIECE", 100)
    assert torch.equal(sample_axes._changed(a, b), whole)
    assert whole.sum() == 1


@pytest.mark.parametrize("content", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_told(content):
    numbers = torch.randn(5, 4)
    assert sample_axes.finite(numbers)
    numbers[3, 2] = content
    assert not sample_axes.finite(numbers)
    assert sample_axes.close(numbers, numbers.clone())
    assert sample_axes.finite(torch.full((4,), 3e38))  # the sum overflows, and the terms do not


@pytest.mark.parametrize("through", ["here", "a pool"])
def test_what_hangs_in_a_trial_is_waited_for_once(through):
    """Other content than the model's own may make a part fail, and that tells nothing; a hang ends the trace."""
    hangs, waited = Event(), []

    def part(z):
        if len(z) == 4 and not np.array_equal(z, own.numpy()):  # the trial: samples that changed their places
            waited.append(1)
            hangs.wait(20)
        return np.tanh(z)

    own = normal(4, 3)
    executor = ThreadPoolExecutor(4) if through == "a pool" else None
    # The part is said to keep no state: a list that it appends to would be put back behind every call.
    box = hzo.blackbox(part, numpy=True, timeout=0.5, executor=executor, state=None)
    try:
        with pytest.raises(QueryTimeoutError, match=r"in a trial run .*no answer within 0.5 seconds"):
            hzo.trace(nn.Sequential(box, nn.Linear(3, 2).double()), own)
    finally:
        hangs.set()
    assert len(waited) == 1

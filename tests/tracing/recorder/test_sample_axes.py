"""Where samples stand, by what moving one of them changes: how results are compared."""

import pytest
import torch

from hzo.tracing.recorder import sample_axes


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

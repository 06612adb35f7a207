"""The scale of each element: what the number of small elements tells, and what one or two do not."""

import pytest
import torch

from hzo.finite_differences.scales import element_scales

UNIT = torch.finfo(torch.float64).eps


def scales_with(small, count, elements=1000):
    """The scales of elements that are spread evenly about zero, and of so many small ones among them."""
    rows = torch.linspace(-1, 1, elements, dtype=torch.float64)
    rows = rows[rows.abs() > 0.02]
    rows[::300][:count] = small
    assert int((rows == small).sum()) == count
    scales, whole = element_scales(rows.unsqueeze(0), UNIT)
    return scales[0, rows == small] / whole


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_small_elements_may_be_small_by_chance(count):
    """A smaller step for them would only lose digits: of evenly spread numbers, some are always small."""
    assert scales_with(1e-6, count).min() > 0.5


def test_three_are_a_kind_of_their_own():
    assert scales_with(1e-6, 3).max() < 0.1

"""What a black box shows of itself."""

import math

import pytest
import torch
from torch import nn

import hzo


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: hzo.blackbox(math.sin), "BlackBox(sin)"),
        (lambda: hzo.blackbox(torch.sin, step=0.5, bounds=(0, 1)), "BlackBox(sin, step=0.5, bounds=(0, 1))"),
        (
            lambda: hzo.blackbox(torch.sin, name="chip", step=torch.ones(3)),
            "BlackBox(chip, step=a tensor of shape (3,))",
        ),
        (
            lambda: hzo.blackbox([torch.sin, nn.Linear(2, 2)], tree="bisect", noise=0.1),
            "BlackBox([sin, Linear], tree='bisect', noise=0.1)",
        ),
    ],
)
def test_repr(made, expected):
    box = made()
    assert repr(box) == expected
    assert repr(nn.Sequential(box)) == f"Sequential(\n  (0): {expected}\n)"

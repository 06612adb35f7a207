"""Distances: autograd's gradients in float64, where they are zero as well."""

import pytest
import torch

from support.tape_oracle import check, leaves_of


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf")])
def test_distances(p):
    check(lambda x, y: torch.cdist(x, y, p=p), leaves_of((3, 4), (5, 4)), calls=["aten._cdist_forward.default"])
    check(lambda x, y: torch.cdist(x, y, p=p), leaves_of((2, 3, 4), (2, 5, 4)))
    check(lambda x: torch.pdist(x, p=p), leaves_of((5, 4)), calls=["aten._pdist_forward.default"])


def test_distances_by_a_product():
    check(lambda x, y: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"), leaves_of((3, 4), (5, 4)),
          calls=["aten._euclidean_dist.default"])  # fmt: skip


def test_distances_of_zero():
    x = torch.randn(4, 3, dtype=torch.float64)
    for mode in ("use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"):
        check(lambda a, b: torch.cdist(a, b, compute_mode=mode), [x, x.clone()])  # noqa: B023
    check(torch.pdist, [torch.cat([x, x])])

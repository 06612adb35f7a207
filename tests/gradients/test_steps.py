"""Steps of a plan's queries: one for each element, which no mask, outlier or domain of another element sets."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo


class Attention(nn.Module):
    """Scores with a mask, a sum of log-probabilities, and branches of very different size side by side."""

    def __init__(self, mask, lengths):
        super().__init__()
        self.embed, self.q, self.v, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(6, 2)
        self.mask, self.lengths = mask, lengths

    def forward(self, x):
        h = self.embed(x).tanh()
        scores = self.q(h) @ h.mT
        hidden = torch.arange(scores.shape[-1]) >= self.lengths[: len(x), None, None]
        scores = scores.masked_fill(hidden, self.mask)
        mixed = scores.softmax(-1) @ self.v(h)
        both = torch.cat([mixed, 1e-5 * mixed.flip(-1)], -1)  # two units in one tensor
        return self.head(torch.cat([both[..., :3], torch.asinh(1e5 * both[..., 3:])], -1)).mean(1)


@pytest.mark.parametrize("mask", [-1e4, -1e9, -math.inf, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("tree", ["flat", "bisect", "stagewise"])
def test_masks_and_units(mask, tree):
    torch.manual_seed(0)
    model = Attention(mask, torch.tensor([2, 7, 1, 2])).double()  # most of all scores are masked
    x, y = torch.randn(4, 7, 4, dtype=torch.float64), torch.randint(2, (4,))
    for assume in ("nothing", "locality"):
        options = {"tree": tree, "assume": assume, "boundaries": "all"}
        found = hzo.compare_gradients(model, F.cross_entropy, x, y, **options)
        assert 1 - found.overall < 1e-9
        assert max(found.errors.values()) < 1e-4, str(found)


def test_one_outlier_spoils_no_neighbour():
    class Outlier(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = self.a(x) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e30], dtype=x.dtype)
            return self.b((h.sin() * (h.abs() < 1e10)) @ torch.eye(6, dtype=x.dtype))

    torch.manual_seed(0)
    model, x, y = Outlier().double(), torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    for tree in ("flat", "bisect"):
        found = hzo.compare_gradients(model, F.cross_entropy, x, y, tree=tree, assume="nothing", boundaries="all")
        assert 1 - found.overall < 1e-12


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1.0, 1e5])
def test_rounding_is_judged_whatever_the_size_of_the_loss(scale):
    """The gradient of a small loss drowns in rounding no sooner than that of a large one."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 6), torch.randint(3, (5,))
    options = {"tree": "bisect", "assume": "nothing"}
    loss = lambda out, y: scale * F.cross_entropy(out, y)  # noqa: E731
    assert hzo.compare_gradients(model, loss, x, y, **options).overall > 0.9999


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_perturbed_parameters_have_steps_of_their_own(dtype):
    """Parameters of a declared module: one at 1e-4 of the others, which counts as much, and one masked."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12))
            with torch.no_grad():
                self.weight[4:8] *= 1e-4
                self.weight[8:] = -1e9

        def forward(self, x):
            near, small, far = self.weight.split(4)
            return x * near.sin() + torch.sin(small * 1e4) + far.sigmoid()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), hzo.declare(Scaled(), "elementwise"), nn.Linear(4, 2)).to(dtype)
    x, y = torch.randn(6, 3, dtype=dtype), torch.randint(2, (6,))
    found = hzo.compare_gradients(model, F.cross_entropy, x, y)
    assert found.errors["1.weight"] < (1e-5 if dtype == torch.float64 else 0.1)

"""Networks by name: shapes, seeds, sizes."""

import pytest
import torch

from hzo.errors import InputError
from hzo_lab.training import models


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mlp", (64,), 71_370),
        ("plain-mlp", (64,), 71_370),
        ("mlp", (3, 8, 8), None),
        ("cnn", (3, 32, 32), None),
        ("cnn", (3, 20, 20), None),
        ("plain-cnn", (1, 8, 8), None),
        ("inverted-cnn", (3, 32, 32), 22_002),
        ("inverted-cnn", (1, 20, 20), None),  # patches of 2, a map of 10 × 10
        ("resnet20", (3, 32, 32), 269_722),  # the figure that the literature gives
        ("resnet20", (3, 64, 64), 269_722 + (5 * 5 - 3 * 3) * 3 * 16),  # a stem of 5 × 5 with stride 2
    ],
)
def test_a_network_of_each_name_scores_every_class(name, shape, parameters):
    model = models.build(name, shape, 10)
    assert model(torch.randn(2, *shape)).shape == (2, 10)
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20", "inverted-cnn"])
def test_weights_are_a_function_of_the_seed_alone(name):
    shape = (3, 16, 16)
    first = models.build(name, shape, 5, seed=1).state_dict()
    torch.randn(7)  # moves the global generator, which must not matter
    again = models.build(name, shape, 5, seed=1).state_dict()
    other = models.build(name, shape, 5, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("depth", [4, 64])
def test_the_residual_mlp_has_near_unit_gain(depth):
    model = models.build("mlp", (64,), 10, depth=depth).double()
    blocks = list(model.children())[1:-1]
    x = torch.randn(256, 64, dtype=torch.float64)
    y = x
    for block in blocks:
        y = block(y)
    assert len(blocks) == depth
    assert 0.8 < float(y.detach().norm() / x.norm()) < 3


def test_inverted_residuals_start_as_the_identity():
    stem, *blocks, _, _ = models.build("inverted-cnn", (3, 32, 32), 10, depth=3)
    x = stem(torch.randn(2, 3, 32, 32))
    assert x.shape == (2, 8, 8, 8)
    assert len(blocks) == 3
    for block in blocks:
        assert torch.equal(block(x), x)
        assert block.expand.weight.abs().sum() > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="--model mlp"):
        models.build("cnn", (64,), 10)
    with pytest.raises(InputError, match="6n"):
        models.build("resnet20", (3, 32, 32), 10, depth=21)
    with pytest.raises(InputError, match="vgg"):
        models.build("vgg", (3, 32, 32), 10)

"""``hzo.infer_structure``: what probing alone tells of modules that we know."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from support.hardware import Opaque, ramp

HALF = Fraction(1, 2)
L = hzo.Local

KNOWN = [
    (nn.ReLU(), (3, 8), {"elementwise"}),
    (nn.GELU(), (2, 3, 5), {"elementwise"}),
    (nn.Tanh(), (6,), {"elementwise"}),
    (nn.Dropout(0.5), (9,), {"elementwise"}),
    (nn.Identity(), (4,), {"elementwise", "affine", "reindexing"}),
    (nn.Linear(5, 4), (5,), {"affine"}),
    (nn.Linear(5, 4), (6, 5), {"affine", "tokens"}),
    (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 6), {"affine", "stationary", L(2, -1, 1), L(3, -1, 1)}),
    (nn.Conv2d(4, 4, 3, 2, 1, groups=4), (4, 7, 8), {"affine", "stationary", L(1), L(2, -1, 1, 2), L(3, -1, 1, 2)}),
    (nn.Conv1d(2, 3, 3, dilation=2), (2, 9), {"affine", "stationary", L(2, 0, 4)}),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 6, 6), {"affine"}),
    (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), (2, 8), {"affine", L(2, -HALF, HALF, HALF)}),
    (nn.AvgPool2d(3, 1, 1), (2, 6, 6), {"affine", "symmetric", "stationary", L(1), L(2, -1, 1), L(3, -1, 1)}),
    (nn.MaxPool2d(2), (2, 6, 6), {L(1), L(2, 0, 1, 2), L(3, 0, 1, 2)}),
    (nn.LayerNorm(6), (4, 6), {"tokens", "symmetric"}),
    (nn.LayerNorm((4, 6)), (4, 6), {"symmetric"}),
    (nn.Softmax(-1), (4, 5), {"tokens", "symmetric"}),
    (nn.InstanceNorm1d(3), (3, 5), {"tokens", "symmetric"}),
    (Opaque(lambda x: F.instance_norm(x, weight=ramp(x[0, :, 0]), bias=None)), (3, 5), {L(1), "symmetric"}),
    (nn.BatchNorm2d(3).eval(), (3, 4, 4), {"elementwise", "affine"}),
    (nn.BatchNorm2d(3), (3, 4, 4), set()),  # samples influence each other
    (nn.Flatten(), (4, 3), {"affine", "reindexing"}),
    (nn.Upsample(scale_factor=2), (2, 5), {"affine", "tokens", "reindexing", L(2, -HALF, 0, HALF)}),
    (Opaque(lambda x: x.flip(-1)), (2, 5), {"affine", "symmetric", "tokens", "reindexing"}),
    (Opaque(lambda x: torch.log(x.abs().cumsum(-1))), (5,), set()),
    (Opaque(lambda x: x.detach().round()), (5,), {"elementwise"}),
    (
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)),
        (2, 9, 9),
        {L(2, -2, 2), L(3, -2, 2)},
    ),
]


def normal(shape, dtype=torch.float64, batch=3):
    return torch.randn(batch, *shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", range(len(KNOWN)))
def test_known_modules(k, dtype):
    module, shape, promises = KNOWN[k]
    found = hzo.infer_structure(module.to(dtype), normal(shape, dtype))
    assert set(found) == promises
    assert len(list(found)) == len(promises)


@pytest.mark.parametrize("k", [k for k, (_, _, promises) in enumerate(KNOWN) if promises])
def test_what_is_inferred_passes_the_check(k):
    """One line, as users write it; on an input that inference has not seen."""
    module, shape, _ = KNOWN[k]
    wrapped = Opaque(module.double())
    hzo.declare(wrapped, *hzo.infer_structure(wrapped, normal(shape)))
    hzo.check_structure(wrapped, normal(shape, batch=5))


def test_one_sample_is_enough():
    assert set(hzo.infer_structure(nn.Linear(5, 4), torch.randn(1, 6, 5))) == {"affine", "tokens"}
    assert set(hzo.infer_structure(nn.Tanh(), torch.zeros(1, 5))) == {"elementwise"}


def test_trains_an_unknown_module():
    """Fewer queries than a black box, the same gradient."""
    layer = nn.Conv2d(2, 2, 3, padding=1)
    own = Opaque(layer).double()
    model = nn.Sequential(nn.Conv2d(1, 2, 1), own, nn.Tanh(), nn.Flatten(), nn.Linear(50, 3)).double()
    x, y = normal((1, 5, 5)), torch.arange(3)
    for p in layer.parameters():
        p.requires_grad_(False)
    with hzo.count_queries() as blind:
        before, _ = hzo.grad_and_value(model, F.cross_entropy, x, y)
    hzo.declare(own, *hzo.infer_structure(own, normal((2, 5, 5))))
    with hzo.count_queries() as informed:
        after, _ = hzo.grad_and_value(model, F.cross_entropy, x, y)
    assert informed.queries < blind.queries / 3
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-6, atol=1e-9)


def test_prints_what_was_tested():
    text = str(hzo.infer_structure(nn.ReLU(), normal((4,))))
    assert text.startswith("promises: elementwise\n")
    assert "positively homogeneous: yes" in text
    assert "affine: no" in text


def test_leaves_no_trace():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    torch.manual_seed(3)
    with hzo.count_queries() as count:
        hzo.infer_structure(module, torch.ones(3, 4, dtype=torch.float64))
        hzo.infer_structure(module.eval(), torch.ones(3, 4, dtype=torch.float64))
    drawn = torch.randn(5)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randn(5))
    assert not any(m.training for m in module.modules())
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert count.check_evaluations > 0
    assert count.queries == count.base_evaluations == count.adjoints == 0


def test_refuses_what_is_not_one_tensor():
    with pytest.raises(hzo.errors.InputError, match="floating tensor x"):
        hzo.infer_structure(nn.Embedding(3, 2), torch.arange(3))
    with pytest.raises(hzo.errors.InputError, match="to come out"):
        hzo.infer_structure(nn.GRU(3, 3), normal((2, 3)).float())
    with pytest.raises(hzo.errors.InputError, match="3 samples in one floating tensor to come out"):
        hzo.infer_structure(Opaque(lambda x: x.mean(0)), normal((2,)))

"""Weights that are moved in place come back to the bit, and are not copied."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hzo.baselines import _evaluate as ev
from hzo.baselines import _in_place, mezo
from hzo.errors import InputError, NonFiniteError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.detach().clone().view(BITS[tensor.element_size()])


def awkward(dtype):
    """Numbers of all sizes and both signs, both zeros, the smallest and the largest, infinity."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-40, 4, 4000, dtype=torch.float64)
    spread = torch.randn(4000, dtype=torch.float64, generator=generator) * sizes
    info = torch.finfo(dtype)
    ends = torch.tensor([0.0, -0.0, info.tiny, -info.tiny, info.max, info.min, float("inf")], dtype=torch.float64)
    return torch.cat([spread, ends, torch.full((93,), 0.1, dtype=torch.float64)]).to(dtype).view(41, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", [1e-3, -1e-3, 3.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_numbers_of_all_sizes_come_back(dtype, by, transposed):
    tensor = awkward(dtype)
    tensor = tensor.t() if transposed else tensor
    before, z = bits(tensor), torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = tensor.clone().add_(z, alpha=by)
    lost = _in_place.move(tensor, z, by)
    assert torch.equal(bits(tensor), bits(expected))
    _in_place.put_back(tensor, z, by, lost)
    assert torch.equal(bits(tensor), before)


def test_weights_of_the_usual_size_take_a_byte_each():
    generator = torch.Generator().manual_seed(0)
    weight, z = (torch.randn(1000, 100, generator=generator) for _ in range(2))
    weight *= 0.03
    lost = _in_place.move(weight, z, 1e-3)
    assert lost.small.dtype == torch.int8
    assert lost.large.numel() < 1e-3 * weight.numel()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(4, 5), torch.randint(3, (4,))


@pytest.fixture
def no_copies(monkeypatch):
    def held(parameters):
        raise AssertionError("the weights were copied")

    monkeypatch.setattr(ev, "held", held)


@pytest.mark.usefixtures("no_copies")
def test_nothing_is_copied_and_all_comes_back():
    model, x, y = network()
    before = [bits(p) for p in model.parameters()]
    for step in range(20):
        mezo(model, F.cross_entropy, x, y, generator=torch.Generator().manual_seed(step))
    assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.usefixtures("no_copies")
@pytest.mark.parametrize("failing", [2, 3])
@pytest.mark.parametrize("error", [NonFiniteError, KeyboardInterrupt])
def test_all_comes_back_from_an_error(failing, error):
    model, x, y = network()
    before, calls = [bits(p) for p in model.parameters()], []

    def loss_fn(output, target):
        calls.append(1)
        if len(calls) == failing:
            raise error("in the middle")
        return F.cross_entropy(output, target)

    with pytest.raises(error):
        mezo(model, loss_fn, x, y, rate=0.1)
    assert len(calls) == failing
    assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("samples", [1, 3])
def test_a_step_at_once_is_that_of_the_estimate(samples):
    model, x, y = network()
    before = [p.detach().clone() for p in model.parameters()]
    first = mezo(model, F.cross_entropy, x, y, samples=samples, generator=torch.Generator().manual_seed(4))
    gradients = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    second = mezo(model, F.cross_entropy, x, y, samples=samples, rate=0.1, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, second)
    for p, old, g in zip(model.parameters(), before, gradients, strict=True):
        assert p.grad is None
        torch.testing.assert_close(p.detach(), old - 0.1 * g, rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    """Two parameters in one memory."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 3))
        self.b = nn.Parameter(torch.empty(0))
        self.b.data = self.a.data.t()

    def forward(self, x):
        return x @ self.a + x @ self.b


@pytest.mark.parametrize(
    "model", [Tied, lambda: nn.Sequential(nn.Embedding(4, 3, max_norm=0.5), nn.Linear(3, 3))], ids=["tied", "renormed"]
)
def test_models_that_need_copies_have_them(model):
    torch.manual_seed(0)
    model = model()
    x = torch.randn(4, 3) if isinstance(model, Tied) else torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        model(x)
    before = [bits(p) for p in model.parameters()]
    mezo(model, lambda output: output.square().mean(), x)
    assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_rate_is_a_positive_number():
    model, x, y = network()
    with pytest.raises(InputError, match=r"rate"):
        mezo(model, F.cross_entropy, x, y, rate=0)

"""Training: it learns, as backprop does, and without autograd."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import hzo
from hzo.tape.recurrent import GruCell, LstmCell
from support.cases import CASES
from support.networks import Residual


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x = torch.tensor(data.data / 16.0)
    y = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def network(width=24):
    torch.manual_seed(0)
    blocks = [Residual(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.Linear(width, 10)).double()


def train(model, differentiate, digits, epochs, batch=100, lr=5e-3):
    x, y, _, _ = digits
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    order = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch):
            optimizer.zero_grad()
            losses.append(float(differentiate(model, x[rows], y[rows])))
            optimizer.step()
    return torch.tensor(losses)


def by_autograd(model, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def accuracy(model, digits):
    _, _, x, y = digits
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("options", [hzo.presets.paper, hzo.presets.fast], ids=["paper", "fast"])
def test_digits(digits, options):
    """Loss falls, accuracy rises, and the whole run is that of backprop."""
    model, reference = network(), network()
    losses = train(model, lambda *call: hzo.backward(call[0], F.cross_entropy, *call[1:], **options), digits, epochs=4)
    expected = train(reference, by_autograd, digits, epochs=4)
    assert losses[-14:].mean() < 0.2 * losses[:3].mean()
    assert accuracy(model, digits) > 0.9
    # One step in float64 agrees to 1e-8; Adam divides by the gradient's own size, and a kink of a ReLU now and then
    # falls between the two runs: they drift apart slowly.
    torch.testing.assert_close(losses[:14], expected[:14], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-3)
    assert abs(accuracy(model, digits) - accuracy(reference, digits)) < 0.01


def test_single_precision_learns_as_well(digits):
    model = network().float()
    narrow = tuple(t.float() if t.is_floating_point() else t for t in digits)
    train(model, lambda *call: hzo.backward(call[0], F.cross_entropy, *call[1:]), narrow, epochs=4)
    assert accuracy(model, narrow) > 0.9


@pytest.fixture
def without_autograd(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("autograd was called")

    apply = torch.autograd.Function.apply

    def apply_own(cls, *args, **kwargs):
        """The cells of recurrent layers are operations of the recording, whose backward is a rule of ours."""
        return apply.__func__(cls, *args, **kwargs) if cls in (GruCell, LstmCell) else refuse()

    torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports parts of torch that define derivatives
    for owner, name in [
        (torch.autograd, "backward"),
        (torch.autograd, "grad"),
        (torch.Tensor, "backward"),
        (torch.func, "vjp"),
        (torch.func, "jvp"),
        (torch.func, "grad"),
    ]:
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(apply_own))
    with pytest.raises(AssertionError, match="autograd was called"):
        torch.ones((), requires_grad=True).sum().backward()


@pytest.mark.usefixtures("without_autograd")
@pytest.mark.parametrize("assume", ["nothing", "structure"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_without_autograd(name, assume):
    """Every network takes steps, and the loss goes down."""
    problem = CASES[name].build()
    parameters = [p for p in problem.module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01) if parameters else None
    losses = []
    for _ in range(4):
        torch.manual_seed(0)  # the same dropout: one function, whose value must fall
        problem.module.zero_grad()
        losses.append(float(hzo.backward(*problem, assume=assume)))
        if optimizer:
            optimizer.step()
    assert not parameters or losses[-1] < losses[0]


def test_saved_tensors_are_never_kept():
    """Nothing in a gradient records history, whatever the grad mode around it."""
    problem = CASES["residual_mlp"].build()

    def refuse(tensor):
        raise AssertionError("autograd saved a tensor")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t), torch.enable_grad():
        hzo.backward(*problem)
        hzo.cotangents(*problem)
    with torch.inference_mode():
        hzo.grad_and_value(*problem)

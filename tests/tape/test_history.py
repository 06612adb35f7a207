"""What code is told that asks a tensor for its history: the same under a plan as without one."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import TraceError

PLANS = [{"tree": "bisect", "assume": "nothing"}, {"tree": "stagewise", "assume": "structure"}]
X = torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5).sin()
Y = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3).cos()


class Asks(nn.Module):
    """Two layers, and in between a function of activations; it notes what it was told."""

    def __init__(self, asks, frozen=False):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.last = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()
        self.first.requires_grad_(not frozen)
        self.asks, self.told = asks, []

    def tell(self, answer):
        self.told.append(answer)
        return 2.0 if answer else 3.0

    def forward(self, x):
        return self.last(self.asks(self, x).tanh())


def of_the_input(model, x):
    return model.first(x * model.tell(x.requires_grad))


def of_activations(model, x):
    h = model.first(x)
    return h * model.tell(h.requires_grad) * model.tell((x + 1).requires_grad) * model.tell((x + h).requires_grad)


def of_a_view(model, x):
    h = model.first(x)
    return h * model.tell(x[:, 1:].requires_grad) * model.tell(h.t()[1:].requires_grad)


def of_a_leaf(model, x):
    h = x * model.tell(x.is_leaf)
    h = model.first(h) * model.tell(h.is_leaf)
    return h * model.tell(h.is_leaf) * model.tell(model.first.weight.is_leaf)


def of_a_node(model, x):
    h = model.first(x * model.tell(x.grad_fn is None))
    return h * model.tell(h.grad_fn is None)


def of_what_was_written_to(model, x):
    buffer = torch.zeros(len(x), 5, dtype=x.dtype)
    buffer[:, :2] = x[:, :2]
    before = model.tell(buffer.requires_grad)
    buffer[:, 2:] = model.first(x)[:, 2:]
    return buffer * before * model.tell(buffer.requires_grad)


def of_what_is_detached(model, x):
    h = model.first(x)
    return h * model.tell(h.detach().requires_grad) * model.tell(x.detach().requires_grad)


def of_a_leaf_of_its_own(model, x):
    """A force: the derivative of an energy by positions that are data."""
    x = x.clone()
    before = model.tell(x.requires_grad)
    y = x.cos()
    x.requires_grad_()
    energy = model.first(x).square().sum() * model.tell(y.requires_grad) * before
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return force * model.tell(x.requires_grad) * model.tell(x.is_leaf) * model.tell(energy.requires_grad)


def of_a_leaf_by_assignment(model, x):
    x = x.clone()
    x.requires_grad = True
    told = model.tell(x.requires_grad)
    x.requires_grad_(False)
    return model.first(x * model.tell(x.requires_grad) * told)


class Twice(torch.autograd.Function):
    """Of data alone it has no node."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def of_a_custom_function(model, x):
    data = Twice.apply(x)
    h = model.first(data * model.tell(data.requires_grad))
    return h * model.tell(Twice.apply(h).requires_grad)


ASKS = [
    of_the_input, of_activations, of_a_view, of_a_leaf, of_a_node, of_what_was_written_to, of_what_is_detached,
    of_a_leaf_of_its_own, of_a_leaf_by_assignment, of_a_custom_function,
]  # fmt: skip


def compare(make, options, x=X, y=Y):
    expected, found = make(), make()
    F.mse_loss(expected(x), y).backward()
    hzo.backward(found, F.mse_loss, x, y, **options)
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-8, msg=name)
    return expected, found


@pytest.mark.parametrize("options", PLANS, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("asks", ASKS, ids=lambda f: f.__name__)
def test_code_is_told_what_it_is_told_without_a_plan(asks, frozen, options):
    if asks is of_a_custom_function and options["assume"] == "nothing":
        options = PLANS[1]  # queries do not go through custom Functions
    expected, found = compare(lambda: Asks(asks, frozen), options)
    assert found.told == expected.told


@pytest.mark.parametrize("options", PLANS, ids=str)
def test_a_mode_around_a_step_changes_nothing(options):
    """``torch.device`` as a context overloads torch's functions, attributes of tensors among them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().requires_grad_(False)
    x, y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 2, dtype=torch.float64)
    (expected,) = torch.autograd.grad(F.mse_loss(model(x), y), x)
    with torch.device("cpu"):
        found = hzo.cotangents(model, F.mse_loss, x.detach(), y, **options)
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-8)


def test_an_input_that_requires_a_gradient_says_so():
    x = X.clone().requires_grad_()
    model = Asks(lambda model, x: model.first(x * model.tell(x.requires_grad) * model.tell(x.is_leaf)))
    hzo.backward(model, F.mse_loss, x, Y, **PLANS[0])
    assert model.told == [True, True]
    hzo.backward(model, F.mse_loss, x * 2, Y, **PLANS[0])  # with a history from before: data for the plan
    assert model.told[2:] == [True, False]


class Encoder(nn.Module):
    """A frozen encoder in evaluation mode, for which PyTorch has a fast path, and a layer that is trained."""

    def __init__(self, masked=False, no_grad=False):
        super().__init__()
        torch.manual_seed(2)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dtype=torch.float64)
        self.encoder = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
        self.last = nn.Linear(4, 3).double()
        self.masked, self.no_grad = masked, no_grad

    def forward(self, x):
        words = torch.stack([x[:, :4], x[:, 1:]], 1)
        mask = torch.zeros(len(x), 2, dtype=torch.bool)
        mask[: len(x) // 2, 1] = True
        with torch.set_grad_enabled(not self.no_grad):
            found = self.encoder(words, src_key_padding_mask=mask if self.masked else None)
        return self.last(found.sum(1))


@pytest.mark.parametrize("options", PLANS, ids=str)
@pytest.mark.filterwarnings("ignore:.*nested tensors")
class TestFastPaths:
    def test_a_frozen_encoder(self, options):
        compare(Encoder, options)

    def test_what_its_fast_path_leaves_out_is_never_silently_there(self, options):
        """Padding is zero behind the fast path, and is not behind the other: another loss, another gradient."""
        with pytest.raises(TraceError, match=r"nested tensor.*torch\.no_grad"):
            hzo.backward(Encoder(masked=True), F.mse_loss, X, Y, **options)
        compare(lambda: Encoder(masked=True, no_grad=True), options)


def test_other_threads_are_told_what_pytorch_says():
    told = []

    def asks(model, x):
        data, trained = torch.ones(3), torch.ones(3, requires_grad=True)

        def other():
            made = trained * 2
            told.extend([made.requires_grad, made.is_leaf, made.grad_fn is not None, data.requires_grad])

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return model.first(x)

    hzo.backward(Asks(asks), F.mse_loss, X, Y, **PLANS[0])
    assert told == [True, False, True, False]


def test_nothing_of_it_is_left_behind():
    names = ("requires_grad", "is_leaf", "grad_fn", "requires_grad_")
    seen = []

    def asks(model, x):
        seen.extend(name in vars(torch.Tensor) for name in names)
        return model.first(x)

    hzo.backward(Asks(asks), F.mse_loss, X, Y, **PLANS[0])
    assert all(seen)
    assert not any(name in vars(torch.Tensor) for name in names)

    def fails(_, x):
        raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        hzo.backward(Asks(fails), F.mse_loss, X, Y, **PLANS[0])
    assert not any(name in vars(torch.Tensor) for name in names)

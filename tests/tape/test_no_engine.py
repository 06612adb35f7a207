"""Training steps where every entry to autograd's engine raises: no reverse sweep of PyTorch's runs, anywhere."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo


class EngineError(AssertionError):
    pass


@contextlib.contextmanager
def no_engine(monkeypatch):
    """Replace whatever starts the engine from Python, and what it would run there."""

    def refuses(*_, **__):
        raise EngineError

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "backward", refuses)
        patch.setattr(torch.autograd, "grad", refuses)
        patch.setattr(torch.Tensor, "backward", refuses)
        for module in (torch.autograd, torch.autograd.graph):
            for name in ("_engine_run_backward",):
                if hasattr(module, name):
                    patch.setattr(module, name, refuses)
        patch.setattr(torch.autograd.Variable, "_execution_engine", type("Engine", (), {"run_backward": refuses})())
        yield


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.lstm, self.head = nn.Embedding(11, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, tokens):
        return self.head(self.lstm(self.words(tokens))[0][:, -1])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(self.embed(x)).mean(1))


class LanguageModel(nn.Module):
    """Its loss inside, over a vocabulary, with a penalty and a tied head."""

    def __init__(self):
        super().__init__()
        self.words, self.block = nn.Embedding(40, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=torch.float64)
        hidden = self.block(self.words(tokens), src_mask=mask, is_causal=True)
        logits = hidden @ self.words.weight.T
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return loss + 1e-3 * self.words.weight.square().sum()


def images():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4)
    )


X, TOKENS, Y = torch.randn(3, 5, 4), torch.randint(11, (3, 5)), torch.tensor([0, 3, 1])
CASES = {
    "MLP": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 8), nn.GELU(), nn.Linear(8, 4)), X, F.cross_entropy, Y),
    "convolutions": (images, torch.randn(3, 1, 8, 8), F.cross_entropy, Y),
    "LSTM": (Tagger, TOKENS, F.cross_entropy, Y),
    "attention": (Attending, X, F.cross_entropy, Y),
    "language model": (LanguageModel, torch.randint(40, (3, 6)), lambda loss: loss, None),
}
WAYS = {
    "recorded": {},
    "planned": {"assume": "locality"},
    "tree": {"tree": "bisect", "assume": "structure"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_training_step(name, way, monkeypatch):
    make, x, loss_fn, y = CASES[name]
    if way != "recorded" and name in ("convolutions", "language model"):
        pytest.skip("samples that are coupled, or a loss that is the output: recorded alone")
    torch.manual_seed(0)
    model = make().double()
    x = x.double() if x.is_floating_point() else x
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    with no_engine(monkeypatch):
        with pytest.raises(EngineError):
            (model(x) if y is None else model(x).sum()).backward()
        torch.manual_seed(1)
        twin.load_state_dict(model.state_dict())  # statistics moved
        hzo.backward(model, loss_fn, x, y, **WAYS[way])
        optimizer.step()
    torch.manual_seed(1)
    (loss_fn(twin(x)) if y is None else loss_fn(twin(x), y)).backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8, msg=key)


def test_a_step_in_the_users_own_loop(monkeypatch):
    """With hooks, checkpointing and accumulation; the engine does not run for those either."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    twin = copy.deepcopy(model)
    x, y = X[:, 0].double(), Y

    def loss(net):
        hidden = torch.utils.checkpoint.checkpoint(net[:2], x, use_reentrant=False)
        if hidden.requires_grad:
            hidden.register_hook(lambda g: 2 * g)
        return F.cross_entropy(net[2](hidden), y)

    with no_engine(monkeypatch):
        for _ in range(2):
            with hzo.record() as tape:
                value = loss(model)
            tape.backward(value)
    for _ in range(2):
        loss(twin).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)

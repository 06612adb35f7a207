"""Layers, functions and idioms of torch that are not among the cases: each once, against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from support import oracles
from support.networks import Calls
from support.oracles import normal

FUNCTIONS = {
    "unbind": lambda h: sum(part * k for k, part in enumerate(h.unbind(1))).unsqueeze(1),
    "iteration": lambda h: torch.stack([a.sin() for a in h.T]).T,
    "einsum": lambda h: torch.einsum("bi,bj->bij", h, h.tanh()).flatten(1),
    "time first": lambda h: torch.tanh(h.view(-1, 2, 2).transpose(0, 1)).transpose(0, 1).flatten(1),
    "folded batch": lambda h: F.softmax(h.view(h.shape[0] * 2, 2), -1).view(h.shape[0], 4),
    "batch in the middle": lambda h: torch.stack([h, h.sin(), h * 2]).logsumexp(0),
    "sizes": lambda h: h.new_ones(h.shape[0], 1) * h + torch.zeros_like(h) + torch.zeros(len(h), 1),
    "split": lambda h: torch.cat([a * b for a, b in [h.split([1, 3], 1)]], 1),
    "written slice": lambda h: torch.zeros_like(h).index_copy_(1, torch.tensor([0, 2]), h[:, :2].sin()),
    "gather": lambda h: h.gather(1, torch.tensor([[0, 2]]).expand(h.shape[0], 2)),
    "routing": lambda h: h.sin().gather(1, h[:, :2].argmax(1, keepdim=True)),
    "sorted": lambda h: h.sort(1).values.tanh(),
    "where": lambda h: torch.where(h > 0, h.sin(), h * 2),
    "masked": lambda h: h.masked_fill(torch.tensor([True, False, False, False]), -math.inf).softmax(-1),
    "in place": lambda h: torch.mul(h, 2.0).add_(h),
    "empty": lambda h: torch.cat([h, h[:, :0]], 1),
    "cumulative": lambda h: h.cumsum(1).tanh(),
    "distances": lambda h: torch.cdist(h[:, None], torch.eye(4, dtype=h.dtype).expand(len(h), -1, -1)).flatten(1),
    "a linear system": lambda h: torch.linalg.solve(
        torch.eye(2) * 3.0 + h.view(-1, 2, 2).sin(), h[:, :2, None]
    ).flatten(1),
    "noise": lambda h: h + torch.randn(h.shape[0], 4),
    "gumbel": F.gumbel_softmax,
    "complex numbers in a black box": hzo.blackbox(lambda h: torch.fft.rfft(h).abs()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function = FUNCTIONS[name]
    torch.set_default_dtype(torch.float64)
    try:
        oracles.assert_right(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Calls(function)), normal(3, 4))
    finally:
        torch.set_default_dtype(torch.float32)


class Model(nn.Module):
    """A forward pass written in place, with the modules and parameters that it names."""

    def __init__(self, forward, **members):
        super().__init__()
        self.written = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.written(self, *args, **kwargs)


def parameter(*shape):
    return nn.Parameter(normal(*shape))


def unrolled(m, x):
    buffer, h = x.new_zeros(x.shape[0], 3, 3), x
    for step in range(3):
        h = torch.tanh(m.a(h))
        buffer[:, step] = h
    return m.b(buffer.sum(2))


def autoencoder(m, x):
    mean, log_variance = m.a(x).chunk(2, 1)
    return m.b(mean + torch.exp(log_variance / 2) * torch.randn_like(mean)), mean, log_variance


def rotary(m, x):
    h, angle = m.a(x).view(len(x), 2, 2), torch.arange(2.0)
    turned = h[..., 0] * angle.cos() - h[..., 1] * angle.sin(), h[..., 0] * angle.sin() + h[..., 1] * angle.cos()
    return torch.stack(turned, -1).flatten(1)


def experts(m, x):
    return sum(m.a(x).softmax(1)[:, k : k + 1] * expert(x) for k, expert in enumerate(m.b))


def first_token(m, x):
    return m.a(torch.cat([m.p.expand(x.shape[0], -1, -1), x], 1)).tanh().sum(1)


def given_state(m, x):
    zero = x.new_zeros(1, len(x), 2)
    return m.b(m.a(x.transpose(0, 1), (zero, zero))[1][0][0])


def checkpointed(m, x):
    return m.b(torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def attend(m, x):
    h = m.a(x)
    return m.b(m.c(h, h, h)[0].mean(1))


def linear(i, o):
    return nn.Linear(i, o)


NORM = nn.utils.parametrizations
MODELS = {
    "lstm": lambda: (
        Model(lambda m, x: m.b(m.a(x)[0][:, -1]), a=nn.LSTM(2, 2, batch_first=True), b=linear(2, 2)),
        (3, 2),
    ),
    "lstm, time first": lambda: (Model(given_state, a=nn.LSTM(2, 2), b=linear(2, 2)), (3, 2)),
    "lstm, both ways": lambda: (
        Model(lambda m, x: m.a(x)[0].mean(1), a=nn.LSTM(2, 1, 2, batch_first=True, bidirectional=True)),
        (3, 2),
    ),
    "multihead": lambda: (
        Model(attend, a=linear(2, 4), b=linear(4, 2), c=nn.MultiheadAttention(4, 2, batch_first=True)),
        (3, 2),
    ),
    "encoder": lambda: (encoder(), (2, 4)),
    "encoder, norm first": lambda: (encoder(norm_first=True), (2, 4)),
    "encoder, evaluation": lambda: (encoder().eval(), (2, 4)),
    "upsampling": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 4, 2), nn.PixelShuffle(2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Flatten()
        ),
        (1, 3, 3),
    ),
    "unfold": lambda: (
        Model(lambda m, x: m.b(F.unfold(m.a(x), 2)).flatten(1), a=nn.Conv2d(1, 2, 2), b=linear(4, 2)),
        (1, 4, 4),
    ),
    "dropout of channels": lambda: (
        nn.Sequential(nn.Conv2d(1, 4, 2), nn.Dropout2d(0.5), nn.Flatten(), nn.Tanh()),
        (1, 3, 3),
    ),
    "other dropout": lambda: (
        nn.Sequential(linear(3, 4), nn.AlphaDropout(0.4), linear(4, 3), nn.FeatureAlphaDropout(0.3), linear(3, 2)),
        (3,),
    ),
    "random slopes": lambda: (nn.Sequential(linear(3, 4), nn.RReLU(), linear(4, 2)), (3,)),
    "dropped weights": lambda: (Model(lambda m, x: F.linear(x, F.dropout(m.p, 0.4)).sin(), p=parameter(3, 3)), (3,)),
    "noisy weights": lambda: (
        Model(lambda m, x: F.linear(x, m.p + torch.randn_like(m.p)).sin(), p=parameter(3, 3)),
        (3,),
    ),
    "autoencoder": lambda: (Model(autoencoder, a=linear(3, 4), b=linear(2, 3)), (3,)),
    "checkpoint": lambda: (Model(checkpointed, a=nn.Sequential(linear(3, 3), nn.Tanh()), b=linear(3, 2)), (3,)),
    "written into": lambda: (Model(unrolled, a=linear(3, 3), b=linear(3, 2)), (3,)),
    "class token": lambda: (Model(first_token, a=linear(3, 3), p=parameter(1, 1, 3)), (2, 3)),
    "rotary positions": lambda: (Model(rotary, a=linear(3, 4)), (3,)),
    "experts": lambda: (Model(experts, a=linear(3, 2), b=nn.ModuleList([linear(3, 3), linear(3, 3)])), (3,)),
    "low rank": lambda: (Model(lambda m, x: x @ m.p @ m.q.T, p=parameter(3, 2), q=parameter(4, 2)), (3,)),
    "weight first": lambda: (Model(lambda m, x: (m.p @ x.T).T.sin(), p=parameter(2, 3)), (3,)),
    "mixing weights": lambda: (
        Model(lambda m, x: (m.p.softmax(0) * torch.stack([m.a(x), x], -1)).sum(-1), p=parameter(2), a=linear(3, 3)),
        (3,),
    ),
    "spectral norm": lambda: (nn.Sequential(NORM.spectral_norm(linear(3, 3)), nn.Tanh(), linear(3, 2)).eval(), (3,)),
    "orthogonal": lambda: (nn.Sequential(NORM.orthogonal(linear(3, 3)), nn.Tanh(), linear(3, 2)), (3,)),
    "gated": lambda: (nn.Sequential(linear(3, 8), nn.GLU(), linear(4, 2)), (3,)),
    "embedding bag": lambda: (nn.Sequential(nn.EmbeddingBag(6, 3), linear(3, 2)), 6),
    "padding index": lambda: (nn.Sequential(nn.Embedding(6, 3, padding_idx=0), nn.Flatten(), linear(9, 2)), 6),
    "one hot": lambda: (Model(lambda m, x: m.a(F.one_hot(x, 6).to(m.a.weight).flatten(1)), a=linear(18, 2)), 6),
    "table": lambda: (Model(lambda m, x: m.p[x].sum(1) @ m.q, p=parameter(6, 3), q=parameter(3, 2)), 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model, shape = MODELS[name]()
    x = torch.randint(shape, (4, 3)) if isinstance(shape, int) else normal(4, *shape)
    loss_fn = oracles.distance
    if name == "autoencoder":
        loss_fn = lambda out: out[0].square().sum(1) + out[1].square().sum(1) + out[2].exp().sum(1)  # noqa: E731
    oracles.assert_right(model.double(), x, loss_fn)


@pytest.mark.parametrize(
    "x",
    [
        normal(4, 3).requires_grad_(),
        normal(1, 3).expand(4, 3),
        normal(3, 4).t(),
        (normal(4, 6)[:, ::2]),
    ],
    ids=["requires grad", "expanded", "transposed", "strided"],
)
def test_inputs_of_any_layout(x):
    oracles.assert_right(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double(), x)


def test_outputs_of_any_structure():
    def mixed(h):
        return {"twice": (h, h.sin()), "again": h, "nothing": None, "number": 3.5, "name": "x"}

    def loss(out):
        return (out["twice"][0] * out["twice"][1] + out["again"]).sum(1) * out["number"]

    oracles.assert_right(nn.Sequential(nn.Linear(4, 4), Calls(mixed)).double(), normal(3, 4), loss)

"""Recurrent layers of torch, as people write them: in layers, in loops, both ways, packed, with attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn as sequences

from hzo_lab.zoo.case import Case

FEATURES, UNITS, STEPS, BATCH, CLASSES = 5, 6, 7, 3, 4
_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "rnn": nn.RNN,
    "rnn-relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}
_CELLS: dict[str, Callable[..., nn.Module]] = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
_SHAPES: dict[str, dict[str, Any]] = {
    "one": {},
    "two-layers": {"num_layers": 2},
    "two-layers-dropout": {"num_layers": 2, "dropout": 0.3},
    "bidirectional": {"bidirectional": True},
    "time-first": {"batch_first": False},
    "no-bias": {"bias": False},
    "packed": {},
    "packed-bidirectional": {"bidirectional": True},
    "given-state": {},
    "many-to-many": {},
    "projection": {"proj_size": 4},
}


class Tagger(nn.Module):
    """A recurrent layer and a classifier of its last (or of every) output."""

    def __init__(self, kind: str, shape: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"batch_first": True, **_SHAPES[shape]}
        self.shape, self.layer = shape, _LAYERS[kind](FEATURES, UNITS, **options)
        width = options.get("proj_size", UNITS) * (2 if options.get("bidirectional") else 1)
        self.head, self.lstm = nn.Linear(int(width), CLASSES), kind == "lstm"

    def forward(self, x: Tensor) -> Any:
        if self.shape == "time-first":
            out, _ = self.layer(x.transpose(0, 1))
            return self.head(out[-1])
        if self.shape.startswith("packed"):
            packed = sequences.pack_padded_sequence(x, torch.tensor([STEPS, STEPS - 2, 3]), batch_first=True)
            out, _ = self.layer(packed)
            out, lengths = sequences.pad_packed_sequence(out, batch_first=True)
            return self.head(out[torch.arange(BATCH), lengths - 1])
        if self.shape == "given-state":
            h = x.new_ones(1, BATCH, UNITS)
            out, _ = self.layer(x, (h, h.clone()) if self.lstm else h)
            return self.head(out[:, -1])
        out, _ = self.layer(x)
        return self.head(out if self.shape == "many-to-many" else out[:, -1])


class Loop(nn.Module):
    """A cell in a Python loop over time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.head, self.lstm = _CELLS[kind](FEATURES, UNITS), nn.Linear(UNITS, CLASSES), kind == "lstm"

    def forward(self, x: Tensor) -> Any:
        h = x.new_zeros(x.shape[0], UNITS)
        state = (h, h) if self.lstm else h
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if self.lstm else state)


class Translator(nn.Module):
    """An encoder and a decoder with teacher forcing and additive attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.words = nn.Embedding(11, FEATURES)
        self.encoder = _LAYERS[kind](FEATURES, UNITS, batch_first=True)
        self.decoder = _LAYERS[kind](FEATURES, UNITS, batch_first=True)
        self.query, self.key, self.score = nn.Linear(UNITS, 5), nn.Linear(UNITS, 5), nn.Linear(5, 1)
        self.head = nn.Linear(2 * UNITS, 11)

    def forward(self, x: Tensor) -> Any:
        source, target = x.abs().mul(3).long().clamp(max=10)[..., 0], x.abs().mul(2).long().clamp(max=10)[..., 1]
        keys, state = self.encoder(self.words(source))
        queries, _ = self.decoder(self.words(target), state)
        scores = self.score(torch.tanh(self.query(queries)[:, :, None] + self.key(keys)[:, None])).squeeze(-1)
        context = scores.softmax(-1) @ keys
        return self.head(torch.cat([queries, context], -1))


def _all() -> Iterator[str]:
    yield from (f"{kind}/{shape}" for kind, shape in product(_LAYERS, _SHAPES))
    yield from ("lstm/projection", *(f"{kind}-cell/loop" for kind in _CELLS))
    yield from (f"{kind}/encoder-decoder" for kind in ("gru", "lstm"))


def families() -> list[str]:
    return [name for name in dict.fromkeys(_all()) if name.split("/")[0] == "lstm" or not name.endswith("projection")]


def build(name: str, dtype: torch.dtype) -> Case:
    kind, shape = name.split("/")
    torch.manual_seed(0)
    model: nn.Module
    if shape == "loop":
        model = Loop(kind.removesuffix("-cell"))
    elif shape == "encoder-decoder":
        model = Translator(kind)
    else:
        model = Tagger(kind, shape)
    model = model.train().to(dtype)
    x = torch.randn(BATCH, STEPS, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def call() -> Tensor:
        out = model(x)
        labels = torch.arange(out.shape[:-1].numel()) % CLASSES
        return F.cross_entropy(out.flatten(0, -2), labels)

    return Case(model, call)

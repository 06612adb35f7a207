"""Modules that the cases are made of, each with a way of computing that a chain has to understand."""

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """x + block(x)."""

    def __init__(self, *block):
        super().__init__()
        self.block = nn.Sequential(*block)

    def forward(self, x):
        return x + self.block(x)


class Concatenating(nn.Module):
    """A DenseNet block: every layer reads all that came before it."""

    def __init__(self, channels, growth, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(channels + k * growth, growth, 3, padding=1, padding_mode="replicate") for k in range(layers)
        )

    def forward(self, x):
        seen = [x]
        for layer in self.layers:
            seen.append(torch.tanh(layer(torch.cat(seen, 1))))
        return torch.cat(seen, 1)


class Attention(nn.Module):
    """Heads of attention, by hand or by torch's own function."""

    def __init__(self, width, heads, fused=False, causal=False):
        super().__init__()
        self.heads, self.fused, self.causal = heads, fused, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
            if self.causal:
                later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(later, float("-inf"))
            mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Language(nn.Module):
    """Embedding, learned positions, one block, and a head that shares the embedding's weight."""

    def __init__(self, words, width, tokens):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, 2, causal=True)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        x = self.embedding(words) + self.positions[: words.shape[1]]
        return self.head(x + self.attention(self.norm(x))).mean(1)


class Functional(nn.Module):
    """No layers: functions of parameters, of parameters made of parameters, and of buffers."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, width) * 0.4)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.low = nn.Parameter(torch.randn(width, 2) * 0.4)
        self.high = nn.Parameter(torch.randn(2, width) * 0.4)
        self.shift = nn.Parameter(torch.randn(width) * 0.1)
        self.register_buffer("mask", (torch.rand(width, width) > 0.3).double())

    def forward(self, x):
        h = torch.tanh(F.linear(x, self.first * self.mask, self.shift))
        h = F.layer_norm(h, (h.shape[-1],)) * self.scale
        return torch.addmm(self.shift, h, self.low @ self.high) + F.softplus(self.scale) * x


class Recurrent(nn.Module):
    """A cell that is called once for every time step, from a state of zeros; with ``fused``, torch's own loop."""

    def __init__(self, width, hidden, fused=False):
        super().__init__()
        self.cell = nn.GRU(width, hidden, batch_first=True) if fused else nn.GRUCell(width, hidden)
        self.fused = fused
        self.head = nn.Linear(hidden, 3)

    def forward(self, x):
        if self.fused:
            return self.head(self.cell(x)[0][:, -1])
        state = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class Twice(nn.Module):
    """One layer called twice, and its weight once more, transposed."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.decoder_bias = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x):
        h = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return F.linear(h, self.layer.weight.t(), self.decoder_bias)


class Inputs(nn.Module):
    """Two tensors, one of integers, and an option."""

    def __init__(self, width):
        super().__init__()
        self.kinds = nn.Embedding(4, width)
        self.mix = nn.Bilinear(width, width, width)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x, kind, *, scale=1.0):
        h = torch.tanh(self.mix(x, self.kinds(kind))) * scale
        return self.head(torch.cat([h, x], dim=-1).view(x.shape[0], -1))


class Affine(nn.Module):
    """A user's own layer: scale, shift, and a temperature that is one number."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.shift = nn.Parameter(torch.randn(width) * 0.1)
        self.temperature = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return (x * self.scale + self.shift) / self.temperature


class OwnLinear(nn.Linear):
    """Is a Linear by type and another function by value: no closed rule may be used."""

    def forward(self, x):
        return F.linear(x, self.weight**2 + self.weight, self.bias)


class InPlace(nn.Module):
    """Writes into what it has computed."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        h = self.first(x)
        h += x
        h.tanh_()
        g = self.second(h)
        g[:, 1:] = h[:, 1:] * 2
        return g.mul_(h)


class Branches(nn.Module):
    """Skips that overlap, splits, a branch that ends nowhere, and a dictionary of outputs."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.halves = nn.Linear(width // 2, width // 2)

    def forward(self, x):
        a = torch.tanh(self.layers[0](x))
        b = torch.tanh(self.layers[1](a))
        c = torch.tanh(self.layers[2](a + b))
        left, right = (b * c + a).chunk(2, -1)
        self.layers[3](c)
        return {"scores": torch.cat([self.halves(left), right], -1) + c, "hidden": b}


class Calls(nn.Module):
    """A layer, and a function of it and its input."""

    def __init__(self, function, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width).double()
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))

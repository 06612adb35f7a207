"""Parts, models around them, and comparisons that the tests of black boxes share."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from support.oracles import normal, relative_errors, worst

TOLERANCE = 1e-5


class Odd(nn.Module):
    """A layer that no table knows, with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, 4))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return torch.sin(self.gain * x + self.shift) * x.sum(-1, keepdim=True)


def physics(x):
    return torch.sin(x) * x.sum(-1, keepdim=True)


def squash(x):
    return torch.tanh(x) + 0.1 * x.flip(-1)


def split(x):
    return torch.sin(x) * x.sum(-1, keepdim=True), (x[:, :2] ** 2).cumsum(-1)


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class Model(nn.Module):
    def __init__(self, part, several=False):
        super().__init__()
        self.a, self.part, self.b, self.several = nn.Linear(3, 4), part, nn.Linear(4, 2), several

    def forward(self, x):
        y = self.part(self.a(x))
        return self.b(y[0]) + y[1] if self.several else self.b(y)


def chained(*parts):
    def f(x):
        for part in parts:
            x = part(x)
        return x

    return f


def problem(part, several=False):
    torch.manual_seed(0)
    return Model(part, several).double(), normal(5, 3), torch.arange(5) % 2


def gradients(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exact(model, x, y, part):
    twin = copy.deepcopy(model)
    twin.part = part if isinstance(part, nn.Module) else Function(part)
    return gradients(twin, x, y)


def compare(model, x, y, part):
    found = gradients(model, x, y)
    errors = relative_errors(found, exact(model, x, y, part))
    assert worst(errors) <= TOLERANCE

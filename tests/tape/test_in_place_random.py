"""Random programs of views and writes: what autograd accepts must have its gradient, and the tape must replay."""

import random

import pytest
import torch

from hzo.errors import TapeError
from hzo.reverse import record
from support.tape_oracle import leaves_of

PROGRAMS = 150


def sliced(t, d, draw):
    start = draw.randrange(t.shape[d] - 1)
    return t.narrow(d, start, draw.randrange(1, t.shape[d] - start))


VIEWS = {
    "slice": (lambda t, d: t.shape[d] > 1, sliced),
    "step": (
        lambda t, d: t.shape[d] > 2,
        lambda t, d, draw: t[(slice(None),) * d + (slice(draw.randrange(2), None, 2),)],
    ),
    "select": (lambda t, d: t.shape[d], lambda t, d, draw: t.select(d, draw.randrange(t.shape[d]))),
    "transpose": (lambda t, d: t.dim() > 1, lambda t, d, draw: t.transpose(d, draw.randrange(t.dim()))),
    "flat": (lambda t, d: t.is_contiguous(), lambda t, d, draw: t.view(-1)),
    "diagonal": (lambda t, d: d, lambda t, d, draw: t.diagonal(0, d - 1, d)),
    "unfold": (lambda t, d: t.shape[d] > 2, lambda t, d, draw: t.unfold(d, 2, draw.choice([2, 2, 1]))),
    "expand": (lambda t, d: 1 in t.shape, lambda t, d, draw: t.expand([3 if n == 1 else n for n in t.shape])),
    "squeeze": (lambda t, d: True, lambda t, d, draw: t.squeeze()),
    "unsqueeze": (lambda t, d: True, lambda t, d, draw: t.unsqueeze(d)),
}


def view_of(t, draw):
    """A random view."""
    if not t.dim():
        return t.unsqueeze(0)
    d = draw.randrange(t.dim())
    possible, make = VIEWS[draw.choice(list(VIEWS))]
    return make(t, d, draw) if possible(t, d) else t.unsqueeze(-1)


def quietly(t, source):
    with torch.no_grad():
        t.add_(0.1)


def last_to_first(t, source):
    if t.dim() and t.shape[0]:
        t[torch.tensor([0])] = 0.7 * t[torch.tensor([t.shape[0] - 1])]


WRITES = [
    lambda t, source: t.mul_(0.5),
    lambda t, source: t.add_(source, alpha=0.3),
    lambda t, source: t.copy_(source),
    lambda t, source: t.fill_(0.2),
    lambda t, source: t.masked_fill_(torch.rand(t.shape) > 0.6, 0.1),
    lambda t, source: t.sub_(source.clone()),
    lambda t, source: t.mul_(source.clone()),
    lambda t, source: t.sin_(),
    lambda t, source: torch.relu_(t),
    lambda t, source: t.t_() if t.dim() == 2 else t.unsqueeze_(0),
    last_to_first,
    quietly,
]


def write(t, pool, draw):
    """A random write, of a tensor that can be broadcast."""
    source = draw.choice(pool)
    while source.dim() and (source.dim() > t.dim() or source.shape != t.shape[t.dim() - source.dim() :]):
        source = source.sum(0)
    draw.choice(WRITES)(t, source)


def program(seed, x, y):
    """Views of and writes to what was made of ``x`` and ``y``, and of constants."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    pool = [x * 2, y + 1, torch.ones(3, 4, dtype=x.dtype), torch.zeros(2, 3, dtype=x.dtype)]
    for _ in range(draw.randrange(4, 16)):
        t = draw.choice(pool[-6:])
        if not t.numel():
            continue
        what = draw.random()
        if what < 0.4:
            pool.append(view_of(t, draw))
        elif what < 0.85:
            if all(stride or length == 1 for stride, length in zip(t.stride(), t.shape, strict=True)):
                write(t, pool, draw)
        elif what < 0.9:
            pool.append(t.detach())
        elif what < 0.95:
            with torch.no_grad():
                pool.append(view_of(t, draw))
        else:
            pool.append(t * 1.5)
    return pool


def value(pool):
    return sum((t * 0.9**k).sum() + (t * t).sum() * 0.1 for k, t in enumerate(pool) if t.requires_grad)


REFUSALS = ("inplace", "in-place", "single memory location", "no_grad", "views")


def by_autograd(seed, given):
    """The loss and autograd's gradient, or None where it refuses."""
    try:
        loss = value(program(seed, *given))
        if not isinstance(loss, torch.Tensor):
            return None
        return loss, torch.autograd.grad(loss, given, allow_unused=True)
    except RuntimeError as error:
        if not any(words in str(error) for words in REFUSALS):
            raise
        return None


def by_tape(step, loss):
    """The tape's gradient, or None for a write to a view that overlaps itself, which autograd gets wrong."""
    try:
        return {id(leaf): g for leaf, g in step.gradients(loss)}
    except TapeError as error:
        if "several times" not in str(error):
            raise
        return None


@pytest.mark.parametrize("first", range(0, PROGRAMS, 50))
def test_random_programs(first):
    tried = 0
    for seed in range(first, first + 50):
        torch.manual_seed(0)
        given = leaves_of((3, 4), (2, 3))
        exact = by_autograd(seed, given)
        if exact is None:
            continue
        with record() as step:
            loss = value(program(seed, *given))
        assert torch.equal(loss, exact[0]), seed
        found = by_tape(step, loss)
        if found is None:
            continue
        tried += 1
        for leaf, g in zip(given, exact[1], strict=True):
            zero = torch.zeros_like(leaf)
            got, expected = found.get(id(leaf), zero), zero if g is None else g
            torch.testing.assert_close(got, expected, msg=lambda text, s=seed: f"program {s}: {text}")
    assert tried > 20

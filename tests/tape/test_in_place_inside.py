"""In-place code inside custom Functions, derivatives and transforms."""

import pytest
import torch

from hzo.errors import TapeError
from hzo.reverse import record
from support.tape_oracle import leaves_of


class Doubled(torch.autograd.Function):
    """Writes to its argument and says so."""

    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Shifted(torch.autograd.Function):
    """The same, of two arguments, with a second result; its backward is not what its forward says."""

    @staticmethod
    def forward(ctx, x, y):
        x.add_(y)
        ctx.mark_dirty(x)
        return x, y * 3

    @staticmethod
    def backward(ctx, g, h):
        return g * 5, g + 3 * h


class Flat(torch.autograd.Function):
    """Returns a view."""

    @staticmethod
    def forward(ctx, x):
        return x.view(-1)

    @staticmethod
    def backward(ctx, g):
        return g.view(3, 4) * 7


def function_that_writes(x, w):
    h = x * 1
    v = h[0]
    Doubled.apply(h)
    return h * h, v * 3


def function_that_writes_beside_views(x, w):
    h = x * 1
    v = h[1:]
    _, z = Shifted.apply(h, w * 2)
    v.mul_(2)
    return h * 1, v * 3, z


def function_that_writes_to_a_constant(x, w):
    h = torch.ones(3, 4, dtype=x.dtype)
    v = h[1]
    Shifted.apply(h, w * 2)
    return h * h, v * x[0]


def written_behind_a_function(x, w):
    h = x * 1
    k = Doubled.apply(h)
    k[0] = w[0]
    return h * k


def function_that_returns_a_view(x, w):
    h = x * 1
    v = Flat.apply(h)
    u = v * 2
    h.mul_(2)
    return h * 3, h * h, u


def derivative_of_writes(x, w):
    h = x * w
    h[0] = h[1] * 2
    h[:, 1].mul_(3)
    (g,) = torch.autograd.grad(h.sin().sum(), x, create_graph=True)
    return g * g + h


def derivative_of_a_filled_buffer(x, w):
    h = torch.zeros(3, 4, dtype=x.dtype)
    h[1] = x[0] * w[0]
    h.t()[2] += x[:, 1]
    (g,) = torch.autograd.grad((h**3).sum(), x, create_graph=True)
    return g * w, h


def written_derivative(x, w):
    h = torch.tanh((x * w).relu_())
    (g,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    g = g * 1
    g[0] += w[0]
    return g * g


def derivative_through_a_flat_view(x, w):
    h = x * w
    h.view(-1)[2:7].exp_()
    (g,) = torch.autograd.grad((h * h).sum(), x, create_graph=True)
    return g.sum() * w


def row(w):
    def function(r):
        z = r * 2
        z[1] = z[0].clone() * w[0, 0]
        z.mul_(w[1])
        return z * z

    return function


TRANSFORMS = {
    "vmap": lambda x, w: torch.func.vmap(row(w))(x),
    "grad": lambda x, w: torch.func.grad(lambda r: row(w)(r).sum())(x[0]) * x,
    "grad under vmap": lambda x, w: torch.func.vmap(torch.func.grad(lambda r: row(w.detach())(r).sum()))(x) * w,
    "jvp": lambda x, w: torch.func.jvp(row(w), (x[0],), (w[0],)),
    "jacfwd": lambda x, w: torch.func.jacfwd(row(w))(x[0]),
    "jacrev": lambda x, w: torch.func.jacrev(row(w))(x[0]),
    "hessian": lambda x, w: torch.func.hessian(lambda r: row(w)(r).sum())(x[0]).sum() * x,
    "jvp of a multiple": lambda x, w: torch.func.jvp(lambda r: (3 * r - 1) / 2, (x,), (w * w,)),
}

CASES = {
    function.__name__: function
    for function in (
        function_that_writes,
        function_that_writes_beside_views,
        function_that_writes_to_a_constant,
        written_behind_a_function,
        function_that_returns_a_view,
        derivative_of_writes,
        derivative_of_a_filled_buffer,
        written_derivative,
        derivative_through_a_flat_view,
    )
} | TRANSFORMS


@pytest.mark.parametrize("name", CASES)
def test_gradient(name):
    def value(results):
        results = results if isinstance(results, tuple) else (results,)
        return sum((r.sin() * 0.7**k).sum() for k, r in enumerate(results) if r.requires_grad)

    given = leaves_of((3, 4), (3, 4))
    expected_loss = value(CASES[name](*given))
    expected = torch.autograd.grad(expected_loss, given, allow_unused=True)
    with record() as step:
        loss = value(CASES[name](*given))
    torch.testing.assert_close(loss, expected_loss)
    found = {id(leaf): g for leaf, g in step.gradients(loss)}
    assert any(g is not None and g.any() for g in expected)
    for leaf, g in zip(given, expected, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(found.get(id(leaf), zero), zero if g is None else g)


def test_function_that_writes_to_a_view_is_an_error():
    """Autograd hides its node behind one of its own."""
    (x,) = leaves_of((3, 4))
    with record() as step:
        h = x * 1
        Doubled.apply(h[0])
        loss = h.sum()
    with pytest.raises(TapeError, match="custom Function that writes to a view"):
        step.gradients(loss)

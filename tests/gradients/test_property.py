"""Networks, trees and options drawn at random, against autograd."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hzo
from support import oracles
from support.cases import Problem
from support.networks import Affine, Attention, Residual

BATCH = 2


class Concatenated(nn.Module):
    """The input beside what a layer makes of it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.cat([x, self.layer(x)], -1)


class Gated(nn.Module):
    """Two branches, multiplied, over a skip from further back."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        a = torch.tanh(self.a(x))
        return a * torch.sigmoid(self.b(a)) + x


class Whole(nn.Module):
    """Hides that there are stages: traced, and cut where one tensor is alive."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Shared(nn.Module):
    """One layer, several times."""

    def __init__(self, width, times):
        super().__init__()
        self.layer, self.times = nn.Linear(width, width), times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


@st.composite
def vector_network(draw):
    """A Sequential on vectors: widths, depth, skips, branches and activations at random."""
    width = first = draw(st.integers(1, 4))
    layers = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(
            st.sampled_from(["linear", "activation", "residual", "concatenation", "gate", "shared", "norm", "own"])
        )
        if kind == "linear":
            wider = draw(st.integers(1, 4))
            layers.append(nn.Linear(width, wider, bias=draw(st.booleans())))
            width = wider
        elif kind == "activation":
            layers.append(draw(st.sampled_from([nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.Softsign]))())
        elif kind == "residual":
            inner = draw(st.integers(1, 3))
            layers.append(Residual(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, width)))
        elif kind == "concatenation" and width <= 4:
            layers.append(Concatenated(nn.Sequential(nn.Linear(width, 1), nn.Tanh())))
            width += 1
        elif kind == "gate":
            layers.append(Gated(width))
        elif kind == "shared":
            layers.append(Shared(width, draw(st.integers(1, 3))))
        elif kind == "norm" and width > 2:  # of two elements only the sign is left
            layers.append(draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))(width))
        else:
            layers.append(Affine(width))
    layers.append(nn.Linear(width, 3))
    return nn.Sequential(*layers), (BATCH, first)


@st.composite
def image_network(draw):
    """Convolutions with options at random on small images."""
    channels, size, layers = 2, 5, []
    for _ in range(draw(st.integers(1, 3))):
        kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        padding, groups = draw(st.integers(0, 1)), draw(st.sampled_from([1, 2]))
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        after = (size + 2 * padding - kernel) // stride + 1
        if after < 2:
            break
        options = {"stride": stride, "padding": padding, "groups": groups, "padding_mode": mode}
        layers += [nn.Conv2d(channels, 4, kernel, **options), nn.Tanh()]
        if draw(st.booleans()):
            layers.append(nn.GroupNorm(2, 4))
        channels, size = 4, after
    head = draw(
        st.sampled_from([[nn.Flatten()], [nn.AvgPool2d(2, 1), nn.Flatten()], [nn.AdaptiveAvgPool2d(1), nn.Flatten()]])
    )
    with torch.no_grad():
        width = nn.Sequential(*layers, *head)(torch.zeros(1, 2, 5, 5)).shape[1]
    return nn.Sequential(*layers, *head, nn.Linear(width, 3)), (BATCH, 2, 5, 5)


@st.composite
def token_network(draw):
    width = 2 * draw(st.integers(1, 2))
    layers = [nn.Linear(2, width)]
    for _ in range(draw(st.integers(1, 2))):
        block = Attention(width, draw(st.sampled_from([1, 2])), fused=draw(st.booleans()), causal=draw(st.booleans()))
        layers.append(draw(st.sampled_from([Residual, nn.Sequential]))(block))
    tokens = draw(st.integers(1, 3))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * tokens, 3)), (BATCH, tokens, 2)


OPTIONS = st.fixed_dictionaries(
    {
        "tree": st.sampled_from(["flat", "bisect", "stagewise", "planned", 2, 3, 4, 7]),
        "scheme": st.sampled_from(["central", "forward"]),
        "assume": st.sampled_from(["nothing", "locality", "structure"]),
    }
)


@settings(max_examples=150)
@given(
    network=st.one_of(vector_network(), image_network(), token_network()),
    options=OPTIONS,
    seed=st.integers(0, 2**20),
    frozen=st.sets(st.integers(0, 12), max_size=3),
    whole=st.booleans(),
    memory=st.sampled_from([None, None, 2000]),
)
def test_matches_autograd(network, options, seed, frozen, whole, memory):
    model, shape = network
    model = model.double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.normal_(std=0.7)
            p.requires_grad_(k not in frozen or k == 0)
    x, y = torch.randn(shape, dtype=torch.float64), torch.arange(BATCH)
    model = Whole(model) if whole else model
    problem = Problem(model, F.cross_entropy, x, y)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, **options)
    with hzo.count_queries() as count:
        found, loss = hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=plan, memory=memory)
    exact, reference = oracles.gradients(problem)
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)
    tolerance = oracles.CENTRAL if options["scheme"] == "central" else oracles.FORWARD
    # Norms of few elements may be as steep as 1/√ε: absolute, beside the largest gradient, not by parameter.
    scale = max(float(g.norm()) for g in exact.values())
    for name, gradient in exact.items():
        assert float((found[name] - gradient).norm()) <= tolerance * max(scale, 1e-3), name
    assert count.queries == plan.queries
    assert count.stage_evaluations == plan.stage_evaluations
    assert count.forward_equivalents == plan.forward_equivalents


@settings(max_examples=60)
@given(
    batch=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    scheme=st.sampled_from(["central", "forward"]),
    memory=st.sampled_from([None, 1, 500]),
    seed=st.integers(0, 2**20),
)
def test_vjp_of_any_shape(batch, sizes, scheme, memory, seed):
    torch.manual_seed(seed)
    n = torch.Size(sizes[:-1]).numel()
    matrix = torch.randn(n, sizes[-1], dtype=torch.float64)
    f = lambda a: torch.sin(a.flatten(1) @ matrix)  # noqa: E731
    a = torch.randn(batch, *sizes[:-1], dtype=torch.float64)
    g = torch.randn(batch, sizes[-1], dtype=torch.float64)
    exact = ((a.flatten(1) @ matrix).cos() * g) @ matrix.T
    found = hzo.estimate_vjp(f, a, g, scheme=scheme, memory=memory)
    tolerance = oracles.CENTRAL if scheme == "central" else oracles.FORWARD
    assert found.shape == a.shape
    assert float((found.flatten(1) - exact).norm()) <= tolerance * float(matrix.norm() ** 2 * g.norm())

"""Patterns against Jacobians, colored gradients against autograd, and what random signs cost."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hzo
from hzo.locality import slice_locality
from hzo.verification.coloring import allows
from support import architectures, oracles
from support.cases import CASES
from support.networks import Residual


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def conv(inside, outside, kernel=3, **options):
    return nn.Conv2d(inside, outside, kernel, **{"padding": kernel // 2, **options})


# Each with the shape of a sample; the pattern must cover the Jacobian, and where ``tight`` be no larger.
TIGHT = {
    "conv": (conv(2, 3), (2, 4, 5)),
    "conv, stride and dilation": (conv(2, 2, stride=2, dilation=2), (2, 7, 6)),
    "conv, even kernel": (nn.Conv2d(1, 2, (2, 3), padding=(1, 0)), (1, 4, 4)),
    "conv, groups": (conv(4, 6, groups=2), (4, 3, 3)),
    "conv, depthwise multiplied": (conv(2, 4, groups=2), (2, 3, 3)),
    "conv, circular": (conv(1, 1, padding_mode="circular"), (1, 5, 4)),
    "conv, reflect": (conv(1, 1, 5, padding_mode="reflect"), (1, 5, 4)),
    "conv, replicate": (conv(1, 1, padding_mode="replicate"), (1, 5, 4)),
    "conv 1d": (nn.Conv1d(2, 2, 4, stride=3), (2, 11)),
    "conv 3d": (nn.Conv3d(1, 1, 2), (1, 3, 2, 3)),
    "transposed": (nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1), (2, 3, 3)),
    "transposed, dilation and groups": (nn.ConvTranspose2d(2, 4, 2, stride=3, dilation=2, groups=2), (2, 3, 2)),
    "function conv": (Call(lambda x: F.avg_pool2d(x, 3, 1, 1)), (2, 4, 4)),
    "average": (nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True), (2, 6, 5)),
    "adaptive": (nn.AdaptiveAvgPool2d((3, 2)), (2, 5, 7)),
    "nearest": (nn.Upsample(size=(5, 7)), (1, 3, 3)),
    "nearest, smaller": (Call(lambda x: F.interpolate(x, scale_factor=0.5)), (1, 5, 6)),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 3, 4)),
    "bilinear, corners": (nn.Upsample(size=(5, 4), mode="bilinear", align_corners=True), (1, 3, 3)),
    "bicubic": (nn.Upsample(scale_factor=1.5, mode="bicubic"), (1, 6, 6)),
    "linear on tokens": (nn.Linear(3, 2), (4, 3)),
    "layer norm": (nn.LayerNorm(3), (4, 3)),
    "layer norm over two": (nn.LayerNorm([4, 3]), (2, 4, 3)),
    "rms norm": (nn.RMSNorm(3), (4, 3)),
    "group norm": (nn.GroupNorm(2, 4), (4, 2, 3)),
    "instance norm": (nn.InstanceNorm1d(3), (3, 4)),
    "batch norm, eval": (nn.BatchNorm2d(3).eval(), (3, 2, 2)),
    "softmax": (nn.Softmax(-1), (3, 4)),
    "glu": (nn.GLU(-1), (3, 4)),
    "mean": (Call(lambda x: x.mean(1)), (3, 4)),
    "sum, kept": (Call(lambda x: x.sum((1, 3), keepdim=True)), (2, 3, 4)),
    "scaled": (Call(lambda x: x * torch.arange(1.0, 4).double().view(3, 1)), (3, 4)),
    "broadcast": (Call(lambda x: x.unsqueeze(1) + torch.ones(2, 1, dtype=x.dtype)), (4,)),
    "permute": (Call(lambda x: x.permute(0, 3, 1, 2)), (2, 3, 4)),
    "flatten": (nn.Flatten(), (2, 3, 2)),
    "split axis": (Call(lambda x: x.unflatten(1, (2, 3))), (6, 2)),
    "view back": (Call(lambda x: x.reshape(x.shape[0], -1).view(x.shape[0], 2, 3)), (2, 3)),
    "cat": (Call(lambda x: torch.cat([x, x.flip(1)], 1)), (3, 2)),
    "stack": (Call(lambda x: torch.stack([x, x.tanh()], 2)), (3, 2)),
    "chunk": (Call(lambda x: x.chunk(2, 1)[1]), (4, 3)),
    "index": (Call(lambda x: x[:, 1::2, None, ..., 0]), (5, 2, 3)),
    "pad": (Call(lambda x: F.pad(x, (1, 2, 0, 1), value=3.0)), (2, 3, 3)),
    "reflection": (nn.ReflectionPad2d(1), (1, 3, 3)),
    "circular": (nn.CircularPad2d(1), (1, 3, 3)),
    "pixel shuffle": (nn.PixelShuffle(2), (4, 2, 2)),
    "roll": (Call(lambda x: x.roll(1, 2)), (2, 4)),
    "repeat": (Call(lambda x: x.repeat(1, 2, 1)), (2, 3)),
    "tokens folded into the batch": (Call(lambda x: x.reshape(-1, 3).tanh()), (4, 3)),
    "patches": (
        nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.Flatten(2), Call(lambda x: x.transpose(1, 2))),
        (1, 4, 4),
    ),
    "matrix on the right": (Call(lambda x: x @ torch.randn(4, 2, dtype=x.dtype).abs()), (3, 4)),
    "einsum": (Call(lambda x: torch.einsum("bij,jk->bki", x, torch.ones(4, 2, dtype=x.dtype))), (3, 4)),
    "residual": (Residual(conv(2, 2), nn.Tanh(), conv(2, 2)), (2, 7, 7)),
}
COVERED = {
    "maximum": (nn.MaxPool2d(3, stride=2, padding=1, dilation=1, ceil_mode=True), (2, 6, 5)),
    "maximum, dilated": (nn.MaxPool1d(2, dilation=2), (2, 7)),
    "adaptive maximum": (nn.AdaptiveMaxPool1d(3), (2, 7)),
    "power average": (nn.LPPool2d(2, 2), (2, 4, 4)),
    "attention": (Call(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), (2, 3, 2)),
    "scores": (Call(lambda x: x @ x.transpose(1, 2)), (3, 2)),
    "running sum": (Call(lambda x: x.cumsum(1)), (4, 2)),
    "two paths of different shape": (Call(lambda x: x.flatten(1) + x.transpose(1, 2).flatten(1)), (3, 3)),
    "gather": (Call(lambda x: x[:, torch.tensor([2, 0])]), (3, 2)),
    "joined axes cut elsewhere": (Call(lambda x: x.reshape(x.shape[0], 3, 4)), (2, 6)),
    "whole network": (
        nn.Sequential(conv(1, 2), nn.Tanh(), nn.AvgPool2d(2), conv(2, 2), nn.Flatten(), nn.Linear(18, 3)),
        (1, 6, 6),
    ),
}


@pytest.mark.parametrize("name", [*TIGHT, *COVERED])
def test_patterns_against_jacobians(name):
    model, shape = {**TIGHT, **COVERED}[name]
    model = model.double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    graph = hzo.trace(model, x).traced
    (output,) = graph.outputs
    found = slice_locality(graph, graph.inputs[0], range(len(graph.operations)), (output,))
    (pattern,) = found.patterns
    value, result = graph.values[graph.inputs[0]], graph.values[output]

    def rows(moved):
        return result.rows(model(value.from_rows(moved, 2)), 2)[0]

    jacobian = torch.autograd.functional.jacobian(rows, value.rows(x, 2))[:, 0]  # of one sample
    places = list(torch.cartesian_prod(*(torch.arange(n) for n in pattern.output)).view(len(jacobian), -1).tolist())
    elements = torch.cartesian_prod(*(torch.arange(n) for n in pattern.value)).view(jacobian.shape[1], -1).tolist()
    allowed = torch.tensor([[allows(pattern, place, element) for element in elements] for place in places])
    assert not bool(((jacobian != 0) & ~allowed).any())
    if name in TIGHT:
        assert torch.equal(jacobian != 0, allowed)


def solve(model, x, plan, loss_fn=F.cross_entropy, y=None):
    """The largest relative error of a parameter's gradient; predicted counts must be those counted."""
    y = torch.arange(len(x)) % 3 if y is None else y
    with hzo.count_queries() as count:
        found, _ = hzo.grad_and_value(hzo.trace(model, x), loss_fn, x, y, plan=plan)
    assert count.queries == plan.queries
    assert count.stage_evaluations == plan.stage_evaluations
    assert count.forward_equivalents == pytest.approx(plan.forward_equivalents, rel=1e-12)
    model.zero_grad()
    loss_fn(model(x), y).backward()
    exact = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return oracles.worst(oracles.relative_errors(found, exact))


@st.composite
def stacks(draw):
    """A random stack of layers over space on a map of 6 to 8, with a linear head."""
    channels, layers = draw(st.sampled_from([1, 2])), []
    height, width = draw(st.integers(6, 8)), draw(st.integers(6, 8))
    now = channels
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "conv", "grouped", "transposed", "pool", "up", "norm", "residual"]))
        if kind == "conv":
            after = draw(st.integers(1, 3))
            mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
            options = {"stride": draw(st.integers(1, 2)), "padding": 1, "padding_mode": mode}
            layers.append(nn.Conv2d(now, after, draw(st.integers(2, 3)), **options))
            now = after
        elif kind == "grouped":
            layers.append(nn.Conv2d(now, 2 * now, 3, padding=2, dilation=2, groups=now))
            now *= 2
        elif kind == "transposed":
            layers.append(nn.ConvTranspose2d(now, 2, 2, stride=draw(st.integers(1, 2))))
            now = 2
        elif kind == "pool":
            layers.append(draw(st.sampled_from([nn.AvgPool2d(3, 2, 1), nn.LPPool2d(2, 2, 1), nn.AdaptiveAvgPool2d(4)])))
        elif kind == "up":
            mode = draw(st.sampled_from(["nearest", "bilinear"]))
            layers.append(nn.Upsample(size=(5, 6), mode=mode))
        elif kind == "norm":
            layers.append(
                draw(st.sampled_from([nn.GroupNorm(1, now), nn.InstanceNorm2d(now), nn.BatchNorm2d(now).eval()]))
            )
        else:
            layers.append(Residual(conv(now, now), nn.Tanh(), conv(now, now)))
        layers.append(draw(st.sampled_from([nn.Tanh(), nn.Softplus(), nn.Identity()])))
    torch.manual_seed(draw(st.integers(0, 9)))
    model = nn.Sequential(*layers)
    x = torch.randn(2, channels, height, width).double()
    with torch.no_grad():
        model = nn.Sequential(conv(channels, channels), *layers, nn.Flatten()).double()
        size = model(x).shape[1]
    return model.append(nn.Linear(size, 3).double()), x


def usable(model, x):
    """Powers and tiny statistics groups have no gradient near zero; these are not about coloring."""
    found = torch.autograd.grad(F.cross_entropy(model(x), torch.arange(len(x)) % 3), list(model.parameters()))
    return all(bool(g.isfinite().all()) for g in found)


@settings(max_examples=60)
@given(
    stacks(), st.sampled_from(["bisect", "flat", "stagewise", "planned"]), st.sampled_from(["locality", "structure"])
)
def test_random_stacks_against_autograd(stack, tree, assume):
    model, x = stack
    if usable(model, x):
        assert solve(model, x, hzo.plan(hzo.trace(model, x), tree=tree, assume=assume)) <= 1e-5


@settings(max_examples=15)
@given(stacks())
def test_random_stacks_pass_the_checker(stack):
    model, x = stack
    chain = hzo.trace(model, x)
    hzo.check_coloring(chain, x, hzo.plan(chain, tree="bisect", assume="locality"), elements=10)


@pytest.mark.parametrize(
    "name", ["convolutions", "padding_modes", "other_dimensions", "transposed", "dense_net", "norms"]
)
def test_networks_of_the_other_tests_pass_the_checker(name):
    problem = CASES[name].build()
    chain = hzo.trace(problem.model, problem.x)
    plan = hzo.plan(chain, tree="bisect", assume="locality")
    assert any(node.probe is not None and node.probe.kind == "colored" for node in plan.nodes)
    hzo.check_coloring(chain, problem.x, plan, elements=10)


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (architectures.resnet18, 32),
        (architectures.mobilenet, 16),
        (architectures.DenseNet, 8),
        (architectures.UNet, 16),
        (architectures.ConvNeXt, 16),
        (architectures.Mixer, 8),
        (architectures.ViT, 8),
    ],
)
@pytest.mark.parametrize("tree", ["planned", "bisect"])
def test_patterns_cover_what_architectures_do(build, size, tree, monkeypatch):
    """Skips, concatenation, attention, resizing: single elements moved, by what they really change."""
    monkeypatch.setattr(hzo.verification.coloring, "check_orthogonality", lambda *_: None)  # slow, and tested above
    model, x = build().double().eval(), torch.randn(2, 3, size, size, dtype=torch.float64)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, tree=tree, assume="locality")
    assert any(node.probe is not None and node.probe.kind == "colored" for node in plan.nodes)
    hzo.check_coloring(chain, x, plan, elements=8)


def residual_cnn(blocks=3, width=4, activation=nn.Tanh):
    """Without norms, as they couple places (or samples), and with a last layer over space, so that windows stay."""
    torch.manual_seed(0)
    body = [Residual(conv(width, width), activation(), conv(width, width)) for _ in range(blocks)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    return nn.Sequential(conv(2, width), activation(), *body, *head).double()


def test_the_paper_on_a_residual_network_without_norms():
    """Preset ``paper``: colors per node as the windows say, counted as predicted, gradient exact."""
    model, x = residual_cnn(4), torch.randn(2, 2, 12, 12, dtype=torch.float64)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, **hzo.presets.paper)
    taken = {
        (chain.traced.describe(node.target), chain.traced.describe(node.source)): node.probe.coloring.counts[1:]
        for node in plan.nodes
        if node.probe is not None and node.probe.coloring is not None
    }
    assert taken["boundary 3", "boundary 4"] == (4, 5, 5)  # a block: two convolutions
    assert taken["boundary 1", "boundary 4"] == (4, 9, 9)  # two blocks: four
    assert all(
        counts == (4, 3, 3) for (target, _), counts in taken.items() if target.startswith("inside")
    )  # inside a block from its end: one
    assert solve(model, x, plan) <= 1e-6
    everything = hzo.plan(chain, tree="bisect", assume="nothing")
    assert plan.queries < everything.queries / 3


def test_forward_differences_and_chunks():
    model, x = residual_cnn(2), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    chain = hzo.trace(model, x)
    assert solve(model, x, hzo.plan(chain, tree="bisect", assume="locality", scheme="forward")) <= oracles.FORWARD
    plan, y = hzo.plan(chain, tree="bisect", assume="locality"), torch.tensor([0, 1])
    whole, _ = hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=plan)
    for memory in (1, 200_000):
        parts, _ = hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=plan, memory=memory)
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-6, atol=1e-9)


def test_dropout_maximum_and_kinks():
    layers = (conv(1, 2), nn.Dropout2d(0.5), nn.ReLU(inplace=True), conv(2, 2), nn.MaxPool2d(2), nn.Dropout(0.2))
    model = nn.Sequential(*layers, conv(2, 2), nn.Flatten(), nn.Linear(18, 3)).double()
    x, y = torch.randn(2, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1])
    chain = hzo.trace(model, x)
    torch.manual_seed(3)
    found, _ = hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=hzo.plan(chain, tree="flat", assume="locality"))
    torch.manual_seed(3)
    F.cross_entropy(model(x), y).backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    assert oracles.worst(oracles.relative_errors(found, exact)) <= oracles.KINKS


def test_locality_does_not_hide_batch_norm_in_train_mode():
    block = architectures.ProjectionBlock(2, 2, 1)
    x = torch.randn(2, 2, 6, 6)
    chain = hzo.trace(nn.Sequential(conv(2, 2), block), x)
    with pytest.raises(hzo.errors.CoupledSamplesError):
        hzo.plan(chain, tree="bisect", assume="locality")
    chain = hzo.trace(nn.Sequential(conv(2, 2), block).eval(), x)
    assert any(
        node.probe is not None and node.probe.kind == "colored"
        for node in hzo.plan(chain, tree="bisect", assume="locality").nodes
    )


# ---- approximate colorings ------------------------------------------------------------------------------------------


def linear_problem():
    """Two convolutions in a row, so that the exact cotangent is known and curvature plays no part."""
    torch.manual_seed(1)
    model = nn.Sequential(conv(1, 2), conv(2, 2), conv(2, 1)).double()
    x, y = torch.randn(2, 1, 9, 9, dtype=torch.float64), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, tree="flat", assume="locality", spacing=2)
    exact, _ = hzo.grad_and_value(chain, F.mse_loss, x, y, plan=hzo.plan(chain, tree="flat", assume="locality"))
    return chain, plan, x, y, exact


def test_random_signs_are_unbiased_and_tell_their_error():
    """z-scores of the mean over gradients, and the reported error against the one that is seen."""
    chain, plan, x, y, _ = linear_problem()
    exact = hzo.cotangents(chain, F.mse_loss, x, y, plan=hzo.plan(chain, tree="flat", assume="locality"))[1]
    torch.manual_seed(0)
    estimates, reported, norms = [], [], []
    for _ in range(400):
        with hzo.report_crosstalk() as report:
            estimates.append(hzo.cotangents(chain, F.mse_loss, x, y, plan=plan)[1])
        (node,) = (node for node in report.nodes if node.where == "boundary 1")
        reported.append(node.squared_error)
        norms.append(node.squared_norm)
    found = torch.stack(estimates)
    assert not torch.equal(found[0], found[1])  # other signs every time
    z = (found.mean(0) - exact) / (found.std(0) / len(found) ** 0.5)
    assert float(z.abs().max()) < 4.5
    assert float(z.square().mean()) == pytest.approx(1, abs=0.35)
    seen = (found - exact).square().sum((1, 2, 3, 4)).mean()
    assert sum(reported) / len(reported) == pytest.approx(float(seen), rel=0.1)
    assert sum(norms) / len(norms) == pytest.approx(float(exact.square().sum()), rel=0.1)


def test_the_mean_of_many_gradients_approaches_the_exact_one():
    chain, plan, x, y, exact = linear_problem()

    def error(count):
        means = {name: torch.zeros_like(g) for name, g in exact.items()}
        for _ in range(count):
            for name, g in hzo.grad_and_value(chain, F.mse_loss, x, y, plan=plan)[0].items():
                means[name] += g / count
        return oracles.relative_errors(means, exact)["0.weight"]

    torch.manual_seed(0)
    once = sum(error(1) for _ in range(20)) / 20
    assert error(100) == pytest.approx(once / 10, rel=0.6)


def test_wider_spacing_has_less_cross_talk():
    model, x = residual_cnn(3), torch.randn(4, 2, 14, 14, dtype=torch.float64)
    chain, y = hzo.trace(model, x), torch.arange(4) % 3
    errors, directions = [], []
    for spacing in (2, 4, 6, None):
        plan = hzo.plan(chain, tree="bisect", assume="locality", spacing=spacing)
        torch.manual_seed(0)
        with hzo.count_queries() as count, hzo.report_crosstalk() as report:
            hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=plan)
        assert count.queries == plan.queries
        assert plan.random == (spacing is not None)
        whole = [node.relative_error for node in report.nodes if node.where == "boundary 1"]
        errors.append(whole[0] if whole else 0.0)
        directions.append(plan.queries)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert directions == sorted(directions)


def test_signs_repeat_with_the_seed_and_leave_parameters_alone():
    chain, plan, x, y, _ = linear_problem()
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(hzo.grad_and_value(chain, F.mse_loss, x, y, plan=plan)[0])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_exact_plans_draw_no_random_number():
    model, x = residual_cnn(1), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    before = torch.get_rng_state()
    plan = hzo.plan(hzo.trace(model, x), tree="bisect", assume="locality", spacing=9)
    assert not plan.random  # exact colorings are no dearer
    hzo.grad_and_value(hzo.trace(model, x), F.cross_entropy, x, torch.tensor([0, 1]), plan=plan)
    assert torch.equal(before, torch.get_rng_state())


def test_a_report_without_approximate_nodes():
    with hzo.report_crosstalk() as report:
        pass
    assert report.relative_error == 0
    assert str(report) == "no approximate node"

"""How many colors segments take, and the brute-force checker."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hzo
from hzo.errors import ColoringError, PlanError
from hzo.finite_differences.coloring import Coloring, color, thin
from hzo.finite_differences.sparsity import Pattern, bits, compose, identity, matrix_of
from hzo.locality import slice_locality
from hzo.tape.marks import Marks
from hzo.verification.coloring import check_orthogonality
from support.networks import Residual


def locality_of(model, *shape, batch=2):
    """From the input of a model to its output, over all its operations."""
    graph = hzo.trace(model, torch.randn(batch, *shape)).traced
    return slice_locality(graph, graph.inputs[0], range(len(graph.operations)), graph.outputs)


def colors(model, *shape):
    """Colors along every axis of the input but the batch."""
    found = color(locality_of(model, *shape).patterns)
    check_orthogonality(found)
    assert found.counts[0] == 1
    return found.counts[1:]


def conv(inside, outside, kernel=3, **options):
    return nn.Conv2d(inside, outside, kernel, **{"padding": kernel // 2, **options})


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_stacked_convolutions_take_c_times_2d_plus_1_squared(depth, channels):
    """The paper's spatial parallel perturbation: 9 C for one, C (2d + 1)² for d of them."""
    body = [m for _ in range(depth) for m in (conv(channels, channels), nn.Tanh())]
    found = color(locality_of(nn.Sequential(*body), channels, 9, 10).patterns)
    assert found.counts == (1, channels, 2 * depth + 1, 2 * depth + 1)
    assert found.directions == channels * (2 * depth + 1) ** 2


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (conv(2, 4, 1, padding=0), (2, 5, 5), (2, 1, 1)),
        (conv(4, 4, groups=4), (4, 6, 6), (1, 3, 3)),
        (conv(6, 4, groups=2), (6, 6, 6), (3, 3, 3)),
        (conv(2, 2, stride=2), (2, 8, 8), (2, 3, 3)),
        (conv(2, 2, 2, stride=2, padding=0), (2, 8, 8), (2, 2, 2)),
        (conv(2, 2, 1, stride=3, padding=0), (2, 8, 8), (2, 1, 1)),
        (conv(2, 2, 5, padding=0), (2, 8, 8), (2, 5, 5)),
        (conv(2, 2, padding_mode="circular"), (2, 6, 9), (2, 3, 3)),
        (conv(2, 2, padding_mode="replicate"), (2, 8, 8), (2, 3, 3)),
        (conv(2, 2, padding_mode="reflect"), (2, 8, 8), (2, 3, 3)),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 4, 4), (2, 1, 1)),
        (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 5, 5), (2, 2, 2)),
        (nn.Conv1d(3, 2, 3), (3, 9), (3, 3)),
        (nn.Conv3d(1, 2, 3, padding=1), (1, 4, 5, 6), (1, 3, 3, 3)),
        (nn.MaxPool2d(2), (3, 8, 8), (1, 2, 2)),
        (nn.AvgPool2d(3, stride=2, padding=1), (3, 9, 9), (1, 3, 3)),
        (nn.AdaptiveAvgPool2d(2), (3, 8, 6), (1, 4, 3)),
        (nn.AdaptiveAvgPool2d(1), (3, 4, 4), (1, 4, 4)),
        (nn.Upsample(scale_factor=2), (3, 4, 4), (1, 1, 1)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (3, 5, 5), (1, 2, 2)),
        (nn.ZeroPad2d(1), (3, 4, 4), (1, 1, 1)),
        (nn.PixelShuffle(2), (8, 3, 3), (1, 1, 1)),
        (nn.Linear(5, 4), (7, 5), (1, 5)),
        (nn.Linear(5, 4), (5,), (5,)),
        (nn.LayerNorm(5), (7, 5), (1, 5)),
        (nn.GroupNorm(2, 6), (6, 3, 3), (3, 3, 3)),
        (nn.InstanceNorm2d(6), (6, 3, 3), (1, 3, 3)),
        (nn.BatchNorm2d(6).eval(), (6, 3, 3), (1, 1, 1)),
        (nn.Softmax(dim=1), (4, 5), (4, 1)),
        (nn.GLU(dim=1), (6, 5), (2, 1)),
        (nn.Sequential(nn.Tanh(), nn.Flatten()), (3, 4, 4), (1, 1, 1)),
        (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 4, 4)), conv(3, 2)), (3, 4, 4), (3, 3, 3)),
        (Residual(conv(3, 3), nn.Tanh(), conv(3, 3)), (3, 8, 8), (3, 5, 5)),
    ],
    ids=lambda item: None if isinstance(item, tuple) else type(item).__name__,
)
def test_colors(model, shape, expected):
    assert colors(model, *shape) == expected


def test_dilation_leaves_gaps_that_the_coloring_fills():
    """Three taps two apart: neighbours never meet, and three colors do where the window spans five places."""
    assert colors(conv(2, 2, dilation=2, padding=2), 2, 12, 12) == (2, 3, 3)
    assert colors(conv(2, 2, dilation=3, padding=3), 2, 12, 12) == (2, 3, 3)


def test_circular_edges_may_cost_more():
    assert colors(conv(1, 1, padding_mode="circular"), 1, 7, 7) == (1, 4, 4)


def test_a_token_mixer_and_a_channel_mixer():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.over_tokens = nn.Linear(7, 7)

        def forward(self, x):
            return self.over_tokens(x.transpose(1, 2)).transpose(1, 2)

    assert colors(Tokens(), 7, 5) == (7, 1)
    assert colors(nn.Sequential(Tokens(), nn.Tanh(), nn.Linear(5, 5)), 7, 5) == (7, 5)


def test_attention_keeps_heads_apart():
    class Attend(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    class ByHand(nn.Module):
        def forward(self, x):
            return (x @ x.transpose(-1, -2)).softmax(-1) @ x

    assert colors(Attend(), 2, 5, 3) == colors(ByHand(), 2, 5, 3) == (1, 5, 3)


def test_concatenation_and_slices():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(2, 2), conv(2, 2, 1, padding=0)

        def forward(self, x):
            left, right = x.chunk(2, 1)
            return torch.cat([self.a(left), self.b(right), x[:, :1]], 1)

    patterns = locality_of(Halves(), 4, 6, 6).patterns
    found = color(patterns)
    check_orthogonality(found)
    assert found.counts[2:] == (3, 3)
    assert found.counts[1] == 2  # the halves of the channels are apart


def test_what_nobody_knows_is_dense():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + x.mean()

    hooked = conv(2, 2)
    hooked.register_forward_hook(lambda module, args, output: output.flip(-1))
    for model in (Own(2, 2, 3, padding=1), hooked, nn.utils.parametrizations.weight_norm(conv(2, 2))):
        model.hzo_marks = Marks()  # one operation
        assert color(locality_of(model, 2, 4, 4, batch=1).patterns).directions == 32


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(1, 6)), min_size=1, max_size=12))
def test_intervals_take_no_more_colors_than_their_largest_row(size, intervals):
    rows = tuple(sum(1 << i for i in range(a, min(a + n, size))) for a, n in intervals)
    pattern = Pattern((size,), (len(rows),), ({0: rows},))
    found = color([pattern])
    check_orthogonality(found)
    assert found.directions <= max(1, *(row.bit_count() for row in rows))


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=16),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=16),
)
def test_any_pattern_is_colored_without_conflict(n, m, first, second):
    """Two axes that meet in one axis of the output, as behind a flatten, any links."""
    links = (
        {0: matrix_of(6, ((o, i) for o, i in first if i < n))},
        {0: matrix_of(6, ((o, i) for o, i in second if i < m))},
    )
    found = color([Pattern((n, m), (6,), links)])
    check_orthogonality(found)
    owners = found.owners(0, 0, found.directions)
    assert owners.shape == (found.directions, 6)
    for element, direction in enumerate(found.directions_of_elements.tolist()):
        i, j = divmod(element, m)
        reached = {o for o in range(6) if links[0][0][o] >> i & 1 and links[1][0][o] >> j & 1}
        assert {o for o in range(6) if owners[direction, o] == element} == reached


@given(st.lists(st.integers(0, 31), min_size=4, max_size=4), st.lists(st.integers(0, 15), min_size=3, max_size=3))
def test_composition_is_the_boolean_product(before, after):
    found = compose(tuple(after), tuple(before))
    for row, columns in zip(found, after, strict=True):
        assert set(bits(row)) == {j for k in bits(columns) for j in bits(before[k])}


def test_the_checker_finds_two_elements_of_one_color_that_share_an_output():
    right = color(locality_of(conv(2, 2), 2, 6, 6).patterns)
    check_orthogonality(right)
    for axis in (1, 2, 3):
        merged = tuple(tuple(min(c, 1) if a == axis and c == 2 else c for c in found) if a == axis else found
                       for a, found in enumerate(right.colors))  # fmt: skip
        if axis == 1:
            merged = (right.colors[0], (0, 0), *right.colors[2:])
        with pytest.raises(ColoringError, match="have the same color"):
            check_orthogonality(replace(right, colors=merged))
    with pytest.raises(ColoringError, match="colors over"):
        check_orthogonality(replace(right, colors=right.colors[:-1]))


def traced(*layers, shape=(2, 6, 6)):
    torch.manual_seed(0)
    x = torch.randn(2, *shape, dtype=torch.float64)
    return hzo.trace(nn.Sequential(*layers).double(), x), x


def colored(plan):
    return next(node for node in plan.nodes if node.probe.kind == "colored")


def with_coloring(plan, node, coloring):
    changed = replace(node, estimator=replace(node.probe, coloring=coloring))
    return replace(plan, nodes=tuple(changed if n is node else n for n in plan.nodes))


def test_the_checker_finds_a_pattern_that_says_too_little():
    chain, x = traced(conv(2, 2), nn.Tanh(), conv(2, 2))
    plan = hzo.plan(chain, tree="flat", assume="locality")
    hzo.check_coloring(chain, x, plan)
    node = colored(plan)
    (pattern,) = node.probe.coloring.patterns
    links = tuple({**link, axis: identity(6)} if axis == 3 else link for axis, link in enumerate(pattern.links))
    narrow = Coloring((replace(pattern, links=links),), node.probe.coloring.colors)
    check_orthogonality(narrow)
    with pytest.raises(ColoringError, match=r"moving element \(0, 0, 0, [01]\) changes output 0 at"):
        hzo.check_coloring(chain, x, with_coloring(plan, node, narrow))


def test_a_layer_that_does_something_else_than_when_it_was_traced():
    """Hardware, say: a mode that leaks every convolution's output into all places."""

    class Leaky(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result + 0.1 * result.sum((2, 3), keepdim=True) if func is torch.conv2d else result

    chain, x = traced(conv(2, 2), nn.Tanh(), conv(2, 2))
    plan = hzo.plan(chain, tree="flat", assume="locality")
    with Leaky(), pytest.raises(PlanError, match="made for another chain"):
        hzo.check_coloring(chain, x, plan)


def test_the_checker_leaves_no_trace_and_counts_as_checks():
    chain, x = traced(conv(2, 2), nn.Tanh(), conv(2, 2))
    plan = hzo.plan(chain, tree="flat", assume="locality")
    with hzo.count_queries() as count:
        hzo.check_coloring(chain, x, plan, elements=4)
    assert count.queries == 0
    assert count.check_evaluations > 0


def test_thin():
    exact = color(locality_of(nn.Sequential(conv(2, 2), conv(2, 2)), 2, 9, 9).patterns)
    assert thin(exact, 3, (2, 3)).counts == (1, 2, 3, 3)
    assert thin(exact, 3, (2, 3)).spacing == 3
    assert thin(exact, 3, (3,)).counts == (1, 2, 5, 3)
    assert thin(exact, 5, (2, 3)) is exact
    assert str(thin(exact, 3, (2, 3))) == "2×3×3 of 2×9×9, spacing 3"


def test_channels_are_never_thinned():
    found = locality_of(nn.Sequential(conv(4, 4), nn.Tanh(), conv(4, 4, groups=4), nn.Tanh()), 4, 9, 9)
    assert found.local == (2, 3)
    assert locality_of(nn.Sequential(conv(4, 4, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
                       4, 9, 9).local == (2, 3)  # fmt: skip


def test_printing():
    chain, _ = traced(conv(2, 2), nn.Tanh(), conv(2, 2), nn.Tanh(), conv(2, 2), shape=(2, 9, 9))
    assert "colored probe, 18 directions (colors 2×3×3 of 2×9×9) × 2" in str(hzo.plan(chain, assume="locality"))
    text = str(hzo.plan(chain, tree="flat", assume="locality", spacing=2))
    assert "(colors 2×2×2 of 2×9×9, spacing 2, 2 draws) × 2" in text


@pytest.mark.parametrize("spacing", [0, -1, 1.5, True, "3"])
def test_spacing_must_be_a_whole_number(spacing):
    chain, _ = traced(conv(2, 2), conv(2, 2))
    with pytest.raises(hzo.errors.InputError, match="whole number"):
        hzo.plan(chain, assume="locality", spacing=spacing)


def test_spacing_needs_locality():
    chain, _ = traced(conv(2, 2), conv(2, 2))
    with pytest.raises(hzo.errors.PlanError, match="assume"):
        hzo.plan(chain, assume="nothing", spacing=3)

"""The steps that in-place code implies, and ``as_strided``, one by one; whole programs are in tests/tape."""

import pytest
import torch

from hzo.reverse import record
from hzo.rules import aliases
from hzo.rules.base import rules
from hzo.tape.aliases import overlaps_itself, pass_through, read_window, restride, restride_scatter, write_window
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten

# size, stride and offset of windows of twelve elements
WINDOWS = {
    "rows": ((2, 3), (3, 1), 3),
    "columns": ((3, 2), (1, 6), 0),
    "every other": ((3,), (2,), 1),
    "one": ((), (), 5),
    "overlapping": ((4, 3), (2, 1), 1),
    "repeated": ((2, 3), (0, 2), 2),
    "repeated and overlapping": ((2, 3, 2), (0, 1, 1), 2),
    "nothing": ((0, 3), (3, 1), 0),
}


def gradient_by_differences(function, leaves):
    """Of ``sum(sin(function))``: what each element does, by central differences."""
    found = []
    for k, leaf in enumerate(leaves):
        grad = torch.zeros_like(leaf)
        for place in range(leaf.numel()):
            moved = [[t.detach().clone() for t in leaves] for _ in range(2)]
            moved[0][k].view(-1)[place] += 1e-6
            moved[1][k].view(-1)[place] -= 1e-6
            up, down = (float(function(*m).sin().sum()) for m in moved)
            grad.view(-1)[place] = (up - down) / 2e-6
        found.append(grad)
    return found


def agrees_with_differences(function, leaves, name):
    with record() as step:
        loss = function(*leaves).sin().sum()
    assert name in {getattr(op.target, "__name__", "") for op in step.tape.operations}
    found = {id(leaf): g for leaf, g in step.gradients(loss)}
    for leaf, expected in zip(leaves, gradient_by_differences(function, [t.detach() for t in leaves]), strict=True):
        torch.testing.assert_close(found[id(leaf)], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("window", WINDOWS)
def test_as_strided(window):
    size, stride, offset = WINDOWS[window]
    check(lambda x: (x * 2).as_strided(size, stride, offset), leaves_of((3, 4)))
    check(lambda x: torch.as_strided_copy(x * 2, size, stride, offset), leaves_of((3, 4)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 2).t().as_strided((2, 3), (3, 1), 2),
        lambda x: (x * 2)[1:].as_strided((2, 2), (1, 2)),
        lambda x: (x * 2)[1:, ::2].as_strided((2, 2), (1, 4)),
        lambda x: (x * 2)[0].expand(3, 4).as_strided((2, 2), (1, 1)),
        lambda x: (x * 2).unfold(0, 2, 1).as_strided((3, 2), (2, 1)),
        lambda x: (x * 2)[:1].as_strided((3, 4), (4, 1)),
        lambda x: (x * 2).as_strided_((4, 2), (2, 1), 1) * 3,
    ],
)
def test_as_strided_of_views(function):
    """Where the operand lies counts, and what lies beside it is a constant."""
    check(function, leaves_of((3, 4)))


@pytest.mark.parametrize("window", [name for name in WINDOWS if "overlapping" not in name and "repeated" not in name])
def test_as_strided_scatter(window):
    """PyTorch's own derivative of the first operand is wrong: compare with differences."""
    size, stride, offset = WINDOWS[window]
    leaves = leaves_of((3, 4), size)
    agrees_with_differences(
        lambda x, y: torch.as_strided_scatter(x * 2, y, size, stride, offset), leaves, "restride_scatter"
    )


@pytest.mark.parametrize("window", WINDOWS)
def test_reading_a_window(window):
    """A view that is read after a write to its base; of what overlaps, the parts add up."""
    size, stride, offset = WINDOWS[window]

    def function(x):
        h = x * 2
        view = h.as_strided(size, stride, offset)
        h[1] *= 3
        return view * 2

    check(function, leaves_of((3, 4)))


@pytest.mark.parametrize("window", [name for name in WINDOWS if "overlapping" not in name and "repeated" not in name])
def test_writing_to_a_window(window):
    size, stride, offset = WINDOWS[window]

    def function(x, y):
        h = x * 2
        h.as_strided(size, stride, offset).copy_(y)
        return h * 2

    check(function, leaves_of((3, 4), size))


def test_functions_have_no_side_effects():
    content, window = torch.arange(12.0), torch.full((2, 3), -1.0)
    geometry = WINDOWS["rows"]
    put = write_window(content, window, *geometry)
    assert torch.equal(content, torch.arange(12.0))
    assert torch.equal(read_window(put, *geometry), window)
    shown = read_window(content, *geometry)
    shown.zero_()
    assert torch.equal(content, torch.arange(12.0))
    assert torch.equal(pass_through(window, content), content)
    x = torch.arange(12.0).view(3, 4).t()
    layout = (x.shape, x.stride(), 0)
    around = torch.full((2, 3), 7.0)
    assert torch.equal(restride(x, around, layout, *geometry), x.as_strided(*geometry))
    beside = restride(x[:2], around, (x[:2].shape, x.stride(), 0), *geometry)
    inside = torch.zeros(12, dtype=torch.bool)
    inside.as_strided((2, 3), (1, 4), 0).fill_(True)
    assert torch.equal(beside, torch.where(inside.as_strided(*geometry), x.as_strided(*geometry), around))
    assert torch.equal(restride_scatter(x, window, layout, *geometry), torch.as_strided_scatter(x, window, *geometry))


@pytest.mark.parametrize("window", WINDOWS)
def test_overlaps(window):
    size, stride, offset = WINDOWS[window]
    shown = torch.arange(12).as_strided(size, stride, offset).flatten()
    assert overlaps_itself(size, stride) is (len(shown.unique()) < len(shown))


def test_every_rule_has_a_case():
    own = {target for target, rule in rules.items() if rule.vjp.__module__ == aliases.__name__}
    assert own == {write_window, read_window, pass_through, restride, restride_scatter}

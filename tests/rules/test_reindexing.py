"""Calls that move elements, each against autograd."""

import pytest
import torch
import torch.nn.functional as F

from hzo.reverse import record
from hzo.rules import reindexing
from hzo.rules.base import rules
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten

# name of the operator, a function of leaves, their shapes
CASES = [
    ("aten.view.default", lambda x: x.view(2, -1), [(4, 3)]),
    ("aten.view.default", lambda x: x.reshape(()), [(1, 1)]),
    ("aten.view.default", lambda x: x.view(0, 5), [(5, 0)]),
    ("aten.view.default", lambda x: x.flatten(1), [(2, 3, 4)]),
    ("aten.view.default", lambda x: x.unflatten(-1, (2, 2)), [(2, 3, 4)]),
    ("aten.view.default", lambda x: x.contiguous(memory_format=torch.channels_last).view(2, 3, 20), [(2, 3, 4, 5)]),
    ("aten._unsafe_view.default", lambda x: x.mT.reshape(6, 2), [(2, 2, 3)]),
    ("aten._unsafe_view.default", lambda x: aten._unsafe_view(x, [6]), [(2, 3)]),
    ("aten.view_copy.default", lambda x: torch.view_copy(x, (6,)), [(2, 3)]),
    ("aten._reshape_alias.default", lambda x: aten._reshape_alias(x, [6], [1]), [(2, 3)]),
    ("aten.unsqueeze.default", lambda x: x.unsqueeze(-1), [(2, 3)]),
    ("aten.unsqueeze.default", lambda x: x[None, :, None], [(2,)]),
    ("aten.unsqueeze_copy.default", lambda x: torch.unsqueeze_copy(x, 1), [(2, 3)]),
    ("aten.squeeze.default", lambda x: x.squeeze(), [(1, 2, 1)]),
    ("aten.squeeze.default", lambda x: x.squeeze(), [()]),
    ("aten.squeeze.dim", lambda x: x.squeeze(-1), [(2, 1)]),
    ("aten.squeeze.dim", lambda x: x.squeeze(0), [(2, 1)]),
    ("aten.squeeze.dims", lambda x: x.squeeze((0, -1)), [(1, 2, 1)]),
    ("aten.squeeze_copy.default", torch.squeeze_copy, [(1, 2)]),
    ("aten.squeeze_copy.dim", lambda x: torch.squeeze_copy(x, 0), [(1, 2)]),
    ("aten.squeeze_copy.dims", lambda x: torch.squeeze_copy(x, (0, 2)), [(1, 2, 1)]),
    ("aten.t.default", lambda x: x.t(), [(2, 3)]),
    ("aten.t.default", lambda x: x.t(), [(2,)]),
    ("aten.t_copy.default", torch.t_copy, [(2, 3)]),
    ("aten.transpose.int", lambda x: x.transpose(-1, 0), [(2, 3, 4)]),
    ("aten.transpose.int", lambda x: x.swapaxes(1, 2), [(2, 3, 4)]),
    ("aten.transpose_copy.int", lambda x: torch.transpose_copy(x, 0, 1), [(2, 3)]),
    ("aten.permute.default", lambda x: x.permute(2, 0, 1), [(2, 3, 4)]),
    ("aten.permute.default", lambda x: x.permute(-1, 0, -2), [(2, 3, 4)]),
    ("aten.permute.default", lambda x: x.movedim((0, 1), (2, 0)), [(2, 3, 4)]),
    ("aten.permute.default", lambda x: x.permute(()), [()]),
    ("aten.permute_copy.default", lambda x: torch.permute_copy(x, (1, 2, 0)), [(2, 3, 4)]),
    ("aten.slice.Tensor", lambda x: x[1:-1], [(5, 2)]),
    ("aten.slice.Tensor", lambda x: x[:, ::2], [(2, 5)]),
    ("aten.slice.Tensor", lambda x: x[1::2][:, 1::3][:, :1], [(7, 8)]),
    ("aten.slice.Tensor", lambda x: x[5:2], [(7,)]),
    ("aten.slice.Tensor", lambda x: x[..., -100:100], [(3, 4)]),
    ("aten.slice.Tensor", lambda x: x.narrow(-1, -2, 2), [(3, 4)]),
    ("aten.slice.Tensor", aten.slice, [(3, 4)]),
    ("aten.slice_copy.Tensor", lambda x: torch.slice_copy(x, 1, 0, 3, 2), [(3, 4)]),
    ("aten.narrow_copy.default", lambda x: torch.narrow_copy(x, -1, 1, 2), [(3, 4)]),
    ("aten.select.int", lambda x: x[:, -1], [(2, 3)]),
    ("aten.select.int", lambda x: x[1, 2], [(2, 3)]),
    ("aten.select_copy.int", lambda x: torch.select_copy(x, 1, 2), [(2, 3)]),
    ("aten.diagonal.default", lambda x: x.diagonal(), [(3, 4)]),
    ("aten.diagonal.default", lambda x: x.diagonal(-1, -1, 0), [(3, 2, 4)]),
    ("aten.diagonal_copy.default", lambda x: torch.diag(x, 1), [(3, 4)]),
    ("aten.diagonal_copy.default", lambda x: torch.diagonal_copy(x, 1), [(3, 4)]),
    ("aten.diag_embed.default", torch.diag_embed, [(2, 3)]),
    ("aten.diag_embed.default", lambda x: torch.diag_embed(x, 1, 0, 2), [(2, 3)]),
    ("aten.diag_embed.default", lambda x: torch.diag(x, -1), [(3,)]),
    ("aten.unfold.default", lambda x: x.unfold(0, 3, 1), [(6, 2)]),
    ("aten.unfold.default", lambda x: x.unfold(-1, 2, 3), [(2, 8)]),
    ("aten.unfold_copy.default", lambda x: torch.unfold_copy(x, 0, 3, 2), [(6,)]),
    ("aten.split.Tensor", lambda x: x.split(2), [(5, 2)]),
    ("aten.split.Tensor", lambda x: x.split(2, -1)[1], [(3, 5)]),
    ("aten.split.Tensor", lambda x: x.chunk(3, 1)[::2], [(2, 7)]),
    ("aten.split_copy.Tensor", lambda x: torch.split_copy(x, 2, 1)[0], [(2, 5)]),
    ("aten.split_with_sizes.default", lambda x: x.split([1, 0, 4], 1)[2], [(2, 5)]),
    ("aten.split_with_sizes_copy.default", lambda x: torch.split_with_sizes_copy(x, [1, 4], 1), [(2, 5)]),
    ("aten.unsafe_split.Tensor", lambda x: torch.unsafe_split(x, 2, 1)[1], [(2, 5)]),
    ("aten.unsafe_split.Tensor", lambda x: torch.unsafe_chunk(x, 2, -1), [(2, 5)]),
    ("aten.unsafe_split_with_sizes.default", lambda x: torch.unsafe_split_with_sizes(x, [2, 3], 1)[1], [(2, 5)]),
    ("aten.slice.Tensor", lambda x: x.tensor_split([1, 3], 1)[1], [(2, 5)]),
    ("aten.unbind.int", lambda x: x.unbind(), [(3, 2)]),
    ("aten.unbind.int", lambda x: x.unbind(-1)[1], [(3, 2)]),
    ("aten.unbind.int", lambda x: sum(k * row for k, row in enumerate(x)), [(3, 2)]),
    ("aten.unbind_copy.int", lambda x: torch.unbind_copy(x, 1)[0], [(3, 2)]),
    ("aten.slice_backward.default", lambda x: aten.slice_backward(x, [7, 2], 0, 1, 7, 2), [(3, 2)]),
    ("aten.select_backward.default", lambda x: aten.select_backward(x, [2, 3], 1, -1), [(2,)]),
    ("aten.diagonal_backward.default", lambda x: aten.diagonal_backward(x, [3, 4], 1, 0, 1), [(3,)]),
    ("aten.unfold_backward.default", lambda x: aten.unfold_backward(x, [6], 0, 3, 1), [(4, 3)]),
    ("aten.slice_scatter.default", lambda x, y: torch.slice_scatter(x, y, 1, 0, 4, 2), [(2, 5), (2, 2)]),
    ("aten.slice_scatter.default", lambda x, y: torch.slice_scatter(x, y, start=1), [(3, 5), (2, 5)]),
    ("aten.select_scatter.default", lambda x, y: torch.select_scatter(x, y, 1, -1), [(2, 5), (2,)]),
    ("aten.diagonal_scatter.default", lambda x, y: torch.diagonal_scatter(x, y, 1), [(3, 4), (3,)]),
    ("aten.cat.default", lambda *x: torch.cat(x, -1), [(2, 3), (2, 0), (2, 1)]),
    ("aten.cat.default", lambda *x: torch.cat(x), [(0,), (2, 3), (1, 3)]),
    ("aten.cat.default", lambda x: torch.cat([x, torch.ones(2, 3), x], 1), [(2, 3)]),
    ("aten.cat.default", lambda x, y: torch.hstack([x, y]), [(2, 3), (2, 1)]),
    ("aten.cat.default", lambda x, y: torch.vstack([x, y]), [(3,), (2, 3)]),
    ("aten.cat.default", lambda x, y: torch.dstack([x, y]), [(3, 2), (3, 2)]),
    ("aten.cat.default", lambda x, y: torch.column_stack([x, y]), [(3,), (3, 2)]),
    ("aten.stack.default", lambda *x: torch.stack(x, -1), [(2, 3), (2, 3)]),
    ("aten.stack.default", lambda x: torch.stack([x, torch.ones(2), x]), [(2,)]),
    ("aten.block_diag.default", torch.block_diag, [(2, 3), (), (4,), (0, 2), (1, 1)]),
    ("aten.stack.default", torch.cartesian_prod, [(2,), (3,)]),
    ("aten.expand.default", lambda x, y: torch.meshgrid(x, y, indexing="ij"), [(2,), (3,)]),
    ("aten.expand.default", lambda x: x.expand(4, 2, -1), [(1, 3)]),
    ("aten.expand.default", lambda x: x.expand(2, 3), [()]),
    ("aten.expand.default", lambda x: x.expand(0, 3), [(1, 3)]),
    ("aten.expand.default", lambda x: x.expand_as(torch.ones(4, 3)), [(3,)]),
    ("aten.expand_copy.default", lambda x: torch.expand_copy(x, (4, 3)), [(3,)]),
    ("aten.repeat.default", lambda x: x.repeat(2, 3), [(4, 2)]),
    ("aten.repeat.default", lambda x: x.repeat(3, 1, 2), [(4, 2)]),
    ("aten.repeat.default", lambda x: x.repeat(2, 0), [(4, 2)]),
    ("aten.repeat.default", lambda x: x.repeat(2), [()]),
    ("aten.repeat.default", lambda x: x.repeat(1, 1), [(2, 3)]),
    ("aten.repeat.default", lambda x: x.tile(2), [(4, 2)]),
    ("aten.repeat.default", lambda x: x.mT.repeat(2, 2), [(4, 2)]),
    ("aten.flip.default", lambda x: x.flip(0, -1), [(4, 2, 3)]),
    ("aten.flip.default", lambda x: x.fliplr(), [(4, 2)]),
    ("aten.roll.default", lambda x: x.roll(2), [(3, 2)]),
    ("aten.roll.default", lambda x: x.roll((1, -2), (0, -1)), [(3, 4)]),
    ("aten.roll.default", torch.fft.fftshift, [(3, 4)]),
    ("aten.rot90.default", lambda x: x.rot90(), [(3, 4)]),
    ("aten.rot90.default", lambda x: torch.rot90(x, -3, (2, 0)), [(3, 4, 2)]),
    ("aten.tril.default", lambda x: x.tril(), [(2, 3, 4)]),
    ("aten.tril.default", lambda x: x.tril(-1), [(3, 4)]),
    ("aten.triu.default", lambda x: x.triu(1), [(3, 4)]),
    ("aten.trace.default", lambda x: x.trace(), [(3, 4)]),
    ("aten.pixel_shuffle.default", lambda x: F.pixel_shuffle(x, 2), [(2, 8, 3, 2)]),
    ("aten.pixel_unshuffle.default", lambda x: F.pixel_unshuffle(x, 2), [(2, 2, 6, 4)]),
    ("aten.channel_shuffle.default", lambda x: F.channel_shuffle(x, 3), [(2, 6, 3, 2)]),
    ("aten.im2col.default", lambda x: F.unfold(x, (2, 3), (1, 2), (1, 0), (2, 1)), [(2, 3, 5, 6)]),
    ("aten.im2col.default", lambda x: F.unfold(x, 2), [(3, 5, 6)]),
    ("aten.col2im.default", lambda x: F.fold(x, (4, 5), (2, 2), 1, 0, (2, 1)), [(2, 12, 8)]),
    ("aten.constant_pad_nd.default", lambda x: F.pad(x, (1, 2)), [(2, 3)]),
    ("aten.constant_pad_nd.default", lambda x: F.pad(x, (1, -1, 0, 2), value=3.0), [(2, 3, 4)]),
    ("aten.reflection_pad1d.default", lambda x: F.pad(x, (2, 1), "reflect"), [(2, 3, 4)]),
    ("aten.reflection_pad2d.default", lambda x: F.pad(x, (2, 1, 0, 1), "reflect"), [(2, 3, 4)]),
    ("aten.reflection_pad2d.default", lambda x: F.pad(x.mT, (2, 1, 0, 1), "reflect"), [(1, 2, 3, 4)]),
    ("aten.reflection_pad3d.default", lambda x: F.pad(x, (1, 1, 0, 1, 2, 1), "reflect"), [(1, 2, 3, 2, 4)]),
    ("aten.replication_pad1d.default", lambda x: F.pad(x, (2, 1), "replicate"), [(2, 3, 4)]),
    ("aten.replication_pad2d.default", lambda x: F.pad(x, (2, 1, 0, 5), "replicate"), [(1, 2, 3, 4)]),
    ("aten.replication_pad3d.default", lambda x: F.pad(x, (1, 1, 0, 1, 2, 1), "replicate"), [(1, 2, 3, 2, 4)]),
    ("aten.slice.Tensor", lambda x: F.pad(x, (1, 2, 1, 0), "circular"), [(1, 2, 3, 4)]),
    ("aten.alias_copy.default", torch.alias_copy, [(2, 3)]),
    ("aten.lift.default", aten.lift, [(2,)]),
    ("aten.lift_fresh.default", aten.lift_fresh, [(2,)]),
]  # fmt: skip

PADDINGS = [
    ("reflection_pad1d", (2, 3, 4), (2, 1)),
    ("reflection_pad2d", (2, 3, 4, 3), (2, 1, 0, 1)),
    ("reflection_pad3d", (1, 2, 3, 2, 4), (1, 1, 0, 1, 2, 1)),
    ("replication_pad1d", (2, 3, 4), (2, 1)),
    ("replication_pad2d", (2, 3, 4, 3), (2, 1, 0, 4)),
    ("replication_pad3d", (1, 2, 3, 2, 4), (1, 1, 0, 1, 2, 1)),
]


@pytest.mark.parametrize(("name", "function", "shapes"), CASES)
def test_gradient(name, function, shapes):
    # "lift" hands its operand on, and autograd gives that object a second history: of one that nobody holds any more
    # the tape loses the first, and says so. PyTorch calls it for new constants alone.
    check(function, leaves_of(*shapes), calls=[name], dropped=not name.startswith("aten.lift"))


@pytest.mark.parametrize(("name", "function", "shapes"), CASES)
def test_second_use(name, function, shapes):
    """The operand has another cotangent, too, and the result several."""

    def twice(*leaves):
        results = function(*[leaf * 1.5 for leaf in leaves])
        results = results if isinstance(results, (tuple, list)) else (results,)
        return [r * r for r in results] + [r.sin() for r in results] + [leaf * 2 for leaf in leaves]

    check(twice, leaves_of(*shapes), calls=[name])


@pytest.mark.parametrize(("name", "shape", "padding"), PADDINGS)
def test_padding_inside_a_derivative(name, shape, padding):
    """What autograd calls where a model differentiates a padding inside."""
    pad, backward = getattr(aten, name), getattr(aten, f"{name}_backward")
    padded = pad(torch.zeros(shape, dtype=torch.float64), padding).shape
    check(lambda g, x: backward(g, x, padding), leaves_of(padded, shape), calls=[f"aten.{name}_backward.default"])


def test_narrow_copy_from_the_end():
    """PyTorch's own derivative fails for a negative start: compare with the positive one."""
    (x,) = leaves_of((3, 4))
    with record() as step:
        loss = (torch.narrow_copy(x, 0, -2, 2) ** 2).sum()
    ((_, gradient),) = step.gradients(loss)
    assert torch.equal(gradient, torch.cat([torch.zeros(1, 4), 2 * x[1:]]))


def test_bits_of_another_type():
    """``view(dtype)`` has no derivative: autograd gives none, and neither does the tape."""
    check(lambda x: x.view(torch.int64).view(torch.float64) + x, leaves_of((2, 3)))


def test_chained_views():
    """Views of views with steps, axes and windows."""

    def function(x):
        y = x[1:, ::2].permute(2, 0, 1)[..., 1]
        return y.unfold(0, 2, 1).diagonal(0, 0, 2).squeeze() * 2

    check(function, leaves_of((4, 5, 6)))


def test_every_rule_has_a_case():
    named = {name for name, *_ in CASES} | {f"aten.{name}_backward.default" for name, *_ in PADDINGS}
    named |= {"aten.view.dtype", "aten.view_copy.dtype"}
    own = {str(target) for target, rule in rules.items() if rule.vjp.__module__ == reindexing.__name__}
    assert own <= named, own - named

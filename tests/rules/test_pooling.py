"""Pooling and resampling: autograd's gradients in float64."""

import pytest
import torch
import torch.nn.functional as F

from support.chip import follows, ramp
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten
SHAPES = {1: (2, 3, 9), 2: (2, 3, 8, 9), 3: (2, 3, 6, 5, 6)}


def pooled(name, dim, *args, **options):
    function = getattr(F, f"{name}{dim}d")
    return lambda x: function(x, *args, **options)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": 2, "stride": 3, "dilation": 2},
    ],
    ids=str,
)
def test_max_pooling(dim, options):
    call = f"aten.max_pool{max(dim, 2)}d_with_indices.default"
    check(pooled("max_pool", dim, **options), leaves_of(SHAPES[dim]), calls=[call])
    check(pooled("max_pool", dim, return_indices=True, **options), leaves_of(SHAPES[dim]), calls=[call])
    check(pooled("max_pool", dim, **options), leaves_of(SHAPES[dim][1:]))


def test_equal_maxima():
    """The first of them has the gradient, as for autograd."""
    for dim in (1, 2, 3):
        x = torch.ones(SHAPES[dim], dtype=torch.float64)
        check(pooled("max_pool", dim, 3, 1, 1), [x])
        check(pooled("adaptive_max_pool", dim, 2), [x])


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False, "ceil_mode": True},
    ],
    ids=str,
)
def test_mean_pooling(dim, options):
    call = f"aten.avg_pool{max(dim, 2)}d.default"
    check(pooled("avg_pool", dim, **options), leaves_of(SHAPES[dim]), calls=[call])
    if dim > 1:
        check(pooled("avg_pool", dim, divisor_override=3, **options), leaves_of(SHAPES[dim]))


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_adaptive_pooling(dim, size):
    check(pooled("adaptive_avg_pool", dim, size), leaves_of(SHAPES[dim]))
    check(pooled("adaptive_max_pool", dim, size), leaves_of(SHAPES[dim]),
          calls=[f"aten.adaptive_max_pool{max(dim, 2)}d.default"])  # fmt: skip
    if size > 1:
        check(pooled("adaptive_avg_pool", dim, size), leaves_of(SHAPES[dim]),
              calls=[f"aten._adaptive_avg_pool{max(dim, 2)}d.default"])  # fmt: skip


@pytest.mark.parametrize("dim", [2, 3])
def test_fractional_pooling(dim):
    check(pooled("fractional_max_pool", dim, 2, output_size=3), leaves_of(SHAPES[dim]),
          calls=[f"aten.fractional_max_pool{dim}d.default"])  # fmt: skip
    check(pooled("fractional_max_pool", dim, 2, output_ratio=(0.6,) * dim), leaves_of(SHAPES[dim]))


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("p", [1, 2, 3.0])
def test_pooling_of_powers(dim, p):
    check(pooled("lp_pool", dim, p, 2), leaves_of(SHAPES[dim], positive=True))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_unpooling(dim):
    pool, unpool = getattr(F, f"max_pool{dim}d"), getattr(F, f"max_unpool{dim}d")

    def function(x):
        values, places = pool(x, 2, return_indices=True)
        return unpool(values.square(), places, 2, output_size=x.shape[-dim:])

    check(function, leaves_of(SHAPES[dim]), calls=[f"aten.max_unpool{max(dim, 2)}d.default"])
    check(lambda x: function(x[0]), leaves_of(SHAPES[dim]))


def test_memory_formats_and_cotangents_of_all_kinds():
    for function in (pooled("max_pool", 2, 2), pooled("avg_pool", 2, 2), pooled("adaptive_avg_pool", 2, 3),
                     pooled("adaptive_max_pool", 2, 3), lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
                     lambda x: F.interpolate(x, scale_factor=2)):  # fmt: skip
        check(lambda x: function(x.to(memory_format=torch.channels_last)), leaves_of(SHAPES[2]))  # noqa: B023
        check(lambda x: function(x).sum((2, 3)), leaves_of(SHAPES[2]))  # noqa: B023
        check(lambda x: function(x.mT[:, ::2]), leaves_of(SHAPES[2]))  # noqa: B023
        check(function, leaves_of((0, 3, 8, 9)))


# ---- resampling -----------------------------------------------------------------------------------------------------

MODES = [("nearest", 1), ("nearest", 2), ("nearest", 3), ("nearest-exact", 1), ("nearest-exact", 2),
         ("nearest-exact", 3), ("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3), ("area", 1),
         ("area", 2), ("area", 3)]  # fmt: skip
SMOOTH = {"linear", "bilinear", "bicubic", "trilinear"}


@pytest.mark.parametrize(("mode", "dim"), MODES)
@pytest.mark.parametrize("target", [{"scale_factor": 2}, {"scale_factor": 1.5}, {"scale_factor": 0.6}, {"size": 7},
                                    {"scale_factor": 1.5, "recompute_scale_factor": True}], ids=str)  # fmt: skip
def test_interpolation(mode, dim, target):
    x = leaves_of(SHAPES[dim])
    check(lambda x: F.interpolate(x, mode=mode, **target), x)
    if mode in SMOOTH:
        check(lambda x: F.interpolate(x, mode=mode, align_corners=True, **target), x)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [0.4, 1.7])
def test_interpolation_without_aliasing(mode, scale):
    check(lambda x: F.interpolate(x, scale_factor=scale, mode=mode, antialias=True), leaves_of(SHAPES[2]),
          calls=[f"aten._upsample_{mode}2d_aa.default"])  # fmt: skip


def test_every_upsampling_operator_has_a_rule():
    """Those with sizes of their own as an option, too."""
    check(lambda x: aten.upsample_bilinear2d(x, [5, 6], False, 1.3, 1.4), leaves_of(SHAPES[2]))
    check(lambda x: aten.upsample_nearest2d.vec(x, None, [1.5, 2.0]), leaves_of(SHAPES[2]))
    check(lambda x: aten.upsample_linear1d(x, [5], True), leaves_of(SHAPES[1]))
    check(lambda x: aten.upsample_trilinear3d.vec(x, [5, 6, 7], True, None), leaves_of(SHAPES[3]))


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("weights", [(), (0,), (0, 1)], ids=str)
def test_sampling(mode, padding, align, weights):
    leaves = leaves_of((2, 3, 5, 4), (2, 4, 3, 2))
    check(lambda x, g: F.grid_sample(x, g, mode, padding, align), leaves, weights=weights,
          calls=["aten.grid_sampler_2d.default"])  # fmt: skip
    check(lambda x: F.grid_sample(x, leaves[1].detach(), mode, padding, align), leaves[:1])
    if mode != "bicubic":
        check(lambda x, g: F.grid_sample(x, g, mode, padding, align), leaves_of((2, 3, 4, 5, 3), (2, 3, 2, 4, 3)),
              weights=weights, calls=["aten.grid_sampler_3d.default"])  # fmt: skip


def test_sampling_of_a_learned_picture_follows_the_hardware():
    change = lambda out: out * ramp(out, 1) + 0.3  # noqa: E731

    def written(x, grid):
        return F.grid_sample(x, grid, align_corners=False)

    for shapes in ([(2, 3, 5, 4), (2, 4, 3, 2)], [(2, 3, 1, 4, 5), (2, 2, 4, 3, 3)]):
        operator = aten.grid_sampler_2d.default if len(shapes[0]) == 4 else aten.grid_sampler_3d.default
        x, grid = leaves_of(*shapes)
        follows(written, lambda x, g: change(written(x, g)), [x, grid * 0.4], (0,), {operator: change})


@pytest.mark.parametrize("align", [True, False])
def test_affine_grids(align):
    check(lambda t: F.affine_grid(t, (2, 3, 4, 5), align), leaves_of((2, 2, 3)), calls=[
        "aten.affine_grid_generator.default"])  # fmt: skip
    check(lambda t: F.affine_grid(t, (2, 3, 4, 5, 3), align), leaves_of((2, 3, 4)))

    def transformed(t, x):
        return F.grid_sample(x, F.affine_grid(t, x.shape, align), align_corners=align)

    check(transformed, leaves_of((2, 2, 3), (2, 3, 5, 4)))


# ---- derivatives taken inside the model -----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_penalties_of_gradients(dim):
    def penalty(function):
        def penalized(x):
            (g,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
            return g.square()

        return penalized

    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[dim]
    functions = [
        pooled("max_pool", dim, 2),
        pooled("avg_pool", dim, 3, 2, 1),
        pooled("adaptive_avg_pool", dim, 2),
        pooled("adaptive_max_pool", dim, 2),
        lambda x: F.interpolate(x, scale_factor=1.5, mode=smooth),
        lambda x: F.interpolate(x, scale_factor=1.5),
        lambda x: F.interpolate(x, size=5, mode="nearest-exact"),
    ]
    if dim == 2:
        functions += [
            lambda x: F.interpolate(x, scale_factor=0.6, mode="bicubic", antialias=True),
            lambda x: F.interpolate(x, scale_factor=1.6, mode="bicubic"),
        ]
    if dim > 1:
        functions.append(pooled("fractional_max_pool", dim, 2, output_size=3))
    for function in functions:
        check(penalty(function), leaves_of(SHAPES[dim]))

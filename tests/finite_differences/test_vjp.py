"""``estimate_vjp``: one segment, any callable."""

import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import InputError, NonFiniteError, StepError
from hzo.finite_differences import vjp
from hzo.finite_differences.steps import default_step
from support.oracles import CENTRAL, FORWARD, normal
from support.training import autograd, grads

W = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


def mixed(a, b):
    return torch.sin(a @ W.to(a.dtype)) * b.sum(1, keepdim=True), (a**2).flatten(1)


def exact(f, inputs, cotangents):
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    outputs = f(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in leaves if t.requires_grad]
    with torch.enable_grad():
        return torch.autograd.grad(outputs, wanted, cotangents)


@pytest.mark.parametrize("memory", [None, 1, 3000])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("scheme", "tolerance"), [("central", CENTRAL), ("forward", FORWARD)])
def test_several_inputs_and_outputs(scheme, tolerance, batched, memory):
    a, b, g = normal(5, 4), normal(5, 2), (normal(5, 3), normal(5, 4))
    with hzo.count_queries() as count:
        found = hzo.estimate_vjp(mixed, (a, b), g, scheme=scheme, batched=batched, memory=memory)
    for estimate, reference in zip(found, exact(mixed, (a, b), g), strict=True):
        torch.testing.assert_close(estimate, reference, rtol=tolerance, atol=tolerance)
    assert count.queries == count.stage_evaluations == (4 + 2) * 5 * (2 if scheme == "central" else 1)
    assert count.forward_equivalents == (4 + 2) * (2 if scheme == "central" else 1)
    assert count.base_evaluations == (5 if scheme == "forward" else 0)


def test_shapes_and_integers():
    table = normal(4, 2, 3)
    f = lambda x, k: torch.tanh(x.flatten(2)) * table[k]  # noqa: E731
    x, k, g = normal(5, 2, 3, 1), torch.tensor([0, 3, 1, 1, 2]), normal(5, 2, 3)
    found = hzo.estimate_vjp(f, (x, k), g)
    assert found[1] is None
    torch.testing.assert_close(found[0], exact(f, (x, k), g)[0], rtol=CENTRAL, atol=CENTRAL)


def test_elementwise_takes_one_direction():
    x, g = normal(5, 7), normal(5, 7)
    with hzo.count_queries() as count:
        found = hzo.estimate_vjp(torch.sin, x, g, elementwise=True)
    torch.testing.assert_close(found, x.cos() * g, rtol=CENTRAL, atol=CENTRAL)
    assert count.queries == 2 * 5
    for a, b in ((x, normal(5, 1)), (normal(5, 1), x)):  # would broadcast, and be wrong
        with pytest.raises(InputError, match="elementwise=True expects inputs and cotangents of one shape"):
            hzo.estimate_vjp(torch.sin, a, b, elementwise=True)


@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize("batch", [1, 4])
def test_what_the_callable_writes_to_is_its_own(scheme, batch):
    """It overwrites its input, and hands out the same memory every time, as simulators do."""
    memory = np.empty((1000, 3))

    def simulate(x, offset):
        x.mul_(2)
        offset += 1
        result = memory[: len(x)]
        np.copyto(result, np.sin(x.numpy()) + offset.numpy())
        return torch.as_tensor(result)

    x, offset, g = normal(batch, 3), normal(batch, 3), normal(batch, 3)
    copies = x.clone(), offset.clone()
    found = hzo.estimate_vjp(simulate, (x, offset), g, scheme=scheme)
    torch.testing.assert_close(found[0], 2 * (2 * x).cos() * g, rtol=FORWARD, atol=FORWARD)
    torch.testing.assert_close(found[1], g, rtol=FORWARD, atol=FORWARD)
    assert torch.equal(x, copies[0])
    assert torch.equal(offset, copies[1])


def test_random_numbers_are_drawn_alike_and_nothing_is_left_behind():
    layer = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh(), nn.BatchNorm1d(6).eval()).double()
    layer[0].register_buffer("unused", torch.zeros(1))
    x, g = normal(4, 6), normal(4, 6)
    random = torch.get_rng_state()
    (reference,) = exact(layer, (x,), g)
    for memory in (None, 1):
        torch.set_rng_state(random)
        found = hzo.estimate_vjp(layer, x, g, memory=memory)
        torch.testing.assert_close(found, reference, rtol=CENTRAL, atol=CENTRAL)
        assert torch.equal(torch.get_rng_state(), random)
    norm = nn.BatchNorm1d(6).double()
    hzo.estimate_vjp(norm, x, g)
    assert int(norm.num_batches_tracked) == 0
    assert torch.equal(norm.running_mean, torch.zeros(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    """Rounding u/h of the result against curvature h², h = u^(1/3): u^(2/3), and a sum over ten outputs."""
    x, g = normal(8, 6), normal(8, 4)
    f = lambda x: torch.tanh(x) @ W.T[:1].expand(6, 4).to(x.dtype)  # noqa: E731
    (reference,) = exact(f, (x,), g)
    found = hzo.estimate_vjp(f, x.to(dtype), g.to(dtype))
    assert found.dtype == torch.float32
    error = (found - reference).norm() / reference.norm()
    assert error < 10 * torch.finfo(dtype).eps ** (2 / 3)


def test_precision_narrower_than_the_input():
    """A float64 input into a simulator that computes in float32: a step for float64 would drown in its rounding."""
    x, g = normal(6, 5), normal(6, 5)
    f = lambda x: torch.sin(x.float())  # noqa: E731
    reference = x.cos() * g
    for options in ({"precision": torch.float32}, {}):
        found = hzo.estimate_vjp(f, x, g if options else g.float(), **options)
        assert (found - reference).norm() / reference.norm() < 10 * torch.finfo(torch.float32).eps ** (2 / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_outliers_take_a_step_of_their_own(dtype, scheme):
    """One large value among many small ones: a step of the common scale would vanish beside it."""
    x = torch.full((1, 4096), 0.01).to(dtype)
    x[0, 7] = 100.0
    found = hzo.estimate_vjp(lambda x: x * 3, x, torch.ones_like(x), elementwise=True, scheme=scheme)
    # Eight units in the last place up, and eight down: the result rounds by half a unit at either end.
    torch.testing.assert_close(found, torch.full_like(found, 3.0), rtol=1 / 8, atol=0)


def test_default_steps():
    x = torch.full((2, 5), 4.0, dtype=torch.float64)
    unit = torch.finfo(torch.float64).eps
    for scheme, share in (("central", unit ** (1 / 3)), ("forward", 8 * unit ** (1 / 2))):
        torch.testing.assert_close(default_step(x, scheme), x * share)
    torch.testing.assert_close(default_step(x.bfloat16(), "forward"), default_step(x.bfloat16(), "central"))
    torch.testing.assert_close(default_step(0 * x, "central"), torch.ones_like(x) * unit ** (1 / 3))
    with pytest.raises(NonFiniteError, match="the gate holds NaN"):
        default_step(0 * x / 0, "central", "the gate")


class Inverted(nn.Module):
    """A residual block that hardly does anything yet, as at the beginning of training."""

    def __init__(self, width):
        super().__init__()
        self.expand, self.project = nn.Conv2d(width, 2 * width, 3, padding=1), nn.Conv2d(2 * width, width, 1)
        nn.init.normal_(self.project.weight, std=0.02)

    def forward(self, x):
        return x + self.project(F.gelu(self.expand(x)))


def test_forward_differences_of_a_network():
    """In float32 the rounding of a segment's outputs is most of the error: √ε leaves 4e-4, 8 √ε 7e-6."""
    torch.manual_seed(0)
    blocks = [Inverted(8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), *blocks, nn.Flatten(), nn.Linear(8 * 36, 10))
    x, y = torch.randn(4, 3, 24, 24), torch.arange(4)
    exact = autograd(model, x, y)
    hzo.backward(hzo.trace(model, x), F.cross_entropy, x, y, tree="bisect", assume="locality", scheme="forward")
    found = grads(model)
    inside = [name for name in exact if "expand" in name]
    a, b = (torch.cat([g[name].flatten() for name in inside]) for g in (found, exact))
    assert 1 - F.cosine_similarity(a.double(), b.double(), dim=0) < 1e-4


@pytest.mark.parametrize(("scheme", "tolerance"), [("central", 1e-9), ("forward", 1e-6)])
@pytest.mark.parametrize("mask", [-1e4, -1e9, 1e30, -math.inf, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_masks_set_nobody_elses_step(scheme, tolerance, mask, share):
    torch.manual_seed(0)
    x = torch.randn(3, 20, dtype=torch.float64)
    masked = torch.rand(x.shape) < share
    masked[:, ::7] = False
    g = torch.randn(3, 1, dtype=torch.float64)

    def f(x):
        kept = x if mask < 0 else -x
        return (kept.softmax(-1) * torch.arange(20, dtype=x.dtype).sin()).sum(-1, keepdim=True)

    filled = x.masked_fill(masked, mask)
    found = hzo.estimate_vjp(f, filled, g, scheme=scheme)
    reference = exact(f, [filled], [g])[0]
    assert reference[masked].abs().max() == 0
    assert found[masked].abs().max() == 0
    assert (found - reference).norm() < tolerance * reference.norm()


@pytest.mark.parametrize(("dtype", "small", "tolerance"), [(torch.float64, 1e-9, 1e-3), (torch.float32, 1e-3, 3e-2)])
def test_elements_of_different_size_in_one_tensor(dtype, small, tolerance):
    """Columns in other units: each has its own step, whether the function looks at them in their unit or adds them."""
    torch.manual_seed(0)
    units = torch.tensor([1.0, small, small**0.5, 1.0], dtype=dtype)
    x, g = torch.randn(16, 4, dtype=dtype) * units, torch.randn(16, 2, dtype=dtype)
    weight = torch.randn(2, 4, dtype=dtype)
    for f in (lambda x: torch.sin(2 * x / units) @ weight.T, lambda x: x @ weight.T):
        reference = exact(f, [x], [g])[0]
        found = hzo.estimate_vjp(f, x, g)
        for column in range(4):
            assert (found - reference)[:, column].norm() < tolerance * reference[:, column].norm()


def test_what_has_no_influence_may_be_infinite():
    x = torch.tensor([[1.0, 2.0, 1e-9, 0.0, 0.0]], dtype=torch.float64)
    f = lambda x: torch.where(x > 1e-3, x.abs().sqrt(), 1 / x)  # noqa: E731
    g = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(hzo.estimate_vjp(f, x, g), g / 2 / x.clamp(min=1).sqrt())
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        hzo.estimate_vjp(f, x, torch.ones_like(g))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        hzo.estimate_vjp(lambda x: x / x, x, g)


def test_rounding_is_no_unit():
    """What is left of a difference of equal numbers is as good as zero, and a step of its size would be lost."""
    torch.manual_seed(0)
    x = torch.randn(4, 30, dtype=torch.float64)
    x[:, ::3] *= 1e-17
    g, weight = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, 30, dtype=torch.float64)
    found = hzo.estimate_vjp(lambda x: torch.tanh(x @ weight.T), x, g)
    reference = exact(lambda x: torch.tanh(x @ weight.T), [x], [g])[0]
    assert (found - reference).abs().max() < 1e-8


def test_steps_of_one_sample_are_its_own():
    torch.manual_seed(0)
    sizes = torch.tensor([[1.0], [1e-6], [1e6]], dtype=torch.float64)
    x, g = torch.randn(3, 9, dtype=torch.float64) * sizes, torch.randn(3, 9, dtype=torch.float64)
    x[1] = 1e-6 * x[0]
    f = lambda x: torch.sin(x / x.norm(dim=1, keepdim=True))  # noqa: E731
    found, reference = hzo.estimate_vjp(f, x, g), exact(f, [x], [g])[0]
    assert ((found - reference).norm(dim=1) < 1e-6 * reference.norm(dim=1)).all()


def test_no_step_leaves_a_domain_that_ends_at_zero():
    torch.manual_seed(0)
    x = torch.rand(4, 50, dtype=torch.float64) ** 4
    assert x.min() < 1e-8
    g = torch.randn_like(x)
    for f in (torch.log, torch.sqrt, lambda x: x.log().softmax(-1)):
        found, reference = hzo.estimate_vjp(f, x, g), exact(f, [x], [g])[0]
        assert ((found - reference).abs() < 1e-4 * reference.abs() + 1e-6).all()


def test_running_out_of_memory_takes_smaller_chunks():
    sizes = []

    def hungry(x):
        sizes.append(len(x))
        if len(x) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.sin()

    x, g = normal(4, 16), normal(4, 16)
    torch.testing.assert_close(hzo.estimate_vjp(hungry, x, g), x.cos() * g, rtol=CENTRAL, atol=CENTRAL)
    assert sizes[:3] == [64, 32, 16]
    with pytest.raises(torch.OutOfMemoryError):  # not even one direction fits
        hzo.estimate_vjp(lambda x: hungry(x.repeat(8, 1))[:4], x, g)
    with pytest.raises(RuntimeError, match="something else"):
        hzo.estimate_vjp(lambda x: (_ for _ in ()).throw(RuntimeError("something else")), x, g)


def test_chunks_stay_within_the_budget():
    largest = 0

    def watched(x):
        nonlocal largest
        largest = max(largest, x.numel() * x.element_size())
        return x.sin()

    x, g = normal(4, 200), normal(4, 200)
    hzo.estimate_vjp(watched, x, g, memory=100_000)
    assert 5_000 < largest < 100_000
    page = os.sysconf("SC_PAGE_SIZE")
    assert 0 < vjp.default_memory(torch.device("cpu")) <= page * os.sysconf("SC_PHYS_PAGES") // 4


@pytest.mark.parametrize(
    ("f", "a", "g", "error", "message"),
    [
        (torch.sin, normal(3, 2), normal(4, 2), InputError, "one batch size ≥ 1 in dimension 0"),
        (torch.sin, normal(0, 2), normal(0, 2), InputError, "one batch size ≥ 1"),
        (torch.sin, torch.tensor(1.0), torch.tensor(1.0), InputError, "one batch size ≥ 1"),
        (torch.sin, normal(3, 2), normal(3, 3), InputError, r"expected outputs of shape \[\(\d+, 3\)\]"),
        (lambda x: x[:3], normal(3, 2), normal(3, 2), InputError, r"expected outputs .* batched=False"),
        (lambda x: (x, x), normal(3, 2), normal(3, 2), InputError, "expected outputs of shape"),
        (torch.sin, normal(3, 2) * torch.nan, normal(3, 2), NonFiniteError, "an input holds NaN"),
        (torch.sin, normal(3, 2), normal(3, 2) / 0, NonFiniteError, "g holds NaN or infinity"),
        (lambda x: x / 0, normal(3, 2), normal(3, 2), NonFiniteError, "input 0 of <lambda> returned NaN or infinity"),
    ],
)
def test_bad_arguments(f, a, g, error, message):
    with pytest.raises(error, match=message):
        hzo.estimate_vjp(f, a, g)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheme": "backward"}, InputError, "expected scheme"),
        ({"step": 0}, InputError, "positive finite step"),
        ({"step": 1e-30}, StepError, "vanishes beside values"),
        ({"memory": 0}, InputError, "positive finite memory budget"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        hzo.estimate_vjp(torch.sin, normal(3, 2), normal(3, 2), **options)

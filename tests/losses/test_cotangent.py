"""Cotangents of losses against autograd in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map

from hzo.errors import CoupledSamplesError, InputError, NonFiniteError
from hzo.execution.counting import count_queries
from hzo.losses import perturbed as perturbed_module
from hzo.losses.closed_forms import find_closed_form
from hzo.losses.cotangent import loss_and_cotangent

REDUCTIONS = ["mean", "sum", "none"]
# Central differences in float64: curvature and rounding of order eps^(2/3) = 4e-11, times the curvature of
# the loss over its slope and the share of one coordinate in the value.
DIFFERENCE = 1e-7


def oracle(loss_fn, output, target=None):
    """Mean loss and gradient by autograd, at the output in float64."""

    def leaf(t):
        return t.detach().double().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t

    output = tree_map(leaf, output)
    value = loss_fn(output) if target is None else loss_fn(output, target)
    value.mean().backward()
    return value.mean().detach(), tree_map(lambda t: getattr(t, "grad", None), output)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def classes(*shape, C=4, seed=1):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(seed))


def assert_closed_form(loss_fn, output, target):
    assert find_closed_form(loss_fn) is not None
    with count_queries() as count:
        loss, cotangent = loss_and_cotangent(loss_fn, output, target)
    assert count.loss_evaluations == 0
    expected_loss, expected = oracle(loss_fn, output, target)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(cotangent, expected, rtol=1e-12, atol=1e-15)
    assert not cotangent.requires_grad
    assert not cotangent.is_inference()


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("spatial", [(), (3,), (2, 3)])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["index", "ignored", "probability"])
def test_cross_entropy(reduction, spatial, weight, smoothing, kind):
    output, target = normal(6, 4, *spatial), classes(6, *spatial)
    if kind == "ignored":
        target[:2] = 1
    if kind == "probability":
        target = normal(6, 4, *spatial, seed=2).softmax(1)
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    if kind == "ignored":
        options["ignore_index"] = 1
    assert_closed_form(nn.CrossEntropyLoss(**options), output, target)
    assert_closed_form(partial(F.cross_entropy, **options), output, target)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("spatial", [(), (2, 3)])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("ignore", [-100, 2])
def test_nll(reduction, spatial, weight, ignore):
    options = {"weight": weight, "reduction": reduction, "ignore_index": ignore}
    output = normal(6, 4, *spatial).log_softmax(1)
    assert_closed_form(nn.NLLLoss(**options), output, classes(6, *spatial))
    assert_closed_form(partial(F.nll_loss, **options), output, classes(6, *spatial))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, torch.tensor([[1.0], [2.0], [0.5], [3.0], [0.0]]).double()])
@pytest.mark.parametrize("pos_weight", [None, torch.tensor([3.0, 0.2, 1.0]).double()])
def test_bce_with_logits(reduction, weight, pos_weight):
    options = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
    target = normal(5, 3, seed=3).sigmoid()
    assert_closed_form(nn.BCEWithLogitsLoss(**options), 5 * normal(5, 3), target)
    assert_closed_form(partial(F.binary_cross_entropy_with_logits, **options), 5 * normal(5, 3), target)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "make",
    [
        nn.MSELoss,
        nn.L1Loss,
        nn.SmoothL1Loss,
        partial(nn.SmoothL1Loss, beta=0.3),
        partial(nn.SmoothL1Loss, beta=0.0),
        nn.HuberLoss,
        partial(nn.HuberLoss, delta=0.4),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 2, 2)])
def test_elementwise_regression(make, reduction, shape):
    assert_closed_form(make(reduction=reduction), normal(*shape), normal(*shape, seed=4))


@pytest.mark.parametrize(
    "function",
    [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits],
)
def test_bare_functions(function):
    assert_closed_form(function, normal(5, 3), normal(5, 3, seed=4).sigmoid())


def test_bare_class_functions():
    assert_closed_form(F.cross_entropy, normal(5, 4), classes(5))
    assert_closed_form(F.nll_loss, normal(5, 4).log_softmax(1), classes(5))
    assert_closed_form(F.cross_entropy, normal(5, 4), classes(5).to(torch.uint8))


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 5),
    C=st.integers(1, 5),
    spatial=st.lists(st.integers(1, 3), max_size=2),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    smoothing=st.floats(0, 1),
)
def test_cross_entropy_of_any_shape(batch, C, spatial, scale, smoothing):
    loss_fn = nn.CrossEntropyLoss(label_smoothing=smoothing)
    assert_closed_form(loss_fn, scale * normal(batch, C, *spatial), classes(batch, *spatial, C=C))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss()])
def test_low_precision_outputs_get_float32_cotangents(dtype, loss_fn):
    output = normal(6, 4, dtype=dtype)
    target = classes(6) if isinstance(loss_fn, nn.CrossEntropyLoss) else normal(6, 4, seed=5, dtype=dtype)
    loss, cotangent = loss_and_cotangent(loss_fn, output, target)
    assert loss.dtype == dtype
    assert torch.equal(loss, loss_fn(output, target))  # what the caller would see, rounding included
    assert cotangent.dtype == torch.float32
    wide = target if not target.is_floating_point() else target.double()
    torch.testing.assert_close(cotangent.double(), oracle(loss_fn, output, wide)[1], rtol=1e-5, atol=1e-7)


class Scaled(nn.MSELoss):
    def forward(self, input, target):
        return 10 * super().forward(input, target)


def hooked():
    loss_fn = nn.MSELoss()
    loss_fn.register_forward_hook(lambda module, args, out: 10 * out)
    return loss_fn


def prehooked():
    loss_fn = nn.MSELoss()
    loss_fn.register_forward_pre_hook(lambda module, args: (10 * args[0], args[1]))
    return loss_fn


def own_forward():
    loss_fn = nn.MSELoss()
    loss_fn.forward = lambda output, target: 10 * F.mse_loss(output, target)
    return loss_fn


@pytest.mark.parametrize(
    "loss_fn",
    [
        Scaled(),
        hooked(),
        prehooked(),
        own_forward(),
        partial(F.mse_loss, weight=torch.full((3, 2), 10.0, dtype=torch.float64)),
        partial(F.mse_loss, target=torch.ones(3, 2, dtype=torch.float64)),
    ],
    ids=["subclass", "hook", "pre-hook", "own forward", "weight", "target"],
)
def test_changed_losses_are_perturbed(loss_fn):
    assert find_closed_form(loss_fn) is None
    target = None if isinstance(loss_fn, partial) and "target" in loss_fn.keywords else normal(3, 2, seed=6)
    if target is None:
        loss_fn = partial(loss_fn.func, **loss_fn.keywords)
    _, cotangent = loss_and_cotangent(loss_fn, normal(3, 2), target)
    torch.testing.assert_close(cotangent, oracle(loss_fn, normal(3, 2), target)[1], rtol=DIFFERENCE, atol=DIFFERENCE)


def test_global_hooks_rule_out_closed_forms():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: 2 * out)
    try:
        assert find_closed_form(nn.MSELoss()) is None
    finally:
        handle.remove()
    assert find_closed_form(nn.MSELoss()) is not None


def by_sample(output, target):
    return (output.tanh() * target).flatten(1).sum(1).exp()


def elementwise(output, target):
    return (output - target).pow(4) + output.sin()


def mixing(output, target):
    return by_sample(output, target).pow(2).sum().sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_fn", [by_sample, elementwise, mixing])
@pytest.mark.parametrize("batch", [1, 4])
def test_unknown_losses(loss_fn, batch, dtype):
    output, target = normal(batch, 3, 2, dtype=dtype), normal(batch, 3, 2, seed=7, dtype=dtype)
    kept = output.clone(), target.clone()
    loss, cotangent = loss_and_cotangent(loss_fn, output, target)
    assert torch.equal(loss, loss_fn(output, target).mean())
    assert cotangent.dtype == torch.promote_types(dtype, torch.float32)
    # These accept float64, so only the rounding of the returned cotangent depends on the dtype.
    expected = oracle(loss_fn, output, target.double())[1].to(cotangent.dtype)
    tolerance = max(DIFFERENCE, 4 * torch.finfo(cotangent.dtype).eps)
    torch.testing.assert_close(cotangent, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(output, kept[0])
    assert torch.equal(target, kept[1])


def test_evaluations_are_counted():
    output, target = normal(4, 3, 2), normal(4, 3, 2, seed=7)
    with count_queries() as count:
        loss_and_cotangent(by_sample, output, target)
    assert count.loss_evaluations == (2 * 6 + 4) * 4
    with count_queries() as count:
        loss_and_cotangent(mixing, output, target)
    assert count.loss_evaluations == 2 * (6 * 4) * 4
    with count_queries() as count:
        loss_and_cotangent(mixing, output.float(), target)
    assert count.loss_evaluations == 2 * (6 * 4) * 4 + 2 * 4


def test_tiling_in_chunks_changes_nothing(monkeypatch):
    output, target = normal(4, 3, 2), normal(4, 3, 2, seed=7)
    _, whole = loss_and_cotangent(by_sample, output, target)
    sizes = []

    def watched(z, t):
        sizes.append(len(z))
        return by_sample(z, t)

    monkeypatch.setattr(perturbed_module, "TILED_ELEMENTS", 4 * 48)  # two coordinates at once
    _, chunked = loss_and_cotangent(watched, output, target)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    assert max(sizes) == 2 * 2 * 4


@pytest.mark.parametrize("reduce", [lambda t: t, lambda t: t.mean()], ids=["per sample", "scalar"])
def test_pytrees_of_outputs_and_targets(reduce):
    output = {"mean": normal(4, 3), "spread": (normal(4, seed=8, dtype=torch.float32), torch.arange(4))}
    target = {"y": normal(4, 3, seed=9), "scale": torch.tensor([1.0, 2.0, 3.0]), "power": 2}

    def loss_fn(z, t):
        spread, index = z["spread"]
        error = ((z["mean"] - t["y"]).abs() ** t["power"] / t["scale"]).sum(1)
        return reduce(error * (-spread).exp() + spread * (1 + index))

    loss, cotangent = loss_and_cotangent(loss_fn, output, target)
    expected_loss, expected = oracle(loss_fn, output, target)
    torch.testing.assert_close(loss, expected_loss)
    assert cotangent["spread"][1] is None
    assert cotangent["spread"][0].dtype == torch.float32
    torch.testing.assert_close(cotangent["mean"], expected["mean"], rtol=DIFFERENCE, atol=DIFFERENCE)
    torch.testing.assert_close(cotangent["spread"][0].double(), expected["spread"][0], rtol=1e-6, atol=DIFFERENCE)


def test_no_target_and_numbers():
    output = normal(2, 3)
    expected = oracle(lambda z: z.pow(3).mean(), output)[1]
    for loss_fn in (lambda z: z.pow(3).mean(), lambda z: float(z.pow(3).mean())):
        _, cotangent = loss_and_cotangent(loss_fn, output)
        torch.testing.assert_close(cotangent, expected, rtol=DIFFERENCE, atol=DIFFERENCE)


def test_a_loss_that_computes_in_float32_gets_a_step_for_float32():
    output, target = normal(4, 3, 2, dtype=torch.float32), normal(4, 3, 2, seed=7, dtype=torch.float32)

    def narrow(z, t):
        return mixing(z.float(), t.float()).to(z.dtype)

    def strict(z, t):
        if z.dtype != torch.float32:
            raise RuntimeError("expected Float but found Double")
        return mixing(z, t)

    expected = oracle(mixing, output, target.double())[1].float()
    for loss_fn in (narrow, strict):
        _, cotangent = loss_and_cotangent(loss_fn, output, target)
        # (eps N)^(2/3) = 2e-4 of the largest; a step made for float64 leaves 2e-2.
        error = (cotangent - expected).abs().max() / expected.abs().max()
        assert error < 1e-3


def test_writing_into_the_output_is_harmless():
    output, target = normal(3, 2), normal(3, 2, seed=6)

    def in_place(z, t):
        return z.sub_(t).pow_(2).mean()

    kept = output.clone()
    _, cotangent = loss_and_cotangent(in_place, output, target)
    torch.testing.assert_close(cotangent, 2 * (output - target) / 6, rtol=DIFFERENCE, atol=DIFFERENCE)
    assert torch.equal(output, kept)


def test_coupled_samples_are_noticed():
    def centred(z, t):
        return ((z - z.mean(0)) * t).pow(2).sum(1)

    with pytest.raises(CoupledSamplesError, match="own sample"):
        loss_and_cotangent(centred, normal(4, 3), normal(4, 3, seed=6))
    with pytest.raises(CoupledSamplesError):
        loss_and_cotangent(centred, torch.ones(4, 3).double(), normal(4, 3, seed=6))

    def scalar(z, t):
        return centred(z, t).mean()

    _, cotangent = loss_and_cotangent(scalar, normal(4, 3), normal(4, 3, seed=6))
    expected = oracle(scalar, normal(4, 3), normal(4, 3, seed=6))[1]
    torch.testing.assert_close(cotangent, expected, rtol=DIFFERENCE, atol=DIFFERENCE)


@pytest.mark.parametrize(
    ("loss_fn", "output", "target", "message"),
    [
        (nn.CrossEntropyLoss(), torch.zeros(0, 4), torch.zeros(0).long(), "at least one sample"),
        (by_sample, torch.zeros(0, 4), torch.zeros(0, 4), "at least one sample"),
        (nn.CrossEntropyLoss(), torch.zeros(3, 4), torch.zeros(2).long(), "batch size 3"),
        (by_sample, torch.zeros(3, 4), torch.zeros(2, 4), "batch size 3"),
        (nn.CrossEntropyLoss(), torch.zeros(3, 4), torch.zeros(3).int(), "int64"),
        (nn.CrossEntropyLoss(), torch.zeros(3, 4), torch.zeros(3), r"\.long\(\)"),
        (nn.CrossEntropyLoss(), torch.zeros(3, 4), torch.tensor([0, 4, 1]), "from 0 to 3, got 0 to 4"),
        (nn.CrossEntropyLoss(), torch.zeros(3, 4), torch.tensor([0, -1, 1]), "from 0 to 3, got -1 to 1"),
        (nn.CrossEntropyLoss(), torch.zeros(3, 4), torch.zeros(3, 2).long(), r"indices \(B, \.\.\.\)"),
        (nn.CrossEntropyLoss(), torch.zeros(3), torch.zeros(3).long(), r"output \(B, C"),
        (nn.NLLLoss(), torch.zeros(3, 4), torch.zeros(3, 4), "int64"),
        (nn.MSELoss(), torch.zeros(3, 1), torch.zeros(3), "broadcasting"),
        (nn.MSELoss(), torch.zeros(3, 1), None, "tensor as output"),
        (nn.MSELoss(), (torch.zeros(3, 1),), torch.zeros(3, 1), "tensor as output"),
        (nn.MSELoss(), torch.tensor(1.0), torch.tensor(1.0), "first dimension"),
        (nn.MSELoss(), torch.zeros(3).long(), torch.zeros(3), "floating-point"),
        (by_sample, (torch.zeros(3, 1), torch.zeros(2, 1)), None, "first dimension"),
        (lambda z: z.sum(0), torch.zeros(3, 4), None, r"shape \(\) or \(3, \.\.\.\)"),
        (lambda z: z[:3, 0], torch.ones(3, 4), None, "one loss value a sample"),
        (lambda z: "loss", torch.ones(3, 4), None, "tensor or a number"),
    ],
)
def test_input_errors(loss_fn, output, target, message):
    with pytest.raises(InputError, match=message):
        loss_and_cotangent(loss_fn, output, target)


@pytest.mark.parametrize(
    ("loss_fn", "output", "target"),
    [
        (nn.CrossEntropyLoss(), torch.zeros(3, 4), torch.full((3,), -100)),
        (nn.CrossEntropyLoss(), torch.full((3, 4), torch.nan), torch.zeros(3).long()),
        (lambda z: z.log().mean(), torch.zeros(3, 4), None),
        (lambda z: z.log().sum(1), torch.tensor([[1.0, 1e-9], [1.0, 1.0]]), None),
        (lambda z: z.log().sum(), torch.tensor([[1.0, 1e-9], [1.0, 1.0]]), None),
    ],
    ids=["all ignored", "nan", "log of zero", "log within the step", "log within the step, scalar"],
)
def test_non_finite_losses(loss_fn, output, target):
    with pytest.raises(NonFiniteError, match="finite"):
        loss_and_cotangent(loss_fn, output, target)


def test_autograd_is_not_used(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("autograd was called")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    output = normal(4, 3).requires_grad_()
    for loss_fn, target in ((nn.MSELoss(), normal(4, 3)), (by_sample, normal(4, 3)), (mixing, normal(4, 3))):
        loss, cotangent = loss_and_cotangent(loss_fn, output, target)
        assert not loss.requires_grad
        assert not cotangent.requires_grad

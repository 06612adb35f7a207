"""Losses: every one of torch.nn.functional with every reduction, against autograd in float64."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hzo.reverse import record
from support.chip import Chip
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten
REDUCTIONS = ["none", "mean", "sum"]
CLASSES = torch.tensor([0, 2, 3, 1, 2])
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.3], dtype=torch.float64)
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)


def share(x):
    return x.sigmoid()


def on_pixels(reduction, **options):
    """Classes of pixels, some of them ignored."""
    target = torch.arange(12).view(2, 2, 3) % 4
    return lambda x: F.cross_entropy(x.view(2, 4, 2, 3), target, reduction=reduction, **options)


# ---- of an input and a constant target -------------------------------------------------------------------------------

WITH_TARGET = {
    "cross_entropy": (lambda x, r: F.cross_entropy(x, CLASSES, reduction=r), (5, 4), "nll_loss_forward"),
    "weighted": (lambda x, r: F.cross_entropy(x, CLASSES, WEIGHTS, reduction=r), (5, 4), "nll_loss_forward"),
    "ignored": (lambda x, r: F.cross_entropy(x, CLASSES, ignore_index=2, reduction=r), (5, 4), "nll_loss_forward"),
    "ignored by default": (
        lambda x, r: F.cross_entropy(x, CLASSES.masked_fill(CLASSES == 2, -100), reduction=r), (5, 4), None,
    ),
    "smoothed": (
        lambda x, r: F.cross_entropy(x, CLASSES, WEIGHTS, label_smoothing=0.1, ignore_index=3, reduction=r),
        (5, 4), None,
    ),
    "probabilities": (
        lambda x, r: F.cross_entropy(x, torch.full((5, 4), 0.25).double(), WEIGHTS, reduction=r, label_smoothing=0.2),
        (5, 4), None,
    ),
    "one sample": (lambda x, r: F.cross_entropy(x, torch.tensor(2), reduction=r), (4,), None),
    "pixels": (lambda x, r: on_pixels(r)(x), (2, 24), "nll_loss2d_forward"),
    "pixels, weighted": (lambda x, r: on_pixels(r, weight=WEIGHTS)(x), (2, 24), "nll_loss2d_forward"),
    "pixels, ignored": (lambda x, r: on_pixels(r, ignore_index=1)(x), (2, 24), "nll_loss2d_forward"),
    "pixels, smoothed": (lambda x, r: on_pixels(r, label_smoothing=0.1)(x), (2, 24), None),
    "nll_loss": (lambda x, r: F.nll_loss(x, CLASSES, WEIGHTS, reduction=r), (5, 4), "nll_loss_forward"),
    "nll_loss of volumes": (
        lambda x, r: F.nll_loss(x.view(1, 4, 2, 2, 2), torch.arange(8).view(1, 2, 2, 2) % 4, reduction=r), (32,), None,
    ),
    "binary_cross_entropy": (
        lambda x, r: F.binary_cross_entropy(share(x), SIGNS.clamp(0), reduction=r), (5,), "binary_cross_entropy",
    ),
    "binary_cross_entropy, weighted": (
        lambda x, r: F.binary_cross_entropy(share(x), SIGNS.clamp(0).expand(3, 5), SIGNS.abs() * 2, reduction=r),
        (3, 5), None,
    ),
    "with logits": (
        lambda x, r: F.binary_cross_entropy_with_logits(x, SIGNS.clamp(0), reduction=r), (5,),
        "binary_cross_entropy_with_logits",
    ),
    "with logits, weighted": (
        lambda x, r: F.binary_cross_entropy_with_logits(
            x, SIGNS.clamp(0).expand(3, 5), SIGNS.abs() * 2, pos_weight=SIGNS + 2, reduction=r
        ),
        (3, 5), "binary_cross_entropy_with_logits",
    ),
    "soft_margin_loss": (lambda x, r: F.soft_margin_loss(x, SIGNS, reduction=r), (5,), "soft_margin_loss"),
    "multilabel_soft_margin_loss": (
        lambda x, r: F.multilabel_soft_margin_loss(x, SIGNS.clamp(0).expand(3, 5), SIGNS + 2, reduction=r),
        (3, 5), None,
    ),
    "multi_margin_loss": (lambda x, r: F.multi_margin_loss(x, CLASSES, reduction=r), (5, 4), "multi_margin_loss"),
    "multi_margin_loss, options": (
        lambda x, r: F.multi_margin_loss(x, CLASSES, 2, 0.7, WEIGHTS, reduction=r), (5, 4), "multi_margin_loss",
    ),
    "multilabel_margin_loss": (
        lambda x, r: F.multilabel_margin_loss(x, torch.tensor([[3, 0, -1, 1], [1, -1, 2, 0]]), reduction=r), (2, 4),
        "multilabel_margin_loss_forward",
    ),
    "hinge_embedding_loss": (lambda x, r: F.hinge_embedding_loss(x, SIGNS, 1.1, reduction=r), (5,), None),
    "poisson_nll_loss": (lambda x, r: F.poisson_nll_loss(x, SIGNS + 2, full=True, reduction=r), (5,), None),
    "poisson_nll_loss of rates": (
        lambda x, r: F.poisson_nll_loss(x.exp(), SIGNS + 2, log_input=False, reduction=r), (5,), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", WITH_TARGET)
def test_constant_targets(case, reduction):
    function, shape, call = WITH_TARGET[case]
    check(lambda x: function(x, reduction), leaves_of(shape), calls=[f"aten.{call}.default"] if call else None)


def test_all_targets_ignored():
    check(lambda x: F.cross_entropy(x, CLASSES * 0 + 1, ignore_index=1, reduction="sum"), leaves_of((5, 4)))


# ---- of two or three operands that all have a gradient ---------------------------------------------------------------

OF_SEVERAL = {
    "mse_loss": (lambda a, b, r: F.mse_loss(a, b, reduction=r), "mse_loss"),
    "weighted mse_loss": (lambda a, b, r: F.mse_loss(a, b, reduction=r, weight=a.detach().abs()), None),
    "l1_loss": (lambda a, b, r: F.l1_loss(a, b, reduction=r), None),
    "smooth_l1_loss": (lambda a, b, r: F.smooth_l1_loss(a, b, reduction=r), "smooth_l1_loss"),
    "smooth_l1_loss, beta": (lambda a, b, r: F.smooth_l1_loss(a, b, beta=0.3, reduction=r), None),
    "smooth_l1_loss, beta 0": (lambda a, b, r: F.smooth_l1_loss(a, b, beta=0.0, reduction=r), None),
    "huber_loss": (lambda a, b, r: F.huber_loss(a, b, r, 0.7), "huber_loss"),
    "kl_div": (lambda a, b, r: F.kl_div(a.log_softmax(1), b.softmax(1), reduction=r), None),
    "kl_div of logarithms": (
        lambda a, b, r: F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction=r, log_target=True), None,
    ),
    "binary_cross_entropy": (
        lambda a, b, r: F.binary_cross_entropy(share(a), share(b), WEIGHTS, reduction=r),
        "binary_cross_entropy",
    ),
    "with logits": (
        lambda a, b, r: F.binary_cross_entropy_with_logits(a, share(b), WEIGHTS, reduction=r),
        "binary_cross_entropy_with_logits",
    ),
    "with logits, positive": (
        lambda a, b, r: F.binary_cross_entropy_with_logits(a, share(b), pos_weight=WEIGHTS, reduction=r),
        "binary_cross_entropy_with_logits",
    ),
    "soft targets": (lambda a, b, r: F.cross_entropy(a, b.softmax(1), reduction=r), None),
    "cosine_embedding_loss": (
        lambda a, b, r: F.cosine_embedding_loss(a, b, SIGNS, 0.1, reduction=r), None,
    ),
    "margin_ranking_loss": (
        lambda a, b, r: F.margin_ranking_loss(a[:, 0], b[:, 0], SIGNS, 0.2, reduction=r), None,
    ),
    "gaussian_nll_loss": (
        lambda a, b, r: F.gaussian_nll_loss(a, b.detach(), b.exp() + a.square(), full=True, reduction=r),
        None,
    ),
    "poisson_nll_loss": (lambda a, b, r: F.poisson_nll_loss(a, b.exp(), reduction=r), None),
    "triplet_margin_loss": (
        lambda a, b, r: F.triplet_margin_loss(a, b, a.roll(1, 0) * b, swap=True, reduction=r), None,
    ),
    "triplet_margin_with_distance_loss": (
        lambda a, b, r: F.triplet_margin_with_distance_loss(a, b, a.roll(1, 0), reduction=r), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("weights", [(), (1,)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", OF_SEVERAL)
def test_several_operands(case, reduction, weights):
    function, call = OF_SEVERAL[case]
    calls = [f"aten.{call}.default"] if call else None
    measured = weights and case.split(",")[0] in ("mse_loss", "smooth_l1_loss", "huber_loss")
    check(lambda a, b: function(a, b, reduction), leaves_of((5, 4), (5, 4)), calls=calls, weights=weights,
          tolerance=1e-8 if measured else 1e-9)  # fmt: skip


def test_one_operand_that_needs_a_gradient():
    constant = torch.randn(5, 4, dtype=torch.float64)
    for function in (F.mse_loss, F.smooth_l1_loss, F.huber_loss):
        check(lambda a, f=function: f(constant, a), leaves_of((5, 4)))
        check(lambda a, f=function: f(a, constant), leaves_of((5, 4)))
    check(lambda a: F.binary_cross_entropy_with_logits(constant, share(a)), leaves_of((5, 4)))
    check(lambda a: F.binary_cross_entropy(share(constant), share(a)), leaves_of((5, 4)))


def test_extreme_probabilities():
    """PyTorch bounds the logarithms of zero and one."""
    p = torch.tensor([0.0, 1.0, 0.5, 1e-13], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    check(lambda p: F.binary_cross_entropy(p, target), [p])
    check(lambda t: F.binary_cross_entropy(p.detach().clamp(1e-40, 1 - 1e-12), t), [share(target).detach()])
    check(lambda x: F.binary_cross_entropy_with_logits(x * 100, target), leaves_of((4,)))


def test_targets_of_certain_predictions():
    """The loss has bounded logarithms; PyTorch's derivative by the target forgets that, and is infinite."""
    p, (target,) = torch.tensor([0.0, 1.0], dtype=torch.float64), leaves_of((2,))
    with record() as step:
        loss = F.binary_cross_entropy(p, share(target), reduction="sum")
    ((_, found),) = step.gradients(loss)
    slope = share(target.detach()) * (1 - share(target.detach()))
    assert torch.allclose(found, slope * torch.tensor([100.0, -100.0], dtype=torch.float64))


def test_losses_in_single_precision_and_half():
    check(lambda x: F.cross_entropy(x, CLASSES), leaves_of((5, 4), dtype=torch.float32), tolerance=1e-5)
    check(lambda x: F.cross_entropy(x.float(), CLASSES), leaves_of((5, 4), dtype=torch.bfloat16), tolerance=1e-2)


# ---- sequences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss(reduction, zero_infinity):
    targets = torch.tensor([[1, 2, 2], [3, 1, 0]])

    def function(x, lengths=(6, 5), of_targets=(3, 2), **options):
        given = x.log_softmax(2), targets, lengths, of_targets
        return F.ctc_loss(*given, reduction=reduction, zero_infinity=zero_infinity, **options)

    check(function, leaves_of((6, 2, 5)))
    check(lambda x: function(x, torch.tensor([6, 5]), torch.tensor([3, 2])), leaves_of((6, 2, 5)))
    check(lambda x: function(x, blank=4), leaves_of((6, 2, 5)))
    check(lambda x: F.ctc_loss(x.log_softmax(1), targets[0], (6,), (3,), reduction=reduction), leaves_of((6, 5)))
    if zero_infinity:  # a target that is too long
        check(lambda x: function(x, (6, 2), (3, 3)), leaves_of((6, 2, 5)))


def test_adaptive_log_softmax():
    module = nn.AdaptiveLogSoftmaxWithLoss(6, 10, [3, 6]).double()
    target = torch.tensor([0, 4, 8, 9, 2])
    check(lambda x: module(x, target).loss, leaves_of((5, 6)))


# ---- targets that are weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["mse_loss", "smooth_l1_loss", "huber_loss"])
def test_prototypes_are_not_read(name, reduction):
    """A learned target that the chip holds; its parameter is full of NaN."""
    function = getattr(F, name)
    x, prototypes = leaves_of((5, 4), (5, 4))
    weight = nn.Parameter(prototypes.detach().clone())
    (expected,) = torch.autograd.grad(function(x, weight, reduction=reduction).sum(), x)
    operator = getattr(aten, name).default
    with Chip({operator: lambda result: result}, [weight]) as chip, record() as step:
        loss = function(x, weight, reduction=reduction).sum()
    with chip:
        found = {id(leaf): g for leaf, g in step.gradients(loss)}
    assert torch.allclose(found[id(x)], expected, rtol=1e-7)


def test_every_loss_of_functional_is_tested():
    names = {name for name in dir(F) if name.endswith("_loss") or name in ("cross_entropy", "kl_div")}
    here = Path(__file__).read_text()
    assert not [name for name in names if f"F.{name}" not in here]

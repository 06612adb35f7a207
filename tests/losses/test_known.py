"""Losses at the end of a tape against autograd in float64; what is asked of torch's own losses."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map

import hzo
from hzo.errors import InputError, NonFiniteError
from hzo.execution.counting import count_queries
from hzo.losses.known import find_known, fitting_loss

REDUCTIONS = ["mean", "sum", "none"]


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


def loss_and_cotangent(loss_fn, output, target=None):
    """The same from a tape."""
    leaves = tree_map(lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t, output)
    with hzo.record() as step:
        made = tree_map(lambda t: t.clone() if t.is_floating_point() else t, leaves)  # losses may write to it
        loss = loss_fn(made) if target is None else loss_fn(made, target)
    step.backward(loss)
    return loss.detach().mean(), tree_map(lambda t: t.grad, leaves)


def assert_by_rules(loss_fn, output, target):
    assert find_known(loss_fn) is not None
    with count_queries() as count:
        loss, cotangent = loss_and_cotangent(loss_fn, output, target)
    assert count.queries == 0
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
    assert_by_rules(nn.CrossEntropyLoss(**options), output, target)
    assert_by_rules(partial(F.cross_entropy, **options), output, target)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("spatial", [(), (2, 3)])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("ignore", [-100, 2])
def test_nll(reduction, spatial, weight, ignore):
    options = {"weight": weight, "reduction": reduction, "ignore_index": ignore}
    output = normal(6, 4, *spatial).log_softmax(1)
    assert_by_rules(nn.NLLLoss(**options), output, classes(6, *spatial))
    assert_by_rules(partial(F.nll_loss, **options), output, classes(6, *spatial))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, torch.tensor([[1.0], [2.0], [0.5], [3.0], [0.0]]).double()])
@pytest.mark.parametrize("pos_weight", [None, torch.tensor([3.0, 0.2, 1.0]).double()])
def test_bce_with_logits(reduction, weight, pos_weight):
    options = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
    target = normal(5, 3, seed=3).sigmoid()
    assert_by_rules(nn.BCEWithLogitsLoss(**options), 5 * normal(5, 3), target)
    assert_by_rules(partial(F.binary_cross_entropy_with_logits, **options), 5 * normal(5, 3), target)


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
    assert_by_rules(make(reduction=reduction), normal(*shape), normal(*shape, seed=4))


@pytest.mark.parametrize(
    "function",
    [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits],
)
def test_bare_functions(function):
    assert_by_rules(function, normal(5, 3), normal(5, 3, seed=4).sigmoid())


def test_bare_class_functions():
    assert_by_rules(F.cross_entropy, normal(5, 4), classes(5))
    assert_by_rules(F.nll_loss, normal(5, 4).log_softmax(1), classes(5))
    assert_by_rules(F.cross_entropy, normal(5, 4), classes(5).to(torch.uint8))


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
    assert_by_rules(loss_fn, scale * normal(batch, C, *spatial), classes(batch, *spatial, C=C))


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
def test_changed_losses(loss_fn):
    assert find_known(loss_fn) is None
    target = None if isinstance(loss_fn, partial) and "target" in loss_fn.keywords else normal(3, 2, seed=6)
    if target is None:
        loss_fn = partial(loss_fn.func, **loss_fn.keywords)
    _, cotangent = loss_and_cotangent(loss_fn, normal(3, 2), target)
    torch.testing.assert_close(cotangent, oracle(loss_fn, normal(3, 2), target)[1], rtol=1e-12, atol=1e-15)


def test_global_hooks_make_others_of_them():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: 2 * out)
    try:
        assert find_known(nn.MSELoss()) is None
    finally:
        handle.remove()
    assert find_known(nn.MSELoss()) is not None


def by_sample(output, target):
    return (output.tanh() * target).flatten(1).sum(1).exp()


def elementwise(output, target):
    return (output - target).pow(4) + output.sin()


def mixing(output, target):
    return by_sample(output, target).pow(2).sum().sqrt()


@pytest.mark.parametrize("loss_fn", [by_sample, elementwise, mixing])
@pytest.mark.parametrize("batch", [1, 4])
def test_unknown_losses(loss_fn, batch):
    output, target = normal(batch, 3, 2), normal(batch, 3, 2, seed=7)
    loss, cotangent = loss_and_cotangent(loss_fn, output, target)
    expected_loss, expected = oracle(loss_fn, output, target)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(cotangent, expected, rtol=1e-12, atol=1e-15)


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
    # The spread is of float32, and so is its exponential.
    torch.testing.assert_close(cotangent["mean"], expected["mean"], rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(cotangent["spread"][0].double(), expected["spread"][0], rtol=1e-6, atol=1e-7)


def test_writing_into_the_output_is_harmless():
    output, target = normal(3, 2), normal(3, 2, seed=6)

    def in_place(z, t):
        return z.sub_(t).pow_(2).mean()

    kept = output.clone()
    _, cotangent = loss_and_cotangent(in_place, output, target)
    torch.testing.assert_close(cotangent, 2 * (output - target) / 6, rtol=1e-12, atol=1e-15)
    assert torch.equal(output, kept)


@pytest.mark.parametrize(
    ("loss_fn", "output", "target", "message"),
    [
        (nn.CrossEntropyLoss(), torch.zeros(0, 4), torch.zeros(0).long(), "at least one sample"),
        (nn.CrossEntropyLoss(), torch.zeros(3, 4), torch.zeros(2).long(), "batch size 3"),
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
        (lambda z: "loss", torch.ones(3, 4), None, "to return a tensor"),
    ],
)
def test_input_errors(loss_fn, output, target, message):
    with pytest.raises(InputError, match=message):
        fitting_loss(loss_fn, output, target)


@pytest.mark.parametrize(
    ("loss_fn", "output", "target"),
    [
        (nn.CrossEntropyLoss(), torch.zeros(3, 4), torch.full((3,), -100)),
        (nn.CrossEntropyLoss(), torch.full((3, 4), torch.nan), torch.zeros(3).long()),
        (lambda z: z.log().mean(), torch.zeros(3, 4), None),
    ],
    ids=["all ignored", "nan", "log of zero"],
)
def test_non_finite_losses(loss_fn, output, target):
    with pytest.raises(NonFiniteError, match="the loss is"):
        loss_and_cotangent(loss_fn, output, target)

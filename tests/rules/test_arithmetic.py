"""Elementwise calls of two or more operands: autograd's gradients in float64; where one is a weight, the hardware's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hzo import count_queries
from hzo.reverse import record
from support.chip import Chip, follows, ramp
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten
special = torch.special
WEIGHTS = [(), (0,), (1,), (0, 1)]
SHAPES = {
    "equal": [(3, 4), (3, 4)],
    "row": [(3, 4), (4,)],
    "column": [(3, 1), (3, 4)],
    "number": [(), (3, 4)],
    "channels": [(2, 3, 2, 2), (3, 1, 1)],
    "outer": [(3, 1), (1, 4)],
    "empty": [(0, 4), (4,)],
}


def ties(function):
    """Operands of which some are equal."""
    return lambda a, b: function((a * 2).round() / 2 + a * 0, (b * 2).round() / 2 + b * 0)


PAIRS = {
    "add": (torch.add, "aten.add.Tensor"),
    "add alpha": (lambda a, b: torch.add(a, b, alpha=0.3), "aten.add.Tensor"),
    "sub": (torch.sub, "aten.sub.Tensor"),
    "sub alpha": (lambda a, b: torch.sub(a, b, alpha=0.3), "aten.sub.Tensor"),
    "rsub": (lambda a, b: torch.rsub(a, b, alpha=2.0), None),
    "mul": (torch.mul, "aten.mul.Tensor"),
    "div": (torch.div, "aten.div.Tensor"),
    "div none": (lambda a, b: torch.div(a, b, rounding_mode=None), "aten.div.Tensor_mode"),
    "div floor": (lambda a, b: torch.div(a, b, rounding_mode="floor") * a, "aten.div.Tensor_mode"),
    "div trunc": (lambda a, b: torch.div(a, b, rounding_mode="trunc") * b, "aten.div.Tensor_mode"),
    "fmod": (torch.fmod, "aten.fmod.Tensor"),
    "remainder": (torch.remainder, "aten.remainder.Tensor"),
    "pow": (torch.pow, "aten.pow.Tensor_Tensor"),
    "float_power": (torch.float_power, "aten.pow.Tensor_Tensor"),
    "atan2": (torch.atan2, "aten.atan2.default"),
    "hypot": (torch.hypot, "aten.hypot.default"),
    "copysign": (torch.copysign, "aten.copysign.Tensor"),
    "nextafter": (torch.nextafter, "aten.nextafter.default"),
    "logaddexp": (torch.logaddexp, "aten.logaddexp.default"),
    "logaddexp2": (torch.logaddexp2, "aten.logaddexp2.default"),
    "xlogy": (torch.xlogy, "aten.xlogy.Tensor"),
    "xlog1py": (special.xlog1py, "aten.special_xlog1py.default"),
    "ldexp": (torch.ldexp, "aten.ldexp.Tensor"),
    "maximum": (torch.maximum, "aten.maximum.default"),
    "maximum, ties": (ties(torch.maximum), "aten.maximum.default"),
    "max of two": (torch.max, "aten.maximum.default"),
    "minimum": (torch.minimum, "aten.minimum.default"),
    "minimum, ties": (ties(torch.minimum), "aten.minimum.default"),
    "fmax": (ties(torch.fmax), "aten.fmax.default"),
    "fmin": (ties(torch.fmin), "aten.fmin.default"),
    "clamp_min": (ties(torch.clamp_min), "aten.clamp_min.Tensor"),
    "clamp_max": (ties(torch.clamp_max), "aten.clamp_max.Tensor"),
    "clamp below": (lambda a, b: a.clamp(min=b), None),
    "clamp above": (lambda a, b: a.clamp(max=b), None),
    "lerp number": (lambda a, b: torch.lerp(a, b, 0.3), "aten.lerp.Scalar"),
    "where": (lambda a, b: torch.where(a.detach() > b.detach(), a, b), "aten.where.self"),
    "prelu": (lambda a, b: aten._prelu_kernel(a - 1, b), "aten._prelu_kernel.default"),
    "squared difference": (lambda a, b: (a - b) ** 2, "aten.pow.Tensor_Scalar"),
    "swiglu": (lambda a, b: F.silu(a) * b, "aten.mul.Tensor"),
}  # fmt: skip
SAME_SHAPE_ONLY = {"prelu"}


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("case", PAIRS)
def test_two_operands(case, shapes, weights):
    if case in SAME_SHAPE_ONLY and shapes not in ("equal", "row", "channels"):
        pytest.skip("the weight has at most the operand's shape")
    function, call = PAIRS[case]
    tolerance = 1e-9
    check(function, leaves_of(*SHAPES[shapes], positive=True), weights=weights, calls=[call] if call else None,
          tolerance=tolerance)  # fmt: skip


SIGNED = ["mul", "div", "fmod", "remainder", "atan2", "hypot", "copysign", "logaddexp", "maximum", "fmin", "clamp_min"]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", SIGNED)
def test_two_operands_of_both_signs(case, weights):
    check(PAIRS[case][0], leaves_of((5, 6), (6,)), weights=weights)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", ["add", "sub", "mul", "div", "rsub", "where", "lerp number"])
def test_two_complex_operands(case, weights):
    function = PAIRS[case][0]
    if case == "where":
        function = lambda a, b: torch.where(a.detach().real > b.detach().real, a, b)  # noqa: E731
    if case == "rsub":
        function = lambda a, b: torch.rsub(a, b, alpha=2j)  # noqa: E731
    check(function, leaves_of((3, 4), (4,), dtype=torch.complex128), weights=weights)


def test_real_and_complex_operands():
    (real,), (z,) = leaves_of((3,)), leaves_of((3,), dtype=torch.complex128)
    for function in (torch.add, torch.sub, torch.mul, torch.div, lambda a, b: torch.div(b, a)):
        for weights in WEIGHTS:
            check(function, [real, z], weights=weights)


NUMBERS = {
    "add": (lambda x: x + 2, "aten.add.Tensor"),
    "add op": (lambda x: aten.add.Scalar(x, 2, 3), "aten.add.Scalar"),
    "sub": (lambda x: x - 2, "aten.sub.Tensor"),
    "sub op": (lambda x: aten.sub.Scalar(x, 2, 3), "aten.sub.Scalar"),
    "rsub": (lambda x: 2 - x, "aten.rsub.Scalar"),
    "mul": (lambda x: 3 * x, "aten.mul.Tensor"),
    "mul op": (lambda x: aten.mul.Scalar(x, 3), "aten.mul.Scalar"),
    "div": (lambda x: x / 3, "aten.div.Tensor"),
    "div op": (lambda x: aten.div.Scalar(x, 3), "aten.div.Scalar"),
    "div mode": (lambda x: aten.div.Scalar_mode(x, 0.3, rounding_mode="floor") * x, "aten.div.Scalar_mode"),
    "number over": (lambda x: 3 / x, "aten.reciprocal.default"),
    "fmod": (lambda x: x.fmod(0.7), "aten.fmod.Scalar"),
    "remainder": (lambda x: x % 0.7, "aten.remainder.Scalar"),
    "power 0": (lambda x: x**0, "aten.pow.Tensor_Scalar"),
    "power 1": (lambda x: x**1, "aten.pow.Tensor_Scalar"),
    "power 2": (lambda x: x**2, "aten.pow.Tensor_Scalar"),
    "power 3": (lambda x: x**3.0, "aten.pow.Tensor_Scalar"),
    "power 1/2": (lambda x: x**0.5, "aten.pow.Tensor_Scalar"),
    "power -1.5": (lambda x: x**-1.5, "aten.pow.Tensor_Scalar"),
    "of a number": (lambda x: 2**x, "aten.pow.Scalar"),
    "of zero": (lambda x: 0**x, "aten.pow.Scalar"),
    "copysign": (lambda x: torch.copysign(x, -1), "aten.copysign.Scalar"),
    "xlogy number": (lambda x: torch.xlogy(x, 2.5), "aten.xlogy.Scalar_Other"),
    "number xlogy": (lambda x: torch.xlogy(2.5, x), "aten.xlogy.Scalar_Self"),
    "xlog1py number": (lambda x: special.xlog1py(x, 2.5), "aten.special_xlog1py.other_scalar"),
    "number xlog1py": (lambda x: special.xlog1py(2.5, x), "aten.special_xlog1py.self_scalar"),
    "number zeta": (lambda x: special.zeta(2.5, x), "aten.special_zeta.self_scalar"),
    "where number": (lambda x: torch.where(x > 1, x, 0.0), "aten.where.self"),
    "masked_fill": (lambda x: x.masked_fill(x > 1, -math.inf).clamp(min=-9), "aten.masked_fill.Scalar"),
}  # fmt: skip


@pytest.mark.parametrize("case", NUMBERS)
def test_an_operand_and_a_number(case):
    function, call = NUMBERS[case]
    check(function, leaves_of((3, 4), positive=True), calls=[call] if call else None)


def test_rounded_quotients_are_constants():
    """PyTorch has no derivative of ``//``; it is that of ``floor``."""
    (x,) = leaves_of((3, 4))
    with record() as step:
        loss = (x // 0.3 * x).sum()
    ((_, found),) = step.gradients(loss)
    assert torch.equal(found, x.detach() // 0.3)


def test_powers_at_zero():
    x = torch.tensor([0.0, 0.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    for weights in WEIGHTS:
        check(torch.pow, [x, p], weights=weights)
    check(lambda x: x**2 + x**0 + x**1 + x**3, [x])
    check(lambda x: torch.xlogy(x, x + 1), [x])
    check(lambda x: special.xlog1py(x, x), [x])


def test_logarithms_of_zero_times_zero():
    a = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.0, -1.0, 2.0], dtype=torch.float64)
    check(lambda a: torch.xlogy(a, b), [a])
    check(lambda a: special.xlog1py(a, b - 1), [a])
    check(lambda a: torch.xlogy(a, 0.0) * (a.detach() == 0), [a[:2].detach()])


def test_powers_of_complex_numbers():
    for weights in WEIGHTS:
        check(torch.pow, leaves_of((5,), (5,), dtype=torch.complex128), weights=weights)
    check(lambda z: z**2.5, leaves_of((5,), dtype=torch.complex128))
    check(lambda z: z ** (1 + 2j), leaves_of((5,), dtype=torch.complex128))
    check(lambda z: (1 + 2j) ** z, leaves_of((5,), dtype=torch.complex128))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("function", [torch.igamma, torch.igammac, special.zeta], ids=lambda f: f.__name__)
def test_gamma_and_zeta_by_their_second_operand(function, weights):
    a = torch.rand(3, 4, dtype=torch.float64) + 1.5
    if 0 in weights:
        a = nn.Parameter(a, requires_grad=False)
    check(lambda x: function(a, x), leaves_of((4,), positive=True), tolerance=1e-8)


TRIPLES = {
    "addcmul": (torch.addcmul, "aten.addcmul.default"),
    "addcmul value": (lambda a, b, c: torch.addcmul(a, b, c, value=0.3), "aten.addcmul.default"),
    "addcdiv": (torch.addcdiv, "aten.addcdiv.default"),
    "addcdiv value": (lambda a, b, c: torch.addcdiv(a, b, c, value=0.3), "aten.addcdiv.default"),
    "lerp": (torch.lerp, "aten.lerp.Tensor"),
    "clamp": (ties(lambda a, b: a.clamp(b - 0.5, b + 0.5)), None),
    "clamp bounds": (lambda a, b, c: a.clamp(b, c), "aten.clamp.Tensor"),
    "clamp equal bounds": (lambda a, b, c: a.clamp(b, b) + c, "aten.clamp.Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("weights", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("shapes", [[(3, 4)] * 3, [(3, 4), (4,), (3, 1)], [(3, 1), (3, 4), ()]], ids=str)
@pytest.mark.parametrize("case", TRIPLES)
def test_three_operands(case, shapes, weights):
    function, call = TRIPLES[case]
    if case == "clamp bounds" and shapes[0] == (3, 1):
        pytest.skip("PyTorch's own derivative fails where bounds are larger than the operand")
    if case == "clamp":
        shapes, weights = shapes[:2], tuple(w for w in weights if w < 2)
    leaves = leaves_of(*shapes, positive="div" in case)
    check(function, leaves, weights=weights, calls=[call] if call else None)


@pytest.mark.parametrize("bounds", ["both", "min", "max", "clamp_min", "clamp_max"])
def test_where_a_clamp_meets_its_bounds(bounds):
    """On a bound, and between bounds that meet or cross, the choice is that of this version of PyTorch."""
    values = torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    x, low, high = (t.flatten().requires_grad_() for t in torch.meshgrid(values, values, values, indexing="ij"))
    clamps = {
        "both": lambda: x.clamp(low, high),
        "min": lambda: x.clamp(min=low),
        "max": lambda: x.clamp(max=high),
        "clamp_min": lambda: torch.clamp_min(x, low),
        "clamp_max": lambda: torch.clamp_max(x, high),
    }
    leaves = [x, low, high]
    exact = torch.autograd.grad(clamps[bounds]().sum(), leaves, allow_unused=True)
    with record() as tape:
        loss = clamps[bounds]().sum()
    tape.backward(loss)
    for leaf, gradient in zip(leaves, exact, strict=True):
        if gradient is not None:
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)


IN_PLACE = {
    "add": lambda a, b: (a * 1).add_(b),
    "sub": lambda a, b: (a * 1).sub_(b, alpha=2),
    "mul": lambda a, b: (a * 1).mul_(b),
    "div": lambda a, b: (a * 1).div_(b),
    "pow": lambda a, b: (a * 1).pow_(b),
    "pow number": lambda a, b: (a * 1).pow_(3) + b,
    "addcmul": lambda a, b: (a * 1).addcmul_(b, a),
    "addcdiv": lambda a, b: (a * 1).addcdiv_(a, b),
    "lerp": lambda a, b: (a * 1).lerp_(b, 0.3),
    "lerp tensor": lambda a, b: (a * 1).lerp_(b, a),
    "clamp": lambda a, b: (a * 1).clamp_(b, b + 1),
    "clamp_min": lambda a, b: (a * 1).clamp_min_(b),
    "masked_fill": lambda a, b: (a * b).masked_fill_(a > b, 0.5),
    "masked_fill tensor": lambda a, b: (a * 1).masked_fill_(a > 1, b.sum()),
    "copy": lambda a, b: torch.zeros_like(a).copy_(b) * a,
    "copy into": lambda a, b: (a * 2).copy_(b) + a,
    "fill": lambda a, b: (a * 2).fill_(b.sum()),
    "fmod": lambda a, b: (a * 1).fmod_(b),
    "remainder": lambda a, b: (a * 1).remainder_(b),
    "atan2": lambda a, b: (a * 1).atan2_(b),
    "hypot": lambda a, b: (a * 1).hypot_(b),
    "xlogy": lambda a, b: (a * 1).xlogy_(b),
    "copysign": lambda a, b: (a * 1).copysign_(b),
    "ldexp": lambda a, b: (a * 1).ldexp_(b),
    "eq": lambda a, b: (a * 1).eq_(b) + a,
    "floor": lambda a, b: (a * b).floor_() + a,
}


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place(case, weights):
    """What the call overwrites is not there any more, and not needed."""
    check(IN_PLACE[case], leaves_of((3, 4), (4,), positive=True), weights=weights)


CHOICES = {
    "masked_fill": (lambda a, b: a.masked_fill(a > b, 0.1), None),
    "masked_fill of a tensor": (lambda a, b: a.masked_fill(a > 1, b.sum()), "aten.masked_fill.Tensor"),
    "mask larger than the operand": (lambda a, b: b.masked_fill(a > 1, 2.0), "aten.masked_fill.Scalar"),
    "copy of another dtype": (lambda a, b: torch.zeros(3, 4).copy_(b).double() + a, None),
    "an attention mask": (
        lambda a, b: (a + torch.full((3, 4), -1e300, dtype=torch.float64).triu(1)).clamp(-9) * b, None,
    ),
    "fill": (lambda a, b: torch.fill(a, b.mean()) * a, "aten.fill.Tensor"),
    "real and imaginary": (lambda a, b: torch.complex(a, b.expand(3, 4)).abs(), None),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_choices_and_copies(case):
    function, call = CHOICES[case]
    tolerance = 1e-6 if "dtype" in case else 1e-9
    check(function, leaves_of((3, 4), (4,), positive=True), calls=[call] if call else None, tolerance=tolerance)


def test_a_tensor_with_itself():
    check(lambda a: a * a + a / a + torch.maximum(a, a) + a**a, leaves_of((3,), positive=True))


# ---- hardware --------------------------------------------------------------------------------------------------------


def gain(result):
    """A gain for every index of the last dimension, and an offset."""
    return result * ramp(result) + 0.3


ON_CHIP = {
    "mul": (lambda x, w: x * w, "mul.Tensor", [(5, 3, 4), (4,)], 0),
    "mul, weight first": (lambda w, x: w * x, "mul.Tensor", [(4,), (5, 3, 4)], 1),
    "mul, no batch": (lambda x, w: x * w, "mul.Tensor", [(3, 4), (3, 4)], 0),
    "mul, expanded": (lambda x, w: x * w.expand(3, 4), "mul.Tensor", [(5, 3, 4), (4,)], 0),
    "div": (lambda x, w: x / w, "div.Tensor", [(5, 3, 4), (4,)], 0),
    "div, weight first": (lambda w, x: w / x, "div.Tensor", [(4,), (5, 3, 4)], 1),
    "addcmul": (lambda x, w: torch.addcmul(x.detach(), x, w, value=0.5), "addcmul.default", [(5, 4), (4,)], 0),
    "addcdiv": (lambda x, w: torch.addcdiv(x.detach(), x, w, value=0.5), "addcdiv.default", [(5, 4), (4,)], 0),
    "addcdiv, weight first": (lambda w, x: torch.addcdiv(x.detach(), w, x), "addcdiv.default", [(4,), (5, 4)], 1),
    "lerp": (lambda x, w: torch.lerp(x, x.detach(), w), "lerp.Tensor", [(5, 4), (4,)], 0),
    "lerp to": (lambda x, w: torch.lerp(x.detach(), x, w), "lerp.Tensor", [(5, 4), (4,)], 0),
    "xlogy": (torch.xlogy, "xlogy.Tensor", [(5, 4), (4,)], 0),
    "xlogy, weight first": (torch.xlogy, "xlogy.Tensor", [(4,), (5, 4)], 1),
    "ldexp": (torch.ldexp, "ldexp.Tensor", [(5, 4), (4,)], 0),
    "prelu": (lambda x, w: F.prelu(1 - x, w), "_prelu_kernel.default", [(5, 4), (4,)], 0),
}  # fmt: skip


@pytest.mark.parametrize("case", ON_CHIP)
def test_a_product_with_a_weight_is_the_hardware_s(case):
    """A gain of each channel, and an offset, are found in the cotangents of activations; the weight is not read."""
    function, name, shapes, activation = ON_CHIP[case]
    packet, overload = name.split(".")
    operator = getattr(getattr(aten, packet), overload)
    plain = leaves_of(*shapes, positive=True)
    if case == "prelu":  # slope one above zero is that of the type: the chip keeps it

        def change(result):
            return torch.where(result > 0, result, result * ramp(result))
    else:
        change = gain
    follows(function, lambda *leaves: change(function(*leaves)), plain, [1 - activation], {operator: change})


HIDDEN = {
    "pow": "pow.Tensor_Tensor",
    "maximum": "maximum.default",
    "minimum": "minimum.default",
    "fmax": "fmax.default",
    "fmin": "fmin.default",
    "clamp_min": "clamp_min.Tensor",
    "clamp_max": "clamp_max.Tensor",
    "atan2": "atan2.default",
    "hypot": "hypot.default",
    "logaddexp": "logaddexp.default",
    "logaddexp2": "logaddexp2.default",
    "xlogy": "xlogy.Tensor",
    "fmod": "fmod.Tensor",
    "remainder": "remainder.Tensor",
    "copysign": "copysign.Tensor",
    "add": "add.Tensor",
    "sub": "sub.Tensor",
    "mul": "mul.Tensor",
    "div": "div.Tensor",
}


def follow_held_weight(function, name, leaves, weight, tolerance=1e-9):
    """Gradients of the other leaves while the weight is on a chip, and its parameter full of NaN."""
    packet, overload = name.split(".")
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    leaves[weight] = nn.Parameter(leaves[weight].detach())
    others = [t for k, t in enumerate(leaves) if k != weight]
    expected = torch.autograd.grad(function(*leaves).sum(), others)
    operator = getattr(getattr(aten, packet), overload)
    with Chip({operator: lambda result: result}, [leaves[weight]]) as chip, record() as step:
        loss = function(*leaves).sum()
    with chip:
        found = {id(leaf): g for leaf, g in step.gradients(loss)}
    for leaf, g in zip(others, expected, strict=True):
        got = found.get(id(leaf), torch.zeros_like(leaf))
        assert torch.allclose(got, g, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("signs", ["positive", "both signs"])
@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("case", HIDDEN)
def test_no_weight_is_read(case, weight, signs):
    if signs == "both signs" and case in ("pow", "xlogy"):
        pytest.skip("not defined there")
    leaves = leaves_of((5, 4), (5, 4), positive=signs == "positive")
    leaves[weight] = leaves[weight][0]
    follow_held_weight(getattr(torch, case), HIDDEN[case], leaves, weight)


@pytest.mark.parametrize("weight", [0, 1, 2])
def test_no_bound_is_read(weight):
    x, low, high = leaves_of((5, 4), (4,), (5, 1))
    leaves = [x, low.abs() - 1, high.abs() - 0.2]
    follow_held_weight(torch.clamp, "clamp.Tensor", leaves, weight)
    if weight < 2:
        follow_held_weight(lambda a, b: a.clamp(min=b), "clamp.Tensor", leaves[:2], weight)
        follow_held_weight(lambda a, b: a.clamp(max=b), "clamp.Tensor", leaves[:2], weight)


@pytest.mark.parametrize("end", [0, 1])
def test_no_end_of_a_line_is_read(end):
    leaves = leaves_of((4,), (4,), (5, 4))
    follow_held_weight(torch.lerp, "lerp.Tensor", leaves, end)


@pytest.mark.parametrize("name", ["igamma", "igammac", "zeta"])
def test_no_parameter_of_a_rare_function_is_read(name):
    function = getattr(special, {"igamma": "gammainc", "igammac": "gammaincc"}.get(name, name))
    operator = f"special_{name}.default" if name == "zeta" else f"{name}.default"
    leaves = [1.5 + torch.rand(4, dtype=torch.float64), *leaves_of((5, 4), positive=True)]
    follow_held_weight(function, operator, leaves, 0, tolerance=1e-7)  # a central difference


def test_a_measured_factor_costs_two_samples():
    x, w = torch.randn(64, 7, 4, requires_grad=True), nn.Parameter(torch.randn(4))
    with record() as step:
        loss = (x * w).sum()
    with count_queries() as count:
        step.gradients(loss)
    assert count.queries == 2

"""Elementwise calls of one operand: autograd's gradients in float64, at kinks and edges too."""

import math

import pytest
import torch
import torch.nn.functional as F

from hzo.reverse import record
from hzo.rules.base import rules
from hzo.rules.pointwise import FROM_BOTH, FROM_OPERAND, FROM_RESULT
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten
special = torch.special


def values(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype, requires_grad=True)


WIDE = values(-40.0, -3.0, -1.5, -1.0, -0.5, -0.1, -1e-8, 0.0, 1e-8, 0.1, 0.5, 1.0, 1.5, 3.0, 6.0, 25.0)
UNIT = values(-0.99, -0.5, -0.1, 0.0, 0.1, 0.5, 0.99)
POSITIVE = values(1e-6, 0.1, 0.5, 1.0, 1.5, 3.0, 20.0)
SHARE = values(1e-6, 0.1, 0.5, 0.9, 0.999)
ABOVE_ONE = values(1.001, 1.5, 3.0, 20.0)

UNARY = {
    "_standard_gamma": (torch._standard_gamma, POSITIVE),
    "abs": (torch.abs, WIDE),
    "acos": (torch.acos, UNIT),
    "acosh": (torch.acosh, ABOVE_ONE),
    "alias": (aten.alias, WIDE),
    "angle": (torch.angle, WIDE),
    "asin": (torch.asin, UNIT),
    "asinh": (torch.asinh, WIDE),
    "atan": (torch.atan, WIDE),
    "atanh": (torch.atanh, UNIT),
    "clone": (torch.clone, WIDE),
    "cos": (torch.cos, WIDE),
    "cosh": (torch.cosh, UNIT),
    "deg2rad": (torch.deg2rad, WIDE),
    "digamma": (torch.digamma, POSITIVE),
    "erf": (torch.erf, WIDE),
    "erfc": (torch.erfc, WIDE),
    "erfinv": (torch.erfinv, UNIT),
    "exp": (torch.exp, UNIT),
    "exp2": (torch.exp2, UNIT),
    "expm1": (torch.expm1, UNIT),
    "frac": (torch.frac, WIDE),
    "hardsigmoid": (F.hardsigmoid, WIDE),
    "hardswish": (F.hardswish, WIDE),
    "i0": (torch.i0, UNIT),
    "lgamma": (torch.lgamma, POSITIVE),
    "log": (torch.log, POSITIVE),
    "log10": (torch.log10, POSITIVE),
    "log1p": (torch.log1p, POSITIVE),
    "log2": (torch.log2, POSITIVE),
    "mish": (F.mish, WIDE),
    "neg": (torch.neg, WIDE),
    "rad2deg": (torch.rad2deg, WIDE),
    "reciprocal": (torch.reciprocal, ABOVE_ONE),
    "relu": (F.relu, WIDE),
    "rsqrt": (torch.rsqrt, POSITIVE),
    "sgn": (torch.sgn, WIDE),
    "sigmoid": (torch.sigmoid, WIDE),
    "silu": (F.silu, WIDE),
    "sin": (torch.sin, WIDE),
    "sinc": (torch.sinc, UNIT),
    "sinh": (torch.sinh, UNIT),
    "special_entr": (special.entr, POSITIVE),
    "special_erfcx": (special.erfcx, UNIT),
    "special_i0e": (special.i0e, WIDE),
    "special_i1": (special.i1, UNIT),
    "special_i1e": (special.i1e, WIDE),
    "special_log_ndtr": (special.log_ndtr, WIDE),
    "special_ndtri": (special.ndtri, SHARE),
    "sqrt": (torch.sqrt, POSITIVE),
    "tan": (torch.tan, UNIT),
    "tanh": (torch.tanh, WIDE),
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    function, at = UNARY[name]
    check(function, [at], calls=[f"aten.{name}.default"])


def test_every_slope_of_the_tables_is_tested():
    names = {str(target).split(".")[1] for table in (FROM_OPERAND, FROM_RESULT, FROM_BOTH) for target in table}
    assert names <= set(UNARY)


ACTIVATIONS = {
    "gelu": (F.gelu, "gelu"),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu"),
    "elu": (F.elu, "elu"),
    "elu alpha": (lambda x: F.elu(x, 1.7), "elu"),
    "selu": (F.selu, "elu"),
    "celu": (lambda x: F.celu(x, 0.5), "celu"),  # PyTorch rounds 1 / alpha to float32
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), "leaky_relu"),
    "leaky_relu default": (F.leaky_relu, "leaky_relu"),
    "hardtanh": (F.hardtanh, "hardtanh"),
    "hardtanh bounds": (lambda x: F.hardtanh(x, -0.5, 1.5), "hardtanh"),
    "relu6": (F.relu6, "hardtanh"),
    "hardshrink": (F.hardshrink, "hardshrink"),
    "softshrink": (lambda x: F.softshrink(x, 0.1), "softshrink"),
    "tanhshrink": (F.tanhshrink, "tanh"),
    "softplus": (F.softplus, "softplus"),
    "softplus beta": (lambda x: F.softplus(x, 2.0, 4.0), "softplus"),
    "softsign": (F.softsign, "abs"),
    "threshold": (lambda x: F.threshold(x, 0.1, 20.0), "threshold"),
    "logsigmoid": (F.logsigmoid, "log_sigmoid_forward"),
    "nan_to_num": (torch.nan_to_num, "nan_to_num"),
    "clamp": (lambda x: x.clamp(-1.0, 1.5), "clamp"),
    "clamp below": (lambda x: x.clamp(min=-1.0), "clamp"),
    "clamp above": (lambda x: x.clamp(max=1.5), "clamp"),
    "clamp crossed": (lambda x: x.clamp(1.0, -1.0), "clamp"),
    "clamp_min": (lambda x: x.clamp_min(0.5), "clamp_min"),
    "clamp_max": (lambda x: x.clamp_max(0.5), "clamp_max"),
    "logsumexp of sums": (lambda x: x.exp().add(1).log(), "exp"),
    "frexp": (lambda x: torch.frexp(x)[0], None),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    function, operator = ACTIVATIONS[name]
    check(function, [WIDE], calls=[f"aten.{operator}.default"] if operator else ["aten.frexp.Tensor"])


IN_PLACE = {
    "relu": lambda x: F.relu(x, inplace=True),
    "elu": lambda x: F.elu(x, 1.3, inplace=True),
    "selu": lambda x: F.selu(x, inplace=True),
    "celu": lambda x: F.celu(x, 2.0, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
    "mish": lambda x: F.mish(x, inplace=True),
    "threshold": lambda x: F.threshold(x, 0.1, 20.0, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
    "exp": torch.exp_,
    "sqrt": lambda x: x.square().sqrt_(),
    "sin": torch.sin_,
    "abs": torch.abs_,
    "neg": torch.neg_,
    "clamp": lambda x: x.clamp_(-1, 1),
    "zero": torch.zero_,
    "fill": lambda x: x.fill_(3.0),
    "nan_to_num": torch.nan_to_num_,
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name):
    """What the call overwrites is not there any more, and not needed."""
    at = values(-1.5, -0.5, -0.2, 0.3, 1.5)
    check(lambda x: IN_PLACE[name](x * 1.1), [at])


@pytest.mark.parametrize("name", ["elu", "selu", "celu", "leaky_relu", "hardtanh", "relu", "sigmoid", "tanh", "exp"])
def test_two_writes_in_a_row(name):
    at = values(-1.5, -0.5, -0.2, 0.3, 1.5)
    check(lambda x: IN_PLACE[name](IN_PLACE["neg"](x * 1.1)), [at])


# ---- options, shapes, dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("name", ["relu", "exp", "sigmoid", "silu", "gelu", "tanh", "abs", "sqrt", "clamp", "elu"])
def test_shapes(name, shape):
    function = {"clamp": lambda x: x.clamp(-1, 1)}.get(name) or getattr(F, name, None) or getattr(torch, name)
    check(function, leaves_of(shape, positive=True))


def test_a_transposed_operand():
    check(lambda x: F.gelu(x.t()) * F.silu(x.t()).tanh(), leaves_of((3, 4)))
    check(lambda x: F.elu(x.expand(3, 4)), leaves_of((1, 4)))


@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_glu(dim):
    check(lambda x: F.glu(x, dim), leaves_of((4, 6)), calls=["aten.glu.default"])


@pytest.mark.parametrize("eps", [None, 1e-3, 0.2])
def test_logit(eps):
    check(lambda x: torch.logit(x, eps), [SHARE], calls=["aten.logit.default"])


def test_gamma_functions():
    check(lambda x: torch.polygamma(1, x), [POSITIVE], calls=["aten.polygamma.default"])
    check(lambda x: x.polygamma(0) + x.polygamma(2), [ABOVE_ONE])
    for p in (1, 2, 5):
        check(lambda x, p=p: torch.mvlgamma(x + 3, p), [POSITIVE], calls=["aten.mvlgamma.default"])


def test_casts():
    check(lambda x: x.float(), leaves_of((3,)), calls=["aten._to_copy.default"])
    check(lambda x: x.float().exp().double() * x, leaves_of((3,)), tolerance=1e-6)
    check(lambda x: x.to(torch.complex128) * 1j, leaves_of((3,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(lambda x: x.bfloat16() * 2, leaves_of((3,), dtype=torch.float32), tolerance=1e-2)
    check(lambda x: x.half().relu(), leaves_of((3,), dtype=torch.float32), tolerance=1e-3)
    check(lambda x: x.contiguous() + x.t().contiguous(), leaves_of((3, 3)))


def test_what_is_not_a_number_carries_nothing():
    at = values(math.nan, math.inf, -math.inf, 1.0)
    check(lambda x: torch.nan_to_num(x, 1.0, 2.0, 3.0), [at], calls=["aten.nan_to_num.default"])
    check(lambda x: torch.nan_to_num(x, posinf=2.0, neginf=3.0), [at])


def slopes(function, *numbers):
    """By a rule and by autograd, of each element."""
    x = values(*numbers)
    with record() as step:
        y = function(x).clamp(max=1e300)
    ((_, found),) = step.gradients(y)
    (expected,) = torch.autograd.grad(function(x).clamp(max=1e300).mean(), x)
    return found, expected


def test_infinite_slopes_are_those_of_autograd():
    for function in (torch.sqrt, torch.acos, lambda x: x.pow(0.5), lambda x: x.abs().sqrt(), lambda x: x.norm() ** 0.5):
        found, expected = slopes(function, 0.0, 1.0)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.allclose(found.nan_to_num(), expected.nan_to_num())


# ---- dropout ---------------------------------------------------------------------------------------------------------

DROPOUTS = {
    "dropout": (lambda x: F.dropout(x, 0.4), (20, 5)),
    "dropout in place": (lambda x: F.dropout(x * 1, 0.4, inplace=True), (20, 5)),
    "nothing dropped": (lambda x: F.dropout(x, 0.0), (20, 5)),
    "all dropped": (lambda x: F.dropout(x, 1.0), (20, 5)),
    "not training": (lambda x: F.dropout(x, 0.4, training=False) * 1, (20, 5)),
    "channels": (lambda x: F.dropout2d(x, 0.4), (3, 8, 2, 2)),
    "native": (lambda x: torch.native_dropout(x, 0.4, True)[0], (20, 5)),
    "native, all": (lambda x: torch.native_dropout(x, 1.0, True)[0], (20, 5)),
    "native, evaluating": (lambda x: torch.native_dropout(x, 0.4, False)[0], (20, 5)),
    "alpha": (lambda x: F.alpha_dropout(x, 0.4, training=True), (20, 5)),
    "feature alpha": (lambda x: F.feature_alpha_dropout(x, 0.4, training=True), (4, 5, 3)),
    "rrelu": (lambda x: F.rrelu(x, training=True), (20, 5)),
    "rrelu in place": (lambda x: F.rrelu(x * 1, training=True, inplace=True), (20, 5)),
    "rrelu, evaluating": (F.rrelu, (20, 5)),
    "gumbel": (lambda x: F.gumbel_softmax(x, 0.7), (6, 5)),
    "hard gumbel": (lambda x: F.gumbel_softmax(x, 0.7, hard=True), (6, 5)),
    "noise": (lambda x: x + torch.randn_like(x) * x, (6, 5)),
    "bernoulli": (lambda x: x * torch.bernoulli(x.sigmoid()), (6, 5)),
    "normal": (lambda x: x * torch.normal(x, 1.0), (6, 5)),
    "written over": (lambda x: (x * 2).uniform_() + x, (6, 5)),
    "written over normal": (lambda x: (x * 2).normal_() * x, (6, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPOUTS)
def test_random_calls_keep_what_they_drew(name):
    function, shape = DROPOUTS[name]
    check(function, leaves_of(shape))


def test_samples_that_carry_a_gradient_to_their_distribution():
    gamma = torch.distributions.Gamma
    check(lambda a, b: gamma(a, b).rsample((5,)), leaves_of((3,), (3,), positive=True))
    check(lambda a, b: torch.distributions.Normal(a, b).rsample((2,)), leaves_of((3,), (3,), positive=True))


# ---- complex numbers -------------------------------------------------------------------------------------------------

COMPLEX = (
    "abs acos acosh angle asin asinh atan atanh clone cos cosh exp exp2 expm1 log log10 log1p log2 neg reciprocal "
    "rsqrt sgn sigmoid sin sinc sinh sqrt tan tanh conj conj_physical resolve_conj square real imag"
)


@pytest.mark.parametrize("name", COMPLEX.split())
def test_complex(name):
    check(getattr(torch, name), leaves_of((7,), dtype=torch.complex128))


def test_complex_at_zero():
    z = values(0, 1 + 1j, dtype=torch.complex128)
    check(torch.abs, [z])
    check(torch.sgn, [z])
    check(torch.angle, [z])


def test_parts_of_complex_numbers():
    check(torch.complex, leaves_of((3,), (3,)), calls=["aten.complex.default"])
    check(torch.polar, leaves_of((3,), (3,)), calls=["aten.polar.default"])
    check(lambda a: torch.polar(torch.ones_like(a), a), leaves_of((3,)))
    check(lambda a: torch.view_as_complex(a) ** 2, leaves_of((3, 2)), calls=["aten.view_as_complex.default"])
    check(lambda a: torch.view_as_real(a * 2), leaves_of((3,), dtype=torch.complex128))
    check(lambda a: a.conj().imag.neg(), leaves_of((3,), dtype=torch.complex128))
    check(lambda a: (a.conj() * a).real, leaves_of((3,), dtype=torch.complex128))


def rotary(x, angles):
    turned = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def test_rotary_embedding():
    check(rotary, leaves_of((2, 5, 6), (5, 3)))


# ---- coverage --------------------------------------------------------------------------------------------------------

WITHOUT = {
    # PyTorch has no derivative of these either.
    "special_airy_ai", "special_bessel_j0", "special_bessel_j1", "special_bessel_y0", "special_bessel_y1",
    "special_chebyshev_polynomial_t", "special_chebyshev_polynomial_u", "special_chebyshev_polynomial_v",
    "special_chebyshev_polynomial_w", "special_hermite_polynomial_h", "special_hermite_polynomial_he",
    "special_laguerre_polynomial_l", "special_legendre_polynomial_p", "special_modified_bessel_i0",
    "special_modified_bessel_i1", "special_modified_bessel_k0", "special_modified_bessel_k1",
    "special_scaled_modified_bessel_k0", "special_scaled_modified_bessel_k1",
    "special_shifted_chebyshev_polynomial_t", "special_shifted_chebyshev_polynomial_u",
    "special_shifted_chebyshev_polynomial_v", "special_shifted_chebyshev_polynomial_w",
    "special_spherical_bessel_j0", "bitwise_left_shift", "bitwise_right_shift", "gcd", "lcm",
    "special_zeta.other_scalar",
    # The dispatcher takes them apart above the tape.
    "clip", "relu6", "selu", "square", "true_divide", "float_power", "max.other", "min.other",
}  # fmt: skip


def test_all_pointwise_operators_with_a_derivative_have_a_rule():
    missing = []
    # Not dir(aten), which lists what was used before.
    names = {schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas() if "aten::" in schema.name}
    for name in sorted(names):
        packet = getattr(aten, name, None)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            operator = getattr(packet, overload)
            in_place_or_out = name.endswith("_") or "out" in overload.lower() or "grad_input" in overload
            without = name in WITHOUT or f"{name}.{overload}" in WITHOUT
            if torch.Tag.pointwise not in operator.tags or in_place_or_out or without or operator in rules:
                continue
            # What is made of others above the tape never arrives there.
            if not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"):
                missing.append(str(operator))
    assert not missing

"""Steps and bounds for each input and element, and steps that are measured; what is inaccurate is said to be so."""

import math
import warnings

import numpy as np
import pytest
import torch

import hzo
from hzo.errors import InaccurateGradientWarning, InputError, StepError
from hzo.finite_differences import element_scale, element_steps, stencil
from support.boxes import TOLERANCE
from support.oracles import normal


def gradient(box, x):
    x = x.detach().clone().requires_grad_()
    box(x).sum().backward()
    return x.grad


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


def pressure_and_length(batch=8, width=1):
    torch.manual_seed(0)
    return 1e5 * (1 + 0.1 * normal(batch, width)), 1e-3 * (1 + 0.1 * normal(batch, width))


def physics(p, length):
    return (p * 1e-5) * torch.sin(length * 1e3)


class TestForEachInput:
    @pytest.mark.parametrize(
        "step", [None, [1.0, 1e-8], (None, 1e-8), torch.tensor([1.0, 1e-8]), {"p": 1.0, "length": 1e-8}, {"p": None}]
    )
    def test_in_units_of_their_own(self, step):
        p, length = (t.requires_grad_() for t in pressure_and_length())
        found = torch.autograd.grad(hzo.blackbox(physics, step=step)(p, length).sum(), (p, length))
        exact = torch.autograd.grad(physics(p, length).sum(), (p, length))
        assert all(torch.allclose(f, e, rtol=TOLERANCE) for f, e in zip(found, exact, strict=True))

    def test_that_do_not_fit(self):
        p, length = (t.requires_grad_() for t in pressure_and_length(width=2))
        for step, message in (
            ([1.0], "1 entries for 2 inputs"),
            ({"pressure": 1.0}, "names 'pressure', and the part was called with p, length"),
            (torch.tensor([1.0, 1e-8]), "one for each of 2 inputs or one for each of so many elements"),
            ([torch.ones(3), None], "does not expand to a sample of shape"),
        ):
            with pytest.raises(InputError, match=message):
                hzo.blackbox(physics, step=step)(p, length).sum().backward()
        with pytest.raises(InputError, match="'measured' or None"):
            hzo.blackbox(physics, step="long")


class TestForEachElement:
    @pytest.mark.parametrize("step", [None, [1.0, 1e-8], torch.tensor([1.0, 1e-8])])
    @pytest.mark.parametrize("batch", [1, 8])
    def test_columns(self, step, batch):
        def f(z):
            return physics(z[:, :1], z[:, 1:])

        x = torch.cat(pressure_and_length(batch), 1)
        a = x.clone().requires_grad_()
        (exact,) = torch.autograd.grad(f(a).sum(), a)
        assert error(gradient(hzo.blackbox(f, step=step), x)[:, 1], exact[:, 1]) <= TOLERANCE
        assert error(gradient(hzo.blackbox(f, step=1e-6, relative=True), x)[:, 1], exact[:, 1]) <= TOLERANCE

    def test_samples_of_different_size(self):
        x = torch.cat([normal(4, 4), torch.full((4, 4), 1e4, dtype=torch.float64)])
        assert error(gradient(hzo.blackbox(torch.tanh), x)[:4], 1 - torch.tanh(x[:4]) ** 2) <= TOLERANCE

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_positive_numbers_of_all_sizes(self, dtype):
        x = 10 ** torch.linspace(-3, 3, 40, dtype=dtype)[:, None]
        assert error(gradient(hzo.blackbox(torch.log), x), 1 / x) <= (TOLERANCE if dtype == torch.float64 else 1e-2)

    @pytest.mark.parametrize("scheme", ["forward", "central"])
    @pytest.mark.parametrize(("dtype", "mask"), [(torch.bfloat16, -1e9), (torch.float16, -1e4)])
    def test_many_masks_in_half_precision(self, dtype, mask, scheme):
        """Where most numbers are masks, these are not the size from which longer steps are taken."""
        torch.manual_seed(0)
        x = torch.randn(4, 6)
        x[:, 2:] = mask
        x = x.to(dtype)
        wanted, given = x.double().requires_grad_(), x.clone().requires_grad_()
        torch.softmax(wanted, -1).square().sum().backward()
        hzo.blackbox(lambda z: torch.softmax(z, -1), scheme=scheme)(given).square().sum().backward()
        assert float((given.grad - wanted.grad).norm() / wanted.grad.norm()) < 0.25

    @pytest.mark.parametrize("mask", [-1e9, float(torch.finfo(torch.float32).min)])
    def test_masks_set_nobodys_step(self, mask):
        x = normal(6, 5)
        x[0, 2] = x[3, 1] = mask
        x[4, :4] = mask
        a = x.clone().requires_grad_()
        (exact,) = torch.autograd.grad(a.softmax(1).square().sum(), a)
        assert error(gradient(hzo.blackbox(lambda z: z.softmax(1).square()), x), exact) <= TOLERANCE

    def test_small_for_no_reason(self):
        """Probabilities beside which a step must not be as small as they are: a linear part would not see it."""
        p = torch.softmax(torch.cat([torch.randn(16, 4), torch.full((16, 2), -20.0)], 1), 1)
        w = torch.linspace(1, 2, 6)[:, None]
        found = gradient(hzo.blackbox(lambda z: 1 + z @ w), p)
        assert torch.allclose(found, w.T.expand(16, 6), rtol=0.05)

    def test_scales(self):
        x = normal(64, 16)
        x[3, 5] = 1e-9  # small by chance
        scale = element_scale(x)
        assert float(scale.min()) > 0.05
        assert bool((scale >= x.abs()).all())
        assert torch.equal(element_scale(torch.zeros(3, 4)), torch.ones(3, 4))
        both = torch.stack([1e5 * x[:, 0], 1e-5 * x[:, 1]], 1)
        assert float(element_scale(both)[:, 1].max()) < 1e-3
        positive = x.abs() + 1e-3
        assert bool((element_steps(positive, "central", "x") < positive).all())


class TestBounds:
    @pytest.mark.parametrize("scheme", ["central", "forward"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("step", [None, 1e-3])
    def test_differences_stay_inside(self, scheme, dtype, step):
        def f(z):
            assert bool(((z >= 0) & (z <= 1)).all())
            return z**2 + z.exp()

        x = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1e-9, 0.25]], dtype=dtype)
        found = gradient(hzo.blackbox(f, bounds=(0, 1), scheme=scheme, step=step), x)
        second = scheme == "central" and step is None
        tolerance = (1e-7 if dtype == torch.float64 else 1e-3) if second else 5e-3
        assert error(found, 2 * x + x.exp()) <= tolerance

    def test_of_each_input(self):
        def f(a, b):
            assert bool((a >= 0).all())
            assert bool((b <= 0).all())
            return a.sqrt() + (-b).sqrt()

        a, b = normal(4, 3).abs().requires_grad_(), (-normal(4, 3).abs()).requires_grad_()
        hzo.blackbox(f, bounds=[(0, None), (None, 0)])(a, b).sum().backward()
        assert torch.allclose(a.grad, 0.5 / a.sqrt(), rtol=TOLERANCE)
        assert torch.allclose(b.grad, -0.5 / (-b).sqrt(), rtol=TOLERANCE)

    def test_a_converter_keeps_its_slope_at_the_edge(self):
        q, x = 1 / 16, torch.linspace(0, 1, 33, dtype=torch.float64)[None] * 0.97 + 0.013
        box = hzo.blackbox(lambda z: np.round(z / q) * q, numpy=True, elementwise=True, step=q / 2, bounds=(0, 1))
        assert torch.allclose(gradient(box, x), torch.ones_like(x))

    def test_outside(self):
        with pytest.raises(InputError, match=r"holds -?\d.*, outside its bounds, 0 to 1"):
            gradient(hzo.blackbox(torch.sqrt, bounds=(0, 1)), normal(3, 4))

    @pytest.mark.parametrize("options", [{}, {"step": 1e-3}, {"promises": "affine"}, {"step": "measured"}], ids=str)
    def test_are_those_of_the_inputs_dtype(self, options):
        """What was clamped to 0.1 in float32 lies above 0.1 in float64."""
        x = torch.tensor([[-1.0, 0.02, 1.0]]).clamp(0.0, 0.1)

        def f(z):
            assert bool(((z >= 0) & (z <= x.max())).all())
            return 3 * z

        assert error(gradient(hzo.blackbox(f, bounds=(0, 0.1), **options), x), torch.full_like(x, 3.0)) <= 1e-3

    def test_random_points_do_not_stay_inside(self):
        with pytest.raises(InputError, match=r"cannot stay inside bounds=; give step="):
            hzo.blackbox(torch.sqrt, bounds=(0, 1), mu=0.1)

    def test_a_tangent_stays_inside_too(self):
        def f(z):
            assert bool(((z >= 0) & (z <= 1)).all())
            return z**2

        x, v = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64), torch.tensor([[1.0, -2.0, 3.0]]).double()
        assert torch.allclose(torch.func.jvp(hzo.blackbox(f, bounds=(0, 1)), (x,), (v,))[1], 2 * x * v, atol=1e-8)

    def test_a_narrow_room(self):
        rows = torch.tensor([[0.5, 0.0, 1.0]], dtype=torch.float64)
        places = stencil(rows, 10.0, "central", "x", low=0.0, high=1.0)
        for t in (places.upper, places.lower):
            assert bool(((t >= 0) & (t <= 1)).all())
        f = lambda z: z**2  # noqa: E731
        slope = places.weight * (f(places.upper) - f(rows)) + places.other * (f(places.lower) - f(rows))
        assert torch.allclose(slope, 2 * rows)


class TestGranularity:
    @pytest.mark.parametrize(
        ("inside", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.03)]
    )
    def test_a_narrower_dtype_inside(self, inside, tolerance):
        x = normal(16, 4)
        box = hzo.blackbox(lambda z: z.to(inside).sin().double(), step="measured")
        assert error(gradient(box, x), x.cos()) <= tolerance

    @pytest.mark.parametrize(
        "rough", [lambda z: np.round(np.sin(z) / 1e-5) * 1e-5, lambda z: np.sin(z) + 1e-5 * np.sin(1e7 * z)]
    )
    def test_a_solvers_tolerance(self, rough):
        x = normal(16, 4)
        with pytest.warns(InaccurateGradientWarning, match="the gradient of the black box <lambda> is inaccurate"):
            gradient(hzo.blackbox(rough, numpy=True), x)
        assert error(gradient(hzo.blackbox(rough, numpy=True, step="measured"), x), x.cos()) <= 0.02

    @pytest.mark.parametrize("quantum", [2.0, 0.25, 0.05, 0.0173, 1e-3])
    def test_a_quantum(self, quantum):
        torch.manual_seed(0)
        x = normal(64, 8)
        box = hzo.blackbox(lambda z: np.round(z / quantum), numpy=True, elementwise=True, step="measured")
        assert error(gradient(box, x), torch.full_like(x, 1 / quantum)) <= 0.1

    def test_a_smooth_part_loses_little(self):
        x = normal(16, 4)
        assert error(gradient(hzo.blackbox(torch.sin, step="measured"), x), x.cos()) <= 1e-7

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-2])
    @pytest.mark.parametrize("waves", [0.3, 1.0, 3.0, 30.0])
    def test_balances_noise_and_curvature(self, waves, noise, dtype):
        """Of sin(w z) with noise of known size, which repeats: the step is the best one, give or take a factor of 3."""

        def part(z):
            wide = z.double()
            hashed = (43758.5453 * (12345.678 * wide + 9876.5432 * wide.square()).sin()) % 1
            return torch.sin(waves * z + 0.3) + (3**0.5 * noise * (2 * hashed - 1)).to(z.dtype)

        x = normal(32, 8).to(dtype)
        exact = waves * torch.cos(waves * x.double() + 0.3)
        box = hzo.blackbox(part, step="measured")
        found = gradient(box, x)
        (measured,) = box._known["steps"].values()
        # Noise of both readings, (s / h)² / 2, and w³ h² / 6 of the derivative, by the mean of cos².
        scale = float(element_scale(x).double().square().mean().sqrt())
        best = (3 * noise / (2**0.5 * waves**3 * 0.5**0.5)) ** (1 / 3) / scale
        if best < 1:  # else it would be the longest one that is tried
            assert best / 3 <= measured.length <= 3 * best
        tried = [
            error((part(x + h) - part(x - h)).double() / (2 * h).double(), exact)
            for h in (2.0 ** (1 - k / 2) * element_scale(x) for k in range(40))
        ]
        assert error(found, exact) <= 4 * min(tried)
        assert error(found, exact) <= 3 * measured.error

    def test_of_a_few_numbers_nobody_can_tell(self):
        """One number that agrees at a long step, and again on the slope of its noise."""

        def part(z):
            return torch.sin(z) + 1e-2 * torch.sin(1e9 * z)

        with pytest.warns(InaccurateGradientWarning):
            found = gradient(hzo.blackbox(part, step="measured"), torch.full((1, 1), 0.3, dtype=torch.float64))
        assert abs(float(found) - math.cos(0.3)) < 0.5

    def test_measured_once(self):
        box, x = hzo.blackbox(torch.sin, step="measured"), normal(4, 3)
        checks = []
        for again in (False, False, True):
            if again:
                box.recalibrate()
            with hzo.count_queries() as count:
                gradient(box, x)
            checks.append(count.check_evaluations)
        assert checks[0] >= checks[2] > 0 == checks[1]


class TestDoubt:
    def test_nothing_moves(self):
        """A silent zero: every step of a converter is shorter than its quantum."""
        with pytest.warns(InaccurateGradientWarning, match="black box round.*nothing of what it returned moved"):
            found = gradient(hzo.blackbox(torch.round), normal(16, 4))
        assert not found.any()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("f", [lambda z: (1e9 * z).sin(), lambda z: (1e9 * z).tanh(), torch.sign])
    @pytest.mark.parametrize("x", [torch.zeros(8, 3), torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])])
    def test_zeros_have_no_unit(self, f, x, dtype):
        """An odd function: second differences at zero are zero, too, and what is wrong shows in shorter steps."""
        with pytest.warns(
            InaccurateGradientWarning, match=r"\d elements that are zero, which says nothing of their unit"
        ):
            gradient(hzo.blackbox(lambda z: f(z[:, 1:])), x.to(dtype))
        with pytest.raises(StepError, match=r"Say how far to step: step= .*max_error=0\.05 does not allow it"):
            gradient(hzo.blackbox(lambda z: f(z[:, 1:]), max_error=0.05), x.to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_zeros_of_smooth_parts_are_not_doubted(self, dtype):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for f in (torch.sin, torch.exp, lambda z: 1e3 + z, lambda z: (z + 1).square(), lambda z: z**3 + z):
                box, x = hzo.blackbox(f), torch.zeros(4, 3, dtype=dtype)
                with hzo.count_queries() as first:
                    gradient(hzo.blackbox(f), torch.ones_like(x))
                counts = []
                for _ in range(2):
                    with hzo.count_queries() as count:
                        gradient(box, x)
                    counts.append(count.check_evaluations)
                assert counts == [first.check_evaluations + 4 * len(x), 0]

    def test_a_step_is_the_users(self):
        x = torch.zeros(4, 3, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = gradient(hzo.blackbox(lambda z: (1e9 * z).sin(), step=1e-14), x)
        assert error(found, torch.full_like(x, 1e9)) <= 1e-5

    def test_is_said_once(self):
        box, x = hzo.blackbox(lambda z: z.half().sin().double()), normal(16, 4)
        with pytest.warns(InaccurateGradientWarning):
            gradient(box, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradient(box, x)

    @pytest.mark.parametrize(
        ("f", "options"),
        [
            (lambda z: z.half().sin().double(), {}),
            (lambda z: (20 * z).sin(), {"step": 0.2}),
            (lambda z: (z > 0).double(), {"step": "measured"}),
        ],
    )
    def test_may_be_an_error(self, f, options):
        with pytest.raises(StepError, match=r"black box <lambda> is inaccurate: .*max_error=0.02 does not allow it"):
            gradient(hzo.blackbox(f, max_error=0.02, **options), normal(16, 4))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_smooth_parts_are_not_doubted(self, dtype):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for f in (torch.sin, torch.relu, lambda z: z @ torch.ones(4, 2, dtype=dtype), torch.exp):
                gradient(hzo.blackbox(f, max_error=0.1), normal(64, 4).to(dtype))


def test_a_step_in_which_the_input_is_lost():
    x = torch.randn(3, 4, requires_grad=True)
    for options in ({"step": 1e30}, {"step": 1e30, "bounds": (-1e35, 1e35)}):
        with pytest.raises(StepError, match="leaves nothing of values"):
            hzo.blackbox(torch.sin, **options)(x).sum().backward()

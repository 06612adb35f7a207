"""Promises that do not hold, and noise that nobody declared: found at the first use, or said by name."""

import os
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hzo
from hzo.errors import InaccurateGradientWarning, NondeterministicError, StepError, StructureError
from support.boxes import TOLERANCE

_numbers = torch.Generator().manual_seed(0)  # cases are made when the file is read


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=_numbers)


A, W, M = normal(5, 8), normal(4, 4), normal(8, 8)
SYMMETRIC = M + M.T


def shifted(z, by):
    return F.pad(z, (by, 0))[:, : z.shape[1]]


def bent(z):
    return (1 + z.square()).sqrt()


# promises: a part that keeps them, one that does not, evaluations of a batch that the test costs, the input.
CASES = {
    "elementwise": (torch.tanh, lambda z: z + 1e-2 * z.roll(1, 1), 2, normal(6, 8)),
    "elementwise of complex numbers": (torch.exp, lambda z: z * z.roll(1, 1), 2, torch.complex(*normal(2, 6, 8))),
    "local": (lambda z: torch.tanh(z + shifted(z, 1)), lambda z: torch.tanh(z + z.roll(3, 1)), 2, normal(6, 8)),
    "tokens": (lambda z: torch.tanh(z @ W), lambda z: torch.softmax(z, 1), 2, normal(6, 3, 4)),
    "affine": (lambda z: z @ A.T + 1, lambda z: (z @ A.T).relu(), 1, normal(6, 8)),
    "affine, one sample": (lambda z: z @ A.T + 1, lambda z: z.square() @ A.T, 2, normal(1, 8)),
    "affine, another one for each sample": (lambda z: z @ A.T, lambda z: z * z.mean(1, keepdim=True), 1, normal(6, 8)),
    "symmetric": (lambda z: z @ SYMMETRIC, lambda z: z @ (SYMMETRIC + 0.1 * shifted(SYMMETRIC, 1)), 5, normal(6, 8)),
    "reindexing": (lambda z: z.flip(1)[:, :5], lambda z: 1.5 * z.flip(1), 0, normal(6, 8)),
    "reindexing, padded": (lambda z: F.pad(z, (1, 1)), lambda z: F.pad(z, (1, 1), value=1.0), 0, normal(6, 8)),
}


def promises(name):
    kind = name.split(",")[0].split(" ")[0]
    return hzo.Local(1, -1, 1) if kind == "local" else kind


def gradient(f, x, **options):
    x = x.detach().clone().requires_grad_()
    out = f(x) if not options else hzo.blackbox(f, **options)(x)
    weights = torch.linspace(1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
    (weights * torch.view_as_real(out).sum(-1) if out.is_complex() else weights * out).sum().backward()
    return x.grad


@pytest.mark.parametrize("name", CASES)
class TestPromises:
    def test_kept(self, name):
        kept, _, evaluations, x = CASES[name]
        found = {}
        for check in (True, False):
            with hzo.count_queries() as count:
                got = gradient(kept, x, promises=promises(name), check_promises=check)
            assert torch.allclose(got, gradient(kept, x), rtol=TOLERANCE, atol=TOLERANCE)
            found[check] = count
        assert found[True].check_evaluations == found[False].check_evaluations + evaluations * len(x)
        assert found[True].queries == found[False].queries

    def test_broken(self, name):
        _, broken, _, x = CASES[name]
        kind = promises(name) if isinstance(promises(name), str) and promises(name) != "tokens" else "local"
        with pytest.raises(StructureError, match=rf"promised to be {kind}.* and is not in input z .*check_promises="):
            gradient(broken, x, promises=promises(name))
        if kind == "reindexing":  # costs nothing to see, and there is nothing to trust
            return
        got = gradient(broken, x, promises=promises(name), check_promises=False)
        assert not torch.allclose(got, gradient(broken, x), rtol=1e-3)


def test_a_promise_is_tried_once():
    box, x = hzo.blackbox(torch.tanh, elementwise=True), normal(6, 8).requires_grad_()
    counts = []
    for _ in range(2):
        with hzo.count_queries() as count:
            box(x).sum().backward()
        counts.append(count.check_evaluations)
    assert counts[0] > counts[1] == 0


WEAK = {  # what a part adds to a local one, a hundredth of it
    "mean": lambda z: z.mean(1, keepdim=True),
    "sum": lambda z: z.sum(1, keepdim=True),
    "from the other side": lambda z: z.roll(32, 1),
    "what ran before": lambda z: z.cumsum(1),
    "from the first half": lambda z: torch.cat([torch.zeros_like(z[:, :32]), z[:, :32]], 1),
}


class TestWeakAndFar:
    """A promise of locality, and a weak dependence on what is far away."""

    @pytest.mark.parametrize("name", WEAK)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("batch", [1, 8])
    def test_is_found(self, name, dtype, batch):
        x = normal(batch, 64).to(dtype).requires_grad_()
        box = hzo.blackbox(lambda z: torch.sin(z) + 1e-2 * WEAK[name](z), promises=hzo.Local(1, -1, 1))
        with pytest.raises(StructureError, match=r"promised to be local .* changed by"):
            box(x).sum().backward()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_one_pair_of_elements_in_a_batch(self, dtype):
        x = normal(32, 64).to(dtype).requires_grad_()
        box = hzo.blackbox(lambda z: torch.sin(z) + 1e-2 * F.pad(z[:, :1], (63, 0)), promises=hzo.Local(1, -1, 1))
        with pytest.raises(StructureError, match="promised to be local"):
            box(x).sum().backward()

    def test_a_part_that_runs_nowhere_else_is_not_asked_to(self):
        """Values of other samples may be none that the part takes beside its own."""

        def part(z):
            if float((z[:, 1:] - z[:, :-1]).abs().max()) > 0.5:
                raise ValueError("not continuous")
            return torch.sin(z)

        x = (torch.linspace(0, 1, 64, dtype=torch.float64) + torch.arange(4.0)[:, None]).requires_grad_()
        hzo.blackbox(part, promises=hzo.Local(1, -1, 1))(x).sum().backward()
        assert torch.allclose(x.grad, x.cos(), rtol=TOLERANCE)


class Part(torch.nn.Module):
    """A function, with noise of a thousandth or none."""

    def __init__(self, f, noise=0.0):
        super().__init__()
        self.f, self.noise = f, noise

    def forward(self, z):
        out = self.f(z)
        return out + self.noise * torch.randn_like(out) if self.noise else out


KINDS = [name for name in CASES if "complex" not in name and "padded" not in name]


class TestPlannedAsAWhole:
    """Promises of the parts of a list, and of a noisy part."""

    def step(self, box, x):
        z = x.clone().requires_grad_()
        with hzo.count_queries() as count:
            box(z).square().sum().backward()
        return z.grad, count.check_evaluations

    @pytest.mark.parametrize("name", KINDS)
    def test_of_a_part_of_a_list(self, name):
        kept, broken, _, x = CASES[name]
        box = hzo.blackbox([hzo.declare(Part(kept), promises(name)), torch.sin])
        found = self.step(box, x)[0]
        assert torch.allclose(found, self.step(lambda z: kept(z).sin(), x)[0], rtol=1e-4, atol=1e-5)
        assert self.step(box, x)[1] <= 5 * len(x)  # what rules measure; promises were tried before
        with pytest.raises(StructureError, match=r"black box Part was promised to be .* and is not: .*check_promises="):
            self.step(hzo.blackbox([hzo.declare(Part(broken), promises(name)), torch.sin]), x)
        trusting = hzo.blackbox([hzo.declare(Part(broken), promises(name)), torch.sin], check_promises=False)
        if name == "reindexing":  # there are no such places
            with pytest.raises(
                StructureError, match="promised to be reindexing, and is not: given the numbers of places"
            ):
                self.step(trusting, x)
        else:
            self.step(trusting, x)

    @pytest.mark.parametrize("name", ["elementwise", "affine"])
    def test_of_a_noisy_part(self, name):
        kept, broken, _, x = CASES[name]
        options = {"noise": hzo.Noise(process=1e-3), "target_cosine": 0.9, "promises": promises(name), "step": 0.3}
        for seed in range(20):
            torch.manual_seed(seed)
            self.step(hzo.blackbox(Part(kept, 1e-3), **options), x)
        with pytest.raises(StructureError, match=r"black box Part was promised to be .* and is not"):
            self.step(hzo.blackbox(Part(broken, 1e-3), **options), x)

    @pytest.mark.parametrize("name", ["local", "tokens"])
    def test_no_plan_relies_on_locality_of_a_noisy_part(self, name):
        _, broken, _, x = CASES[name]
        box = hzo.blackbox(Part(broken, 1e-3), noise=hzo.Noise(process=1e-3), promises=promises(name), step=0.1)
        found, exact = self.step(box, x)[0], self.step(broken, x)[0]
        assert F.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.95

    def test_what_was_inferred_is_tried_every_time(self):
        def part(z):
            return torch.tanh(z) + (0.01 * z.roll(1, 1) if float(z[:, 0].min()) > 50 else 0)

        box, x = hzo.blackbox([part, torch.sin], promises="inferred"), TestInferredAtTheFirstInput.X.clone()
        self.step(box, x)
        assert self.step(box, x)[1] >= len(x)
        x[:, 0] = 60.0
        with pytest.raises(StructureError, match="seemed to be elementwise at the first input"):
            self.step(box, x)


BOUNDED = {
    "elementwise": (torch.sin, ("elementwise",)),
    "affine": (lambda z: z @ M + 1, ("affine",)),
    "local": (lambda z: torch.sin(z + shifted(z, 1)), (hzo.Local(1, -1, 0),)),
    "saturates beyond the numbers given": (lambda z: (z @ M).clamp(max=0.5), ()),
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("bounds", [(0, 1), (0, None), (None, 1), (torch.zeros(8), 1.0), {"z": (0, 1)}])
def test_what_is_inferred_stays_inside_bounds(name, bounds):
    f, expected = BOUNDED[name]
    low, high = bounds["z"] if isinstance(bounds, dict) else bounds

    def part(z):
        assert low is None or bool((z >= 0).all())
        assert high is None or bool((z <= 1).all())
        return f(z)

    box, x = hzo.blackbox(part, promises="inferred", bounds=bounds), (0.1 + 0.8 * torch.rand(6, 8)).double()
    z = x.clone().requires_grad_()
    box(z).square().sum().backward()
    assert torch.allclose(z.grad, _exact(f, x), rtol=1e-5, atol=1e-6)
    if name != "saturates beyond the numbers given" or high is not None:
        assert tuple(hzo.tracing.declared(box._guard) or ()) == expected


def _exact(f, x):
    z = x.clone().requires_grad_()
    f(z).square().sum().backward()
    return z.grad


class TestInferredAtTheFirstInput:
    """Parts that are one thing at the first input, and another one beyond a branch."""

    X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    CHANGES: ClassVar = {  # what is inferred at the first input, the part there, and beyond the branch
        "elementwise": (torch.tanh, lambda z: torch.tanh(z) + 1e-2 * z.roll(1, 1)),
        "local": (lambda z: torch.tanh(z + shifted(z, 1)), lambda z: torch.tanh(z + z.roll(3, 1))),
        "affine": (lambda z: z @ M.T + 1, lambda z: (z @ M.T).sin()),
        "symmetric": (lambda z: bent(z @ SYMMETRIC) @ SYMMETRIC, lambda z: bent(z @ SYMMETRIC) @ M),
    }

    def box(self, name, **options):
        first, later = self.CHANGES[name]
        return hzo.blackbox(
            lambda z: first(z) if float(z[:, 0].min()) < 50 else later(z), promises="inferred", **options
        )

    def step(self, box, x):
        z = x.clone().requires_grad_()
        with hzo.count_queries() as count:
            out = box(z)
            (out * torch.linspace(1, 2, 8, dtype=torch.float64)).sum().backward()
        return z.grad, count

    @pytest.mark.parametrize("name", CHANGES)
    def test_a_change_is_found(self, name):
        changed = self.X.clone()
        changed[:, 0] = 60.0
        box = self.box(name)
        for _ in range(3):
            self.step(box, self.X)
        with pytest.raises(StructureError, match=r"at the first input, from which its promises were inferred, and is"):
            self.step(box, changed)
        trusted, found = self.box(name, check_promises=False), None
        self.step(trusted, self.X)
        found, _ = self.step(trusted, changed)
        right, _ = self.step(self.CHANGES[name][1], changed)
        assert F.cosine_similarity(found, right).min() < 1 - 1e-6

    def test_the_plan_counts_it(self):
        calls = []

        def part(z):
            calls.append(len(z))
            return torch.tanh(z)

        box = hzo.blackbox(part, promises="inferred")
        self.step(box, self.X)
        plan = box.plan_for(self.X)
        z = self.X.clone().requires_grad_()
        out = box(z)
        calls.clear()
        with hzo.count_queries() as count:
            out.sum().backward()
        assert plan.calls == len(calls)
        assert plan.queries == count.queries
        assert count.check_evaluations == 6  # one test of the promise


def test_bounds_hold_in_the_test_of_a_promise():
    def part(z):
        assert bool((z >= 0).all())
        assert bool((z <= 1).all())
        return 2 * z

    for promise in ("elementwise", "affine"):
        for x in (torch.rand(4, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)):
            found = gradient(part, x, promises=promise, bounds=(0, 1))
            assert torch.allclose(found, gradient(lambda z: 2 * z, x), rtol=TOLERANCE)


def test_a_sample_that_fails_breaks_no_promise():
    x = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradient(lambda z: z.sqrt() + 0 * z.sqrt().sum(1, keepdim=True), x, elementwise=True, on_failure="zero")
    assert torch.equal(found[1], torch.zeros(2, dtype=torch.float64))


class Noisy:
    """Random numbers that are not seen from outside, beside an output that is a million times larger."""

    def __init__(self, size):
        self.size = size

    def __call__(self, z):
        drawn = np.frombuffer(os.urandom(8 * len(z)), dtype=np.uint64) / 2.0**64
        return np.stack([1e6 * z[:, 0], z[:, 1] + self.size * drawn], 1)


class TestNoiseThatNobodyDeclared:
    def column(self, size, **options):
        x = normal(6, 2).requires_grad_()
        hzo.blackbox(Noisy(size), numpy=True, **options)(x)[:, 1].sum().backward()
        return x.grad[:, 1]

    def test_small_noise_in_a_small_output_is_said(self):
        """The test that a part repeats knows the size of the whole output alone; the loss reads one column."""
        with pytest.warns(InaccurateGradientWarning, match=r"differed, by \d+% of what .* noise='measured'"):
            self.column(1e-3)

    def test_a_limit_makes_it_an_error(self):
        with pytest.raises(StepError, match=r"noise='measured'.*max_error=0\.01 does not allow it"):
            self.column(1e-3, max_error=0.01)

    def test_noise_that_does_no_harm_is_not(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.allclose(self.column(1e-10), torch.ones(6, dtype=torch.float64), rtol=1e-3)

    def test_large_noise_is_an_error(self):
        with pytest.raises(NondeterministicError, match="noise='measured'"):
            self.column(1e3)

    def test_a_step_makes_it_harmless(self):
        """Noise of a thousandth beside differences of two."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.allclose(self.column(1e-3, step=1.0), torch.ones(6, dtype=torch.float64), rtol=1e-2)


class Reading(torch.nn.Module):
    """A measurement: a function, and noise of a tenth that is new in every call."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, z):
        out = self.f(z)
        return out + 0.1 * torch.randn_like(out)


class TestStepsAgainstNoise:
    """Steps against noise are as long as activations are large, which may be longer than a part is straight."""

    def cosine(self, f, **options):
        torch.manual_seed(0)
        x = 1.5 * normal(32, 6)
        weights = torch.arange(6.0, dtype=torch.float64)
        found = []
        for part in (hzo.blackbox(Reading(f), **options), f):
            z = x.clone().requires_grad_()
            (part(z) * weights).sum().backward()
            found.append(z.grad.flatten())
        return float(F.cosine_similarity(*found, 0))

    @pytest.mark.parametrize("noise", [hzo.Noise(readout=0.1), "measured"])
    def test_waves_are_said(self, noise):
        advice = (
            "have noise and smoothness measured" if noise != "measured" else "Say how far the part is smooth: step="
        )
        with pytest.warns(InaccurateGradientWarning, match=rf"the derivative changes by about \d+%.*{advice}"):
            assert self.cosine(lambda z: torch.cos(3 * z), noise=noise) < 0.5

    # Of sin(z) itself one noise in five is warned of, at cosines of 0.97: it lies at the threshold.
    @pytest.mark.parametrize("f", [lambda z: torch.sin(z / 2), lambda z: 2 * z])
    def test_what_is_straight_enough_is_not(self, f):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self.cosine(f, noise=hzo.Noise(readout=0.1)) > 0.9

    def test_a_step_is_the_users(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self.cosine(lambda z: torch.cos(3 * z), noise=hzo.Noise(readout=0.1), step=0.5) > 0.9

    def test_it_is_tried_once(self):
        box, z = (
            hzo.blackbox(Reading(lambda u: torch.sin(u / 2)), noise=hzo.Noise(readout=0.1)),
            normal(32, 6).requires_grad_(),
        )
        checks = []
        for _ in range(2):
            out = box(z)
            with hzo.count_queries() as count:
                out.sum().backward()
            checks.append(count.check_evaluations)
        assert checks == [6 * 32, 0]

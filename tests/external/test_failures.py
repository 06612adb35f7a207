"""Samples that diverge, calls that take too long, workers that are lost."""

import copy
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad, jacfwd, jacrev, vmap

import hzo
from hzo.errors import FailedSamplesWarning, InputError, NonFiniteError, QueryError, QueryTimeoutError
from support.boxes import TOLERANCE
from support.oracles import normal

X = torch.tensor([[0.5], [1.0], [3.0], [1.5]], dtype=torch.float64)
GOOD = [0, 1, 3]


def diverging(z):
    return np.where(z > 2.0, np.nan, z**2)


def raising(z):
    if (z > 2.0).any():
        raise FloatingPointError("diverged")
    return z**2


def gradient(box, x=X, loss=lambda out: out.sum()):
    x = x.detach().clone().requires_grad_()
    loss(box(x)).backward()
    return x.grad


class TestFailedSamples:
    def test_pass(self):
        """By default they are as the part returns them; a loss without them has its gradient."""
        found = gradient(hzo.blackbox(diverging, numpy=True), loss=lambda y: torch.where(y.isfinite(), y, 0.0).sum())
        assert torch.allclose(found[GOOD], 2 * X[GOOD], rtol=TOLERANCE)
        assert not found[2].any()
        with pytest.raises(NonFiniteError, match="NaN or infinity for sample 2 in the forward pass"):
            gradient(hzo.blackbox(diverging, numpy=True))

    def test_raise(self):
        with pytest.raises(NonFiniteError, match="diverging, in a forward pass, sample 2: it returned NaN"):
            hzo.blackbox(diverging, numpy=True, on_failure="raise")(X.clone().requires_grad_())

    @pytest.mark.parametrize("f", [diverging, raising])
    @pytest.mark.parametrize("batched", [True, False, 1, 3])
    def test_zero(self, f, batched):
        box, x = hzo.blackbox(f, numpy=True, on_failure="zero", batched=batched), X.clone().requires_grad_()
        with pytest.warns(FailedSamplesWarning, match=f"black box {f.__name__}, in a forward pass: sample 2 of 4"):
            y = box(x)
        assert box.failed.tolist() == [False, False, True, False]
        assert not y[2].any()
        y.sum().backward()
        assert torch.allclose(x.grad[GOOD], 2 * X[GOOD], rtol=TOLERANCE)
        assert not x.grad[2].any()

    @pytest.mark.parametrize("x", [X, X[GOOD]], ids=["one failed", "none failed"])
    @pytest.mark.parametrize("through", [grad, jacrev, jacfwd], ids=lambda f: f.__name__)
    @pytest.mark.filterwarnings("ignore::hzo.errors.FailedSamplesWarning")
    def test_named_after_a_transform(self, through, x):
        """What a transform has left is an ordinary tensor, which can be read where the transform is over."""
        box = hzo.blackbox(diverging, numpy=True, on_failure="zero")
        through(lambda t: box(t).sum())(x)
        assert not torch._C._functorch.is_functorch_wrapped_tensor(box.failed)
        assert box.failed.tolist() == [value > 2 for value in x[:, 0].tolist()]

    @pytest.mark.parametrize("outside", [vmap, lambda f: vmap(grad(lambda t: f(t).sum()))], ids=["vmap", "vmap grad"])
    @pytest.mark.filterwarnings("ignore::hzo.errors.FailedSamplesWarning")
    def test_not_named_under_vmap(self, outside):
        """A call has other samples there: nothing is said, what was said before is not left."""
        box = hzo.blackbox(diverging, numpy=True, on_failure="zero")
        box(X)
        outside(box)(torch.stack([X, X]))
        assert box.failed is None

    @pytest.mark.parametrize("on_failure", ["pass", "zero"])
    def test_in_a_query_alone(self, on_failure):
        x = torch.tensor([[0.5], [2.0 - 1e-6], [1.0]], dtype=torch.float64)
        box = hzo.blackbox(diverging, numpy=True, on_failure=on_failure)
        if on_failure == "pass":
            with pytest.raises(NonFiniteError, match=r"1 to 1 of 1 .* up, returned NaN or infinity for sample 1"):
                gradient(box, x)
            return
        with pytest.warns(FailedSamplesWarning, match="sample 1 of 3 came out as NaN or infinity in a query"):
            found = gradient(box, x)
        assert torch.allclose(found[[0, 2]], 2 * x[[0, 2]], rtol=TOLERANCE)
        assert not found[1].any()

    @pytest.mark.parametrize("options", [{}, {"scheme": "forward", "step": 1e-7}, {"bounds": (-9, 9)}])
    def test_are_not_masks_nor_what_nobody_reads(self, options):
        def f(z):
            return torch.where(z > 0, z.sin(), -torch.inf), (-z.abs()).log()

        def loss(out):
            return out[0].exp().sum()

        x = normal(5, 4)
        exact = torch.where(x > 0, x.sin().exp() * x.cos(), 0.0)
        assert torch.allclose(gradient(hzo.blackbox(f, **options), x, loss), exact, rtol=1e-4)

    @pytest.mark.parametrize("at", [3.0, 2.0 - 1e-7])  # diverges in the forward pass; in a query alone
    def test_leave_the_gradient_of_parameters(self, at):
        class Part(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

            def forward(self, z):
                return torch.where(self.w * z > 2.0, torch.nan, (self.w * z) ** 2)

        part, x = Part(), torch.tensor([[0.5], [at], [1.0]], dtype=torch.float64)
        with pytest.warns(FailedSamplesWarning, match="sample 1 of 3") as warned:
            found = gradient(hzo.blackbox(part, on_failure="zero"), x)
        assert torch.allclose(part.w.grad, 2 * x[[0, 2]].square().sum(), rtol=TOLERANCE)
        assert torch.allclose(found, 2 * torch.tensor([[0.5], [0.0], [1.0]], dtype=torch.float64), rtol=TOLERANCE)
        assert {w.category for w in warned} == {FailedSamplesWarning}  # what failed says nothing of accuracy

    @pytest.mark.parametrize("at", [3.0, 2.0 - 1e-7])
    def test_have_no_tangent(self, at):
        def f(z):
            return torch.stack([2 * z, torch.where(z > 2, torch.nan, z**2)], 1)

        x = torch.tensor([0.5, at, 1.0], dtype=torch.float64)
        with pytest.warns(FailedSamplesWarning, match="sample 1 of 3"):
            _, tangent = torch.func.jvp(hzo.blackbox(f, on_failure="zero"), (x,), (torch.ones_like(x),))
        exact = torch.tensor([[2.0, 1.0], [0.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
        assert torch.allclose(tangent, exact, rtol=TOLERANCE)


class TestTime:
    def test_a_limit_is_for_a_call(self):
        """Queries are put into one call as far as the time of the forward pass lets expect that they end in time."""

        def solver(x):
            time.sleep(0.003 * len(x))
            return x.cumsum(1)

        found = gradient(hzo.blackbox(solver, numpy=True, timeout=0.3), normal(8, 16))
        assert torch.allclose(found, torch.arange(16.0, 0, -1).double().expand(8, 16), rtol=TOLERANCE)

    def test_the_error_says_which_options_to_change(self):
        with pytest.raises(QueryTimeoutError, match=r"4 samples in the call.*timeout=.*batched="):
            hzo.blackbox(lambda z: time.sleep(5), timeout=0.1)(X.clone().requires_grad_())


def work(z):
    return np.sin(z) * z.sum(1, keepdims=True)


def dies_once(path, z):
    if not os.path.exists(path):
        with open(path, "w") as file:
            file.write("killed")
        os.kill(os.getpid(), 9)
    return work(z)


def dies(z):
    os.kill(os.getpid(), 9)


def wrong(z):
    raise ValueError("mine")


def two_threads():
    return ThreadPoolExecutor(2)


def two_processes():
    return ProcessPoolExecutor(2)


class TestExecutors:
    def serial(self, x, **options):
        return gradient(hzo.blackbox(work, numpy=True, **options), x)

    @pytest.mark.parametrize("batched", [True, 2, False])
    @pytest.mark.parametrize("make", [two_threads, two_processes])
    def test_the_same_bits(self, make, batched):
        x = normal(5, 4)
        with make() as executor:
            found = gradient(hzo.blackbox(work, numpy=True, executor=executor, batched=batched), x)
        assert torch.equal(found, self.serial(x, batched=batched))

    def test_a_worker_that_is_killed_loses_nothing(self, tmp_path):
        x = normal(5, 4)
        box = hzo.blackbox(partial(dies_once, str(tmp_path / "dead")), numpy=True, executor=two_processes)
        found = gradient(box, x)
        box.close()
        assert torch.equal(found, self.serial(x))
        assert (tmp_path / "dead").exists()

    def test_not_for_ever(self):
        box = hzo.blackbox(dies, numpy=True, executor=two_processes, retries=1)
        with pytest.raises(QueryError, match="its worker was lost 2 times"):
            gradient(box)
        box.close()

    def test_a_broken_one_that_cannot_be_made_anew(self):
        with two_processes() as executor, pytest.raises(QueryError, match=r"executor=lambda: ProcessPoolExecutor"):
            gradient(hzo.blackbox(dies, numpy=True, executor=executor))

    def test_an_error_of_the_part_is_its_own(self):
        asked = []

        def part(z):
            asked.append(1)
            return wrong(z)

        with two_threads() as executor, pytest.raises(QueryError, match="ValueError: mine"):
            gradient(hzo.blackbox(part, numpy=True, executor=executor))
        assert len(asked) == 1

    def test_several_at_a_time(self):
        def slow(z):
            time.sleep(0.05)
            return np.sin(z)

        began = time.perf_counter()
        with ThreadPoolExecutor(16) as executor:
            gradient(hzo.blackbox(slow, numpy=True, executor=executor), normal(4, 32))
        assert time.perf_counter() - began < 0.5 * 64 * 0.05

    def test_a_limit_in_time(self):
        def slow(z):
            time.sleep(1.0)
            return z

        with two_threads() as executor, pytest.raises(QueryTimeoutError, match=r"no answer within 0\.1 seconds"):
            gradient(hzo.blackbox(slow, numpy=True, executor=executor, timeout=0.1))

    def test_states_are_refused(self):
        class Neuron:
            def __init__(self):
                self.v = np.zeros((4, 1))

            def __call__(self, z):
                self.v = 0.5 * self.v + z
                return self.v

        neuron = Neuron()
        with two_threads() as executor, pytest.raises(InputError, match=r"keeps a state \(v\)"):
            gradient(hzo.blackbox(neuron, numpy=True, executor=executor))
        assert not neuron.v.any()

    def test_copies_have_executors_of_their_own(self):
        x = normal(5, 4)
        box = hzo.blackbox(work, numpy=True, executor=two_threads)
        other = copy.deepcopy(box)
        assert torch.equal(gradient(other, x), gradient(box, x))
        box.close()
        other.close()


@pytest.mark.parametrize("raised", [SystemExit(0), StopIteration("no more")], ids=["sys.exit", "StopIteration"])
@pytest.mark.parametrize(
    "options", [{}, {"timeout": 5.0}, {"executor": ThreadPoolExecutor(1)}], ids=["here", "thread", "pool"]
)
def test_what_would_end_the_program_or_its_loop_is_an_error_of_the_part(raised, options):
    calls = []

    def part(x):
        calls.append(None)
        if len(calls) > 1:
            raise raised
        return x.sin()

    out = hzo.blackbox(part, state=None, **options)
    with pytest.raises(QueryError, match=type(raised).__name__):
        out(normal(5, 4).requires_grad_()).sum().backward()

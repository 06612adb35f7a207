"""Parts of any signature: nested arguments and results, tensors without samples, whole and complex numbers."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hzo
from hzo.errors import CoupledSamplesError, InputError, NonFiniteError, QueryError
from support.boxes import TOLERANCE
from support.oracles import normal

COMPLEX = torch.complex128


def gradients(f, tensors, loss=lambda out: out.sum(), **keywords):
    """Of every floating tensor among the arguments."""
    leaves = [
        t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex()) if isinstance(t, Tensor) else t
        for t in tensors
    ]
    loss(f(*leaves, **keywords)).backward()
    return [t.grad for t in leaves if isinstance(t, Tensor) and t.requires_grad]


def agree(f, box, tensors, loss=lambda out: out.sum(), **keywords):
    exact, found = gradients(f, tensors, loss, **keywords), gradients(box, tensors, loss, **keywords)
    for e, g in zip(exact, found, strict=True):
        assert float((g - e).norm()) <= TOLERANCE * float(e.norm())


class TestArguments:
    def test_by_keyword(self):
        def f(x, *, gain, mode="sin"):
            return getattr(torch, mode)(x) * gain

        x, gain = normal(5, 4).requires_grad_(), normal(5, 1).requires_grad_()
        hzo.blackbox(f)(x, gain=gain, mode="cos").sum().backward()
        assert torch.allclose(x.grad, -x.sin() * gain, rtol=TOLERANCE)
        assert torch.allclose(gain.grad, x.cos().sum(1, keepdim=True), rtol=TOLERANCE)

    def test_arrays_and_text_are_passed_on(self):
        agree(
            lambda x, w, how: x * torch.as_tensor(w) if how == "times" else x,
            hzo.blackbox(lambda x, w, how: x * torch.as_tensor(w) if how == "times" else x),
            (normal(5, 4), np.arange(4.0), "times"),
        )

    def test_nested(self):
        def f(parts, pair):
            return {"a": parts["p"].sin() * pair[0], "b": (pair[1][0] ** 2, "a word", None)}

        p, q, r = (normal(5, 4).requires_grad_() for _ in range(3))
        for run in (f, hzo.blackbox(f)):
            out = run({"p": p}, (q, [r]))
            assert out["b"][1:] == ("a word", None)
            (out["a"].sum() + 3 * out["b"][0].sum()).backward()
        half = [t.grad / 2 for t in (p, q, r)]  # both of them, added
        assert torch.allclose(half[0], p.cos() * q, rtol=TOLERANCE)
        assert torch.allclose(half[1], p.sin(), rtol=TOLERANCE)
        assert torch.allclose(half[2], 6 * r, rtol=TOLERANCE)

    @pytest.mark.parametrize("batch", [4, 5])  # of four samples, a matrix of four rows looks like them
    @pytest.mark.parametrize("first", [False, True])
    def test_tensors_that_all_samples_share(self, batch, first):
        x, w = normal(batch, 4), normal(4, 3)
        f = (lambda w, x: torch.tanh(x @ w)) if first and batch == 5 else (lambda x, w: torch.tanh(x @ w))
        agree(f, hzo.blackbox(f), (w, x) if first and batch == 5 else (x, w), lambda out: out.square().sum())

    def test_a_scalar_that_all_samples_share(self):
        f = lambda x, t: torch.sin(x * t)  # noqa: E731
        agree(f, hzo.blackbox(f), (normal(5, 4), torch.tensor(1.3, dtype=torch.float64)))

    def test_indices_and_masks(self):
        f = lambda x, i, m: torch.where(m, x[torch.arange(len(x)), i][:, None] * x, x.sin())  # noqa: E731
        agree(f, hzo.blackbox(f), (normal(5, 4), torch.tensor([0, 1, 2, 3, 0]), normal(5, 4) > 0))

    def test_none_at_all(self):
        with pytest.raises(InputError, match="needs a tensor to work on"):
            hzo.blackbox(torch.sin)(3.0)

    def test_no_samples(self):
        with pytest.raises(InputError, match="a batch without samples"):
            hzo.blackbox(torch.sin)(torch.zeros(0, 3, requires_grad=True))


class Pair(NamedTuple):
    v: Tensor
    i: Tensor


@dataclass
class Record:
    v: Tensor
    steps: int = 0


class TestStatesThatAreGiven:
    @pytest.mark.parametrize("kind", ["named tuple", "dataclass", "dict"])
    def test_gradients_flow_through_time(self, kind):
        make, read, write = {
            "named tuple": (lambda v: Pair(v, 0 * v), lambda s: s.v, lambda s, v: Pair(v, s.i + v)),
            "dataclass": (Record, lambda s: s.v, lambda s, v: Record(v, s.steps + 1)),
            "dict": (lambda v: {"v": v, "n": 0}, lambda s: s["v"], lambda s, v: {"v": v, "n": s["n"] + 1}),
        }[kind]

        def neuron(x, state):
            v = 0.8 * read(state) + x
            return torch.tanh(v), write(state, v)

        def run(f):
            x = normal(5, 4).requires_grad_()
            state, total = make(0.5 * x), 0
            for _ in range(3):
                out, state = f(x, state)
                total = total + out
            (total.sum() + read(state).square().sum()).backward()
            return x.grad, state

        torch.manual_seed(0)
        exact, _ = run(neuron)
        torch.manual_seed(0)
        found, state = run(hzo.blackbox(neuron, elementwise=True))
        assert torch.allclose(found, exact, rtol=TOLERANCE)
        if kind == "dataclass":
            assert state.steps == 3


class TestNoBatch:
    @pytest.mark.parametrize(
        "f",
        [
            lambda t: torch.stack([t[0].cos() * t[1].sin(), t[2] ** 2]),
            lambda t: t.cumsum(0) ** 2,  # as long as its argument, which are no samples all the same
            lambda t: (t**3).sum(),
            lambda t: torch.outer(t, t.sin()),
        ],
    )
    def test_a_vector_of_parameters(self, f):
        agree(f, hzo.blackbox(f), (normal(6),))

    def test_a_number(self):
        agree(torch.cos, hzo.blackbox(np.cos, numpy=True), (torch.tensor(0.5, dtype=torch.float64),))

    @pytest.mark.parametrize("batch_dim", ["found", None])
    def test_a_matrix(self, batch_dim):
        """It comes out in the shape in which it went in: that rows are no samples is seen by moving one of them."""
        f = lambda w: torch.linalg.inv(w + 3 * torch.eye(4, dtype=w.dtype))  # noqa: E731
        agree(f, hzo.blackbox(f, batch_dim=batch_dim), (normal(4, 4),), lambda out: out.square().sum())

    def test_python_numbers(self):
        t = normal(3).requires_grad_()
        hzo.blackbox(lambda a: float(a[0] * a[1] ** 2), numpy=True)(t).backward()
        assert torch.allclose(t.grad, torch.stack([t[1] ** 2, 2 * t[0] * t[1], 0 * t[0]]), atol=1e-5)

    def test_a_batch_that_influences_itself(self):
        """BatchNorm in training: refused by default, exact where all of the batch is said to be one thing."""
        norm = nn.BatchNorm1d(4).double().requires_grad_(False)
        with pytest.raises(CoupledSamplesError, match="batch_dim=None"):
            gradients(hzo.blackbox(norm), (normal(5, 4),))
        agree(norm, hzo.blackbox(norm, batch_dim=None), (normal(5, 4),), lambda out: (out**3).sum())

    @pytest.mark.parametrize("f", [lambda x: x / x.abs().max(), lambda x: x - x.mean(0)])
    def test_parts_that_look_at_the_whole_batch_are_found_out(self, f):
        with pytest.raises(CoupledSamplesError):
            gradients(hzo.blackbox(f), (normal(5, 4),))
        agree(f, hzo.blackbox(f, batch_dim=None), (normal(5, 4),), lambda out: (out**3).sum())

    @pytest.mark.parametrize("largest", [0, 2, 4])
    @pytest.mark.parametrize("batched", [True, False])
    def test_rows_that_are_times_are_no_samples(self, largest, batched):
        """What comes later shows nowhere before: which row is the largest must not matter."""
        x = normal(5, 4)
        x[largest] *= 10
        for f in (lambda x: x.cumsum(0).sin(), lambda x: x.flip(0).cumsum(0).flip(0).sin()):
            with pytest.raises(CoupledSamplesError):
                gradients(hzo.blackbox(f, batched=batched), (x,))
            agree(f, hzo.blackbox(f), (x[:, 0].clone(),))

    def test_one_row_that_is_a_time(self):
        f = lambda x: x.cumsum(0).sin()  # noqa: E731
        with pytest.raises(CoupledSamplesError):
            gradients(hzo.blackbox(f), (normal(1, 4),))

    def test_a_matrix_that_fails_with_rows_repeated(self):
        agree(torch.linalg.inv, hzo.blackbox(np.linalg.inv, numpy=True), (normal(4, 4) + 3 * torch.eye(4),))

    @pytest.mark.parametrize(
        "x", [torch.eye(3).to_sparse(), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]
    )
    def test_what_is_not_dense_is_refused_by_name(self, x):
        with pytest.raises(InputError, match="dense tensors"):
            hzo.blackbox(torch.sin)(x)

    def test_no_tensor_says_what_came(self):
        with pytest.raises(InputError, match=r"got ndarray; give torch.as_tensor\(x\)"):
            hzo.blackbox(np.sin, numpy=True)(np.ones((2, 3)))

    def test_tables_come_out(self):
        class Table:
            """As pandas has them: an array inside, and no dtype of its own."""

            def __init__(self, values):
                self.values = values

            def __array__(self, dtype=None, copy=None):
                return self.values

        agree(torch.sin, hzo.blackbox(lambda x: Table(np.sin(x)), numpy=True), (normal(5, 4),))

    def test_a_part_of_one_size(self):
        def fixed(x):
            assert len(x) == 5
            return x.sin() * x.sum(1, keepdim=True)

        with pytest.raises(QueryError, match=r"batched=False.*batch_dim=None.*state="):
            gradients(hzo.blackbox(fixed), (normal(5, 4),))
        agree(fixed, hzo.blackbox(fixed, batched=False), (normal(5, 4),))

    def test_a_summary_beside_samples(self):
        f = lambda x: (x.sin(), x.square().sum())  # noqa: E731
        agree(f, hzo.blackbox(f), (normal(5, 4),), lambda out: out[0].sum() + out[1])
        with hzo.count_queries() as count:  # unused, it costs nothing
            agree(f, hzo.blackbox(f), (normal(5, 4),), lambda out: out[0].sum())
        assert count.queries == 2 * 5 * 4


class TestWholeNumbers:
    @pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64, np.uint8])
    def test_codes_of_a_converter(self, dtype):
        q, x = 0.25, (1 + normal(64, 4).abs()).requires_grad_()
        codes = hzo.blackbox(lambda v: np.round(v / q).astype(dtype), numpy=True, elementwise=True, step=q / 2)(x)
        assert codes.dtype == x.dtype
        codes.sum().backward()
        assert torch.allclose(x.grad, torch.full_like(x, 1 / q))

    def test_spikes(self):
        x = normal(64, 4).requires_grad_()
        box = hzo.blackbox(lambda v: v > 0, elementwise=True, step=0.5)
        box(x).sum().backward()
        assert torch.allclose(x.grad, (x.abs() < 0.5).double())
        with torch.no_grad():
            assert box(x).dtype == x.dtype

    @pytest.mark.parametrize("options", [{}, {"noise": 0.1}])
    def test_of_a_noisy_part_too(self, options):
        x = normal(64, 4).requires_grad_()
        hzo.blackbox(lambda v: v > 0, elementwise=True, step=0.5, **options)(x).sum().backward()
        assert x.grad is not None
        assert x.grad.any()

    def test_kept(self):
        x = normal(4, 4).requires_grad_()
        codes, rest = hzo.blackbox(lambda v: (v.argmax(1), v.sin()), integers="kept")(x)
        assert codes.dtype == torch.int64
        assert rest[torch.arange(4), codes].requires_grad


class TestComplex:
    @pytest.mark.parametrize("numpy", [False, True])
    def test_in_and_out(self, numpy):
        f = lambda z: torch.fft.fft(z, dim=1) * z  # noqa: E731
        box = hzo.blackbox((lambda z: np.fft.fft(z, axis=1) * z) if numpy else f, numpy=numpy)
        agree(f, box, (torch.randn(5, 4, dtype=COMPLEX),), lambda out: out.abs().sum())

    def test_elementwise(self):
        f = lambda z: z.abs() ** 2  # noqa: E731
        box = hzo.blackbox(f, elementwise=True)
        with hzo.count_queries() as count:
            agree(f, box, (torch.randn(5, 4, dtype=COMPLEX),), lambda out: out.sin().sum())
        assert count.queries == 2 * 2 * 5  # a real and an imaginary direction, up and down

    def test_out_of_a_real_input(self):
        f = lambda x: torch.complex(x.cos(), 0.5 * x)  # noqa: E731
        agree(f, hzo.blackbox(f), (normal(5, 4),), lambda out: out.abs().sum())

    def test_conjugate_views(self):
        f, z = lambda z: z**2, torch.randn(5, 4, dtype=COMPLEX)
        box = hzo.blackbox(f)
        agree(lambda z: f(z.conj()), lambda z: box(z.conj()), (z,), lambda out: out.abs().sum())

    def test_a_real_cotangent_of_a_complex_output(self):
        f = lambda z: z * z.flip(1)  # noqa: E731
        agree(f, hzo.blackbox(f), (torch.randn(5, 4, dtype=COMPLEX),), lambda out: out.real.sum())


def test_nan_in_all_samples_is_an_error():
    with pytest.raises(NonFiniteError, match="returned NaN or infinity"):
        hzo.blackbox(lambda x: x * float("nan"))(normal(3, 2).requires_grad_())


def test_unlisted_options():
    for options, message in (
        ({"integers": "lost"}, "expected integers to be one of 'floating', 'kept'"),
        ({"batch_dim": 1}, "expected batch_dim to be one of 'found', 0, None"),
        ({"on_failure": "ignore"}, "expected on_failure to be one of"),
        ({"state": 3}, "expected state to be 'found'"),
        ({"bounds": 3}, "expected bounds to be a pair"),
        ({"bounds": (1, 0)}, "low < high"),
        ({"max_error": -1}, "positive finite max_error"),
        ({"executor": 3}, "concurrent.futures.Executor"),
    ):
        with pytest.raises(InputError, match=message):
            hzo.blackbox(torch.sin, **options)
    with pytest.raises(InputError, match="bounds is an option of a single callable"):
        hzo.blackbox([torch.sin, torch.cos], bounds=(0, 1))

"""Custom Functions on the tape: their own backward is their rule, however they are written and called."""

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

import hzo
from support.tape_oracle import check, leaves_of


class Cubed(Function):
    """Its backward says something else than its forward: whoever uses it must get that."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return 5 * g * ctx.saved_tensors[0]


class WithNotes(Function):
    @staticmethod
    def forward(x, k):
        return x * k, x.argmax(1), "a note", x + 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.k = inputs[1]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, first, indices, note, last):
        assert note is None
        return 2 * first * ctx.k + last, None


class Sees(Function):
    """Wants to know which of its results have a cotangent."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.set_materialize_grads(False)
        return a * 1, b * 1

    @staticmethod
    def backward(ctx, first, second):
        return (3 * first if second is None else first), second


taken_before = Cubed.apply


def with_notes(x):
    a, i, _, b = WithNotes.apply(x, 3.0)
    return a.sin() + b * i[:, None]


FUNCTIONS = {
    "apply taken before the recording": lambda x: taken_before(x).sin(),
    "under vmap": torch.func.vmap(lambda r: Cubed.apply(r).sin()),
    "under vmap of grad": torch.func.vmap(torch.func.grad(lambda r: Cubed.apply(r.sin()).sum())),
    "results that are no tensors": with_notes,
    "cotangents that are not there": lambda x: Sees.apply(x, x * 2)[0].sin(),
    "cotangents that are all there": lambda x: sum(Sees.apply(x, x * 2)).sin(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    check(FUNCTIONS[name], leaves_of((4, 3)), dropped=False)


def test_functions_are_put_back():
    before = vars(torch.autograd.function._SingleLevelFunction).get("apply")
    with hzo.record():
        Cubed.apply(torch.ones(2, requires_grad=True))
    assert vars(torch.autograd.function._SingleLevelFunction).get("apply") is before
    x = torch.ones(2, requires_grad=True)
    Cubed.apply(x).sum().backward()
    assert x.grad.tolist() == [5, 5]


@torch.library.custom_op("hzo_tests::parts", mutates_args=())
def parts(x: Tensor) -> list[Tensor]:
    return [x * 2, x.sum(1)]


parts.register_autograd(lambda ctx, grads: grads[0] * 3 + grads[1][:, None])


@torch.library.custom_op("hzo_tests::rounded", mutates_args=())
def rounded(x: Tensor) -> Tensor:
    return x.round()


def test_operators_of_libraries():
    def product(x):
        doubled, summed = parts(x.sin())
        return doubled * summed[:, None]

    check(product, leaves_of((4, 3)), dropped=False)


def test_an_operator_without_a_formula_is_named():
    x = torch.randn(3, requires_grad=True)
    with hzo.record() as step:
        loss = rounded(x * 2).sum()
    with pytest.raises(hzo.errors.TapeError, match=r"hzo_tests.rounded.*hzo.blackbox"):
        step.backward(loss)
    assert x.grad is None

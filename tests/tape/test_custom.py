"""Custom Functions on the tape: their own backward is their rule, however they are written and called."""

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

import hzo
from hzo.errors import TapeError
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


class Twice(Function):
    """Keeps its result, and an argument that is no tensor; the second result is not always used."""

    @staticmethod
    def forward(ctx, x, factor, options=None):
        first = x.exp() * factor
        ctx.save_for_backward(first)
        ctx.options = options
        return first, "a note", x.sum(1)

    @staticmethod
    def backward(ctx, first, note, second):
        assert ctx.options is None or ctx.options == {"of": "the user"}
        return ctx.saved_tensors[0] * first * 3 + second[:, None] * 7, None, None


class Tripled(Function):
    """Keeps nothing: what it was given and what it returned may change."""

    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, g):
        return g * 4


class Scaled(Function):
    """Writes to its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return g * 3


class Widened(Function):
    """Calls the forward of another Function by itself, as subclasses do."""

    @staticmethod
    def forward(ctx, x):
        return Twice.forward(ctx, x, 2.0)[0]

    @staticmethod
    def backward(ctx, g):
        return g * 5 * ctx.saved_tensors[0]


taken_before = Cubed.apply
twice, tripled, scaled, widened = Twice.apply, Tripled.apply, Scaled.apply, Widened.apply


def changed_between(x):
    """What the Function was given, and what it returned, are both written to before its result is read."""
    y = x * 2
    made = tripled(y)
    y.mul_(3)
    return made.add_(1) * y


def results_later(x):
    made = twice(x, 0.3)
    y = x.cos()
    return made[0] * y + made[2][:, None]


def under_no_grad(x):
    with torch.no_grad():
        weight = twice(x, 1.0)[0]
    return weight * x


def with_notes(x):
    a, i, _, b = WithNotes.apply(x, 3.0)
    return a.sin() + b * i[:, None]


FUNCTIONS = {
    "apply taken before the recording": lambda x: taken_before(x).sin(),
    "apply taken before, one of two results": lambda x: twice(x.sin(), 0.3, {"of": "the user"})[0].sin(),
    "apply taken before, the other result": lambda x: twice(x.sin(), 0.3)[2].sin(),
    "apply taken before, all results, later": results_later,
    "apply taken before, again and again": lambda x: taken_before(taken_before(x)) + twice(taken_before(x), 0.1)[0],
    "apply taken before, the loss itself": taken_before,
    "apply taken before, in place around it": changed_between,
    "apply taken before, under no_grad": under_no_grad,
    "apply taken before, another's forward inside": lambda x: widened(x).sin(),
    "apply taken before, under vmap": torch.func.vmap(lambda r: taken_before(r).sin()),
    "under vmap": torch.func.vmap(lambda r: Cubed.apply(r).sin()),
    "under vmap of grad": torch.func.vmap(torch.func.grad(lambda r: Cubed.apply(r.sin()).sum())),
    "results that are no tensors": with_notes,
    "cotangents that are not there": lambda x: Sees.apply(x, x * 2)[0].sin(),
    "cotangents that are all there": lambda x: sum(Sees.apply(x, x * 2)).sin(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    check(FUNCTIONS[name], leaves_of((4, 3)), dropped=False)


def test_an_apply_taken_before_that_writes_to_its_input():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    if torch.__version__ >= "2.14":  # whose apply cannot be seen
        with pytest.raises(hzo.errors.TapeError, match=r"Scaled\.apply\(\.\.\.\)"), hzo.record():
            scaled(x * 1)
        return
    with hzo.record() as step:
        loss = scaled(x * 1).sum()
    step.backward(loss)
    assert x.grad.tolist() == [3, 3, 3]


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


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda g: g, "1 gradients for 2 arguments"),
        (lambda g: (g, g, g), "3 gradients for 2 arguments"),
        (lambda g: (g, g[:1, :2]), r"shape \(1, 2\) for argument 1, which has shape \(2, 3\)"),
        (lambda g: (1.0, g), "a float for argument 0"),
    ],
)
def test_a_backward_that_returns_something_else_is_an_error(returned, says):
    """As for autograd; a gradient that was left out must not be taken for zero."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * y

        @staticmethod
        def backward(ctx, g):
            return returned(g)

    x, y = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    with hzo.record() as step:
        loss = Product.apply(x, y).sum()
    with pytest.raises(TapeError, match=says):
        step.backward(loss)
    assert x.grad is None
    with pytest.raises(RuntimeError):
        Product.apply(x, y).sum().backward()


def test_gradients_beyond_the_arguments_may_be_none():
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g.expand(4, 2, 3), None, None  # and one that is too wide is summed

    x = torch.ones(2, 3, requires_grad=True)
    with hzo.record() as step:
        loss = Identity.apply(x).sum()
    step.backward(loss)
    assert x.grad.tolist() == [[4.0] * 3] * 2

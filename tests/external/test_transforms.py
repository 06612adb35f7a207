"""Transforms of torch.func, forward mode, double backward, gradcheck, torch.compile: right, or refused."""

import functools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import hzo
from hzo.errors import DerivativeError, TraceError
from support.boxes import Odd, physics
from support.oracles import normal


def close(found, exact, tolerance=1e-5):
    assert found.shape == exact.shape
    assert float((found - exact).norm()) <= tolerance * float(exact.norm())


F = {"mixing": lambda t: torch.sin(t).cumsum(1), "elementwise": torch.tanh}
OPTIONS = [
    ("mixing", {}),
    ("mixing", {"batched": False}),
    ("mixing", {"batched": 2}),
    ("mixing", {"step": 1e-5}),
    ("mixing", {"scheme": "forward", "step": 1e-7}),
    ("elementwise", {"elementwise": True}),
    ("elementwise", {"elementwise": True, "step": 1e-5}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
class TestFirstDerivatives:
    def test_jvp(self, name, options):
        f, x, v = F[name], normal(5, 3), normal(5, 3)
        close(jvp(hzo.blackbox(f, **options), (x,), (v,))[1], jvp(f, (x,), (v,))[1])

    def test_jvp_of_trainable_inputs(self, name, options):
        f, x, v = F[name], normal(5, 3).requires_grad_(), normal(5, 3)
        close(jvp(hzo.blackbox(f, **options), (x,), (v,))[1], jvp(f, (x,), (v,))[1])
        close(torch.autograd.functional.jvp(hzo.blackbox(f, **options), x, v)[1], jvp(f, (x,), (v,))[1])

    def test_jacobians(self, name, options):
        f, x = F[name], normal(5, 3)
        box = hzo.blackbox(f, **options)
        exact = jacrev(lambda t: f(t).sum(0))(x)
        close(jacrev(lambda t: box(t).sum(0))(x), exact)
        close(jacfwd(lambda t: box(t).sum(0))(x), exact)
        for vectorize in (False, True):
            close(torch.autograd.functional.jacobian(lambda t: box(t).sum(0), x, vectorize=vectorize), exact)

    def test_per_sample(self, name, options):
        f, x = F[name], normal(6, 3)
        box = hzo.blackbox(f, **(options | ({"batched": True} if options.get("batched") else {})))
        close(vmap(lambda t: box(t[None])[0])(x), f(x))
        for jacobian in (jacrev, jacfwd):
            exact = vmap(jacobian(lambda t: f(t[None])[0]))(x)
            close(vmap(jacobian(lambda t: box(t[None])[0]))(x), exact)
        close(vmap(grad(lambda t: box(t[None]).square().sum()))(x), vmap(grad(lambda t: f(t[None]).square().sum()))(x))

    def test_nested_maps(self, name, options):
        f, x = F[name], normal(2, 3, 4, 3)
        close(vmap(vmap(hzo.blackbox(f, **options)))(x), vmap(vmap(f))(x))

    def test_vjp(self, name, options):
        f, x, g = F[name], normal(5, 3), normal(5, 3)
        close(vjp(hzo.blackbox(f, **options), x)[1](g)[0], vjp(f, x)[1](g)[0])


@pytest.mark.parametrize("options", [{}, {"step": 1e-5}, {"batched": False}])
def test_vectorized_jacobians(options):
    """Autograd's own vectorization, in either direction, knows no rule of a Function's."""
    f = torch.nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double().requires_grad_(False)
    box, x = hzo.blackbox(f, **options), normal(4, 3)
    exact = torch.autograd.functional.jacobian(f, x)
    for strategy in ("reverse-mode", "forward-mode"):
        close(torch.autograd.functional.jacobian(box, x, vectorize=True, strategy=strategy), exact)
    several = hzo.blackbox(lambda a, b: (f(a) * b, a.sum(1)), **options)
    both = (x, normal(4, 2))
    exact = torch.autograd.functional.jacobian(lambda a, b: (f(a) * b, a.sum(1)), both)
    found = torch.autograd.functional.jacobian(several, both, vectorize=True, strategy="forward-mode")
    for of_output, exactly in zip(found, exact, strict=True):
        for one, other in zip(of_output, exactly, strict=True):
            close(one, other) if other.any() else close(one + 1, other + 1)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(2, 3))

    def forward(self, x):
        return torch.tanh(x @ self.weight.T)


def test_parameters_in_forward_mode():
    """Of a parameter that requires no gradient there and has a tangent; it was a silent zero."""
    part, x = Linear(), normal(4, 3)
    box, w, v = hzo.blackbox(part), part.weight.detach().clone(), normal(2, 3)
    (name,) = dict(box.named_parameters())

    def of(module, key):
        return lambda t: functional_call(module, {key: t}, (x,))

    exact = jvp(of(part, "weight"), (w,), (v,))[1]
    close(jvp(of(box, name), (w,), (v,))[1], exact)
    close(jacfwd(of(box, name))(w), jacfwd(of(part, "weight"))(w))
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(of(box, name)(forward_ad.make_dual(w, v))).tangent, exact)
    several = torch.stack([w, 2 * w])
    close(vmap(of(box, name))(several), vmap(of(part, "weight"))(several))


class Holding:
    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x @ self.w


HOLDERS = {
    "closed over": lambda w: lambda x: x @ w,
    "an attribute": Holding,
    "in a list": lambda w: functools.partial(lambda ws, x: x @ ws[0], [w]),
    "bound": lambda w: functools.partial(torch.matmul, other=w),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_is_followed_and_was_not_given_is_refused(name):
    x, w = normal(4, 3), normal(3, 2)

    def of(w, x=x, **options):
        return hzo.blackbox(HOLDERS[name](w), **options)(x)

    for transformed in (
        lambda: jvp(of, (w,), (w,)),
        lambda: jvp(of, (w, x), (w, x)),
        lambda: grad(lambda w: of(w).sum())(w),
        lambda: vmap(of)(torch.stack([w, w])),
    ):
        with pytest.raises(TraceError, match="follows, and that it has not been given: its derivative would be lost"):
            transformed()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w, w)
        for given in (x, forward_ad.make_dual(x, x)):
            with pytest.raises(TraceError, match="follows, and that it has not been given"):
                of(dual, given)
    assert not jvp(lambda w: of(w, parameters="ignored"), (w,), (w,))[1].any()  # said to be the caller's affair


def test_several_cotangents_cost_as_much_as_one():
    box, x = hzo.blackbox(physics), normal(5, 4)
    with hzo.count_queries() as count:
        jacrev(lambda t: box(t).sum(0))(x)
    assert count.queries == 2 * 5 * 4


def test_a_tangent_costs_two_evaluations():
    box, x = hzo.blackbox(physics), normal(5, 4)
    with hzo.count_queries() as count:
        jvp(box, (x,), (normal(5, 4),))
    assert count.queries <= 2 * 2 * 5


def test_per_sample_gradients_of_parameters():
    odd = Odd().double()
    box, x = hzo.blackbox(odd), normal(5, 4)

    def loss(parameters, module, sample):
        return functional_call(module, parameters, (sample[None],)).square().sum()

    of_box = {f"stages.0.f.{name}": p.detach() for name, p in odd.named_parameters()}
    of_odd = {name: p.detach() for name, p in odd.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, None, 0))(of_box, box, x)
    exact = vmap(grad(loss), in_dims=(None, None, 0))(of_odd, odd, x)
    for name, gradient in exact.items():
        close(found[f"stages.0.f.{name}"], gradient)


def test_gradcheck():
    x = normal(4, 3).requires_grad_()
    for f, options in ((F["mixing"], {}), (torch.tanh, {"elementwise": True})):
        box = hzo.blackbox(f, **options)
        assert torch.autograd.gradcheck(box, (x,), check_forward_ad=True, check_batched_grad=True)
    z = torch.randn(4, 3, dtype=torch.complex128, requires_grad=True)
    for f, options in ((lambda z: z * z.roll(1, 1).conj() + z.abs(), {}), (lambda z: z**2, {"elementwise": True})):
        assert torch.autograd.gradcheck(hzo.blackbox(f, **options), (z,), check_forward_ad=True)


SECOND = {
    "hessian": lambda box, x: hessian(lambda t: box(t).sum())(x),
    "forward over reverse": lambda box, x: jacfwd(jacrev(box))(x),
    "reverse over reverse": lambda box, x: jacrev(jacrev(box))(x),
    "forward over forward": lambda box, x: jacfwd(jacfwd(box))(x),
    "reverse over forward": lambda box, x: jacrev(jacfwd(box))(x),
    "of each sample": lambda box, x: vmap(hessian(lambda t: box(t[None]).sum()))(x),
    "of autograd": lambda box, x: torch.autograd.functional.hessian(lambda t: box(t).sum(), x),
    "gradgradcheck": lambda box, x: torch.autograd.gradgradcheck(box, (x.clone().requires_grad_(),)),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_are_refused(name):
    with pytest.raises(DerivativeError, match="a second derivative of the black box <lambda> was asked for"):
        SECOND[name](hzo.blackbox(F["mixing"]), normal(4, 3))


def test_a_second_derivative_around_the_part_is_no_second_derivative_of_it():
    """Linear in the cotangent: what autograd asks of a penalty on a gradient behind the part."""
    box, x, w = hzo.blackbox(torch.sin), normal(4, 3).requires_grad_(), normal(3).requires_grad_()

    def penalty(f):
        (g,) = torch.autograd.grad((f(x) * w.square()).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), w)[0]

    close(penalty(box), penalty(torch.sin))


def test_a_trace_without_values_is_refused():
    with pytest.raises(DerivativeError, match="in a trace without values"):
        linearize(hzo.blackbox(torch.sin), normal(4, 3))


def test_traces_without_values_and_without_a_gradient_are_refused():
    with pytest.raises(DerivativeError, match="without values"):
        make_fx(hzo.blackbox(torch.sin))(normal(4, 3))


def test_a_state_of_its_own_is_refused_where_slices_would_share_it():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(1, 3, dtype=torch.float64))

        def forward(self, x):
            self.total = self.total + x
            return self.total.sin()

    with pytest.raises(DerivativeError, match=r"keeps a state.*torch.vmap"):
        vmap(hzo.blackbox(Counter()))(normal(4, 1, 3))


WHOLE = {"jvp": lambda box, x: jvp(box, (x,), (x,)), "vmap": lambda box, x: vmap(grad(lambda t: box(t[None]).sum()))(x)}


@pytest.mark.parametrize("transform", WHOLE)
def test_what_is_planned_as_a_whole_refuses(transform):
    with pytest.raises(DerivativeError, match="planned as a whole"):
        WHOLE[transform](hzo.blackbox([torch.sin, torch.tanh]), normal(5, 3))


def test_parameters_of_what_is_planned_as_a_whole_are_refused_too():
    part, x = Linear(), normal(4, 3)
    box, w = hzo.blackbox([part, torch.tanh]), part.weight.detach().clone()
    (name,) = dict(box.named_parameters())
    with pytest.raises(DerivativeError, match="planned as a whole"):
        jvp(lambda t: functional_call(box, {name: t}, (x,)), (w,), (w,))
    with pytest.raises(TraceError, match="has not been given"):
        jvp(lambda t: hzo.blackbox([lambda z: z @ t.T, torch.tanh])(x), (w,), (w,))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend):
    model = nn.Sequential(nn.Linear(3, 3), hzo.blackbox(F["mixing"]), nn.Linear(3, 2)).double()
    x = normal(5, 3)
    model(x).square().sum().backward()
    exact = model[0].weight.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x).square().sum().backward()
    close(model[0].weight.grad, exact, 1e-9)


def test_on_the_tape():
    model = nn.Sequential(nn.Linear(3, 4), hzo.blackbox(physics), nn.Linear(4, 2)).double()
    x = normal(5, 3)
    model(x).square().sum().backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with hzo.record() as step:
        loss = model(x).square().sum()
    step.backward(loss)
    for p, g in zip(model.parameters(), exact, strict=True):
        close(p.grad, g, 1e-12)


def test_the_forward_gradient_is_not_biased_before_a_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), hzo.blackbox(lambda t: 2 * t.sin()), nn.Linear(3, 2)).double()
    x, y = normal(5, 3), torch.arange(5) % 2
    nn.functional.cross_entropy(model[2](2 * model[0](x).sin()), y).backward()
    exact = model[0].weight.grad.clone()
    model.zero_grad()
    torch.func.jacfwd(model[1])(x)  # what the part keeps of a transform that is over is in nobody's way
    hzo.baselines.forward_gradient(model, nn.functional.cross_entropy, x, y, samples=2000)
    cosine = nn.functional.cosine_similarity(model[0].weight.grad.flatten(), exact.flatten(), dim=0)
    assert cosine > 0.98

"""Models as people write them, through plans: right, or an error that says why not."""

import pytest
import torch
from torch import nn

import hzo
from hzo.errors import NonFiniteError, PlanError, TraceError
from support import oracles
from support.oracles import normal


class Does(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def sign(h):
    return Sign.apply(h)


WAYS = [("planned", "structure"), ("flat", "nothing"), ("bisect", "locality"), ("stagewise", "nothing")]


@pytest.mark.parametrize(("tree", "assume"), WAYS)
def test_an_embedding_that_renormalizes_its_weight(tree, assume):
    """The forward pass writes to the parameter, by rows that the input names; it stays a parameter."""
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 4, max_norm=0.7)
    model = nn.Sequential(embedding, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.tensor([[0, 1, 2], [3, 0, 0], [5, 5, 1]])
    before = embedding.weight.detach().clone()
    chain = hzo.trace(model, x)
    assert torch.equal(embedding.weight, before)
    found, _ = hzo.grad_and_value(chain, oracles.distance, x, plan=hzo.plan(chain, tree=tree, assume=assume))
    exact = torch.autograd.grad(oracles.distance(model(x)).mean(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), exact, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


class Sign(torch.autograd.Function):
    """A straight-through estimator: backward is not the derivative of forward."""

    @staticmethod
    def forward(ctx, h):
        return h.sign()

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("memory", [None, 10**9])
@pytest.mark.parametrize(
    ("tree", "assume"),
    [*((t, a) for t in ("flat", "bisect", "stagewise", "planned") for a in ("nothing", "locality")),
     ("flat", "structure"), ("bisect", "structure")],
)  # fmt: skip
def test_queries_through_a_custom_function_are_refused(tree, assume, memory):
    """Differences of its forward would not be what its author says that the gradient is."""
    model, x = nn.Sequential(nn.Linear(4, 4), Does(sign), nn.Linear(4, 2)).double(), normal(3, 4)
    chain = hzo.trace(model, x)
    with pytest.raises(PlanError, match=r"Sign is a custom autograd Function, whose forward and backward may disagree"):
        hzo.plan(chain, tree=tree, assume=assume, memory=memory)
    with pytest.raises(PlanError, match="Sign is a custom autograd Function"):
        hzo.grad_and_value(model, oracles.distance, x, tree=tree, assume=assume)


def quantized(h):
    return torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -8, 7)


def test_fake_quantization_passes_straight_through():
    """Differences of a staircase are no slope; PyTorch's backward of it is one."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), Does(quantized), nn.Linear(4, 2)), normal(3, 4).float()
    for tree, assume in (("stagewise", "structure"), ("flat", "nothing")):
        with pytest.raises(PlanError, match=r"fake_quantize.*forward and backward may disagree"):
            hzo.grad_and_value(model, oracles.distance, x, tree=tree, assume=assume)
    chain = hzo.trace(model, x)
    found, _ = hzo.grad_and_value(chain, oracles.distance, x, plan=hzo.plan(chain))
    exact = torch.autograd.grad(oracles.distance(model(x)).mean(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), exact, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_custom_function_carries_back_by_its_own_backward():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), Does(sign), nn.Linear(4, 2)).double(), normal(3, 4)
    chain = hzo.trace(model, x)
    found, _ = hzo.grad_and_value(chain, oracles.distance, x, plan=hzo.plan(chain))
    exact = torch.autograd.grad(oracles.distance(model(x)).mean(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), exact, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


class Square(torch.autograd.Function):
    """It saves what it is given, and takes an argument that is no tensor."""

    @staticmethod
    def forward(ctx, h, factors):
        ctx.save_for_backward(h)
        ctx.factors = factors
        return factors[0] * h * h

    @staticmethod
    def backward(ctx, g):
        (h,) = ctx.saved_tensors
        return 2 * ctx.factors[0] * h * g, None


@pytest.mark.parametrize("memory", [None, 800])
def test_a_custom_function_gets_back_what_it_saved(memory):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Tanh(), Does(lambda h: Square.apply(h, [2.0]))] * 3
    model, x = nn.Sequential(*layers, nn.Linear(4, 2)).double(), normal(3, 4)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, memory=memory)
    assert (plan.storage == "all") == (memory is None)
    found, _ = hzo.grad_and_value(chain, oracles.distance, x, plan=plan)
    exact = torch.autograd.grad(oracles.distance(model(x)).mean(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), exact, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("tree", "assume"), WAYS)
def test_a_custom_function_where_no_query_goes_is_not_asked_about(tree, assume):
    """One on a weight, or before all that is trained, is passed by no difference."""

    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(normal(2, 4))

        def forward(self, h):
            return h @ Sign.apply(self.weight).T

    torch.manual_seed(0)
    model, x = nn.Sequential(Does(sign), nn.Linear(4, 4), nn.Tanh(), Signed()).double(), normal(3, 4)
    chain = hzo.trace(model, x)
    found, _ = hzo.grad_and_value(chain, oracles.distance, x, plan=hzo.plan(chain, tree=tree, assume=assume))
    exact = torch.autograd.grad(oracles.distance(model(x)).mean(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), exact, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def check(model, x, tree, assume, loss_fn=oracles.distance):
    """Against autograd, and what was counted against what the plan says."""
    torch.manual_seed(1)
    loss = loss_fn(model(x)).mean()
    loss.backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, tree=tree, assume=assume)
    torch.manual_seed(1)
    with hzo.count_queries() as count:
        found, value = hzo.grad_and_value(chain, loss_fn, x, plan=plan)
    assert count.queries == plan.queries
    torch.testing.assert_close(value, loss.detach())
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def chain_of(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *more, nn.Linear(4, 2)).double()


@pytest.mark.parametrize(("tree", "assume"), WAYS)
def test_hooks_of_parameters_run(tree, assume):
    model = chain_of(nn.Tanh())
    model[0].weight.register_hook(lambda g: 3 * g)
    model[2].bias.register_hook(lambda g: None)
    check(model, normal(3, 4), tree, assume)


@pytest.mark.parametrize(("tree", "assume"), WAYS)
def test_hooks_of_inputs_run(tree, assume):
    model, x = chain_of(nn.Tanh()), normal(3, 4).requires_grad_()
    x.register_hook(lambda g: -g)
    oracles.distance(model(x)).mean().backward()
    exact, x.grad = x.grad, None
    chain = hzo.trace(model, x)
    hzo.backward(chain, oracles.distance, x, plan=hzo.plan(chain, tree=tree, assume=assume))
    torch.testing.assert_close(x.grad, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("tree", "assume"), WAYS)
def test_hooks_inside_the_model_are_refused_by_name(tree, assume):
    def doubled(g):
        return 2 * g

    def forward(h):
        h = h.tanh()
        if h.requires_grad:
            h.register_hook(doubled)
        return h

    model, x = chain_of(Does(forward)), normal(3, 4)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, tree=tree, assume=assume)
    with pytest.raises(PlanError, match=r"what tanh made \(.*doubled\)"):
        hzo.backward(chain, oracles.distance, x, plan=plan)
    assert all(p.grad is None for p in model.parameters())


def test_full_backward_hooks_of_modules():
    model, x = chain_of(nn.Tanh()), normal(3, 4)
    model[1].register_full_backward_hook(lambda module, of_input, of_output: (2 * of_input[0],))
    check(model, x, "planned", "structure")
    with pytest.raises(PlanError, match="BackwardHookFunction is a custom autograd Function"):
        hzo.plan(hzo.trace(model, x), tree="flat", assume="nothing")


@pytest.mark.parametrize(("tree", "assume"), WAYS)
def test_a_write_without_a_gradient_is_read_again(tree, assume):
    """``cosine_similarity`` clamps its norms in place under ``no_grad``: queries need what stood there before."""
    target = normal(4)
    model = chain_of(Does(lambda h: h * nn.functional.cosine_similarity(h, target.expand_as(h), dim=1)[:, None]))
    check(model, normal(3, 4), tree, assume)


@pytest.mark.parametrize(("tree", "assume"), WAYS)
def test_places_that_values_pick(tree, assume):
    """Indices that a query computes anew are no places that it copies."""

    def best(h):
        values, places = h.topk(2, -1)
        return torch.cat([values, h.softmax(-1).gather(1, places)], 1)

    check(chain_of(Does(best)), normal(5, 4), tree, assume)


@pytest.mark.parametrize("tree", ["flat", "planned"])
def test_complex_numbers_are_refused_by_name(tree):
    model = chain_of(Does(lambda h: torch.complex(h, h).square().abs()))
    with pytest.raises(TraceError, match="complex makes a complex tensor"):
        hzo.grad_and_value(model, oracles.distance, normal(3, 4), tree=tree, assume="nothing")


@pytest.mark.parametrize(("tree", "assume"), WAYS)
def test_what_the_loss_measures_is_no_query_of_the_plan(tree, assume):
    head = nn.Linear(2, 3).double()
    check(chain_of(nn.Tanh()), normal(3, 4), tree, assume, lambda out: oracles.distance(head(out)))


def test_a_function_whose_apply_was_taken_before():
    model, x = chain_of(Does(Sign.apply)), normal(3, 4)
    found, _ = hzo.grad_and_value(model, oracles.distance, x)
    oracles.distance(model(x)).mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"tree": "flat"}, {"assume": "nothing"}])
def test_plans_refuse_it_by_name(options):
    """Queries would see its forward, and not its backward."""
    model = chain_of(Does(Sign.apply))
    with pytest.raises(PlanError, match="Sign"):
        hzo.backward(model, oracles.distance, normal(3, 4), **options)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("tree", "assume"), WAYS)
def test_a_number_that_a_module_counts_with_is_put_back_after_tracing(tree, assume):
    class Warming(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = 0

        def forward(self, h):
            self.steps += 1
            return h.tanh() * self.steps

    model = chain_of(Warming())
    chain = hzo.trace(model, normal(3, 4))
    assert model[1].steps == 0
    _, loss = hzo.grad_and_value(chain, oracles.distance, x := normal(3, 4), tree=tree, assume=assume)
    assert model[1].steps == 1
    model[1].steps = 0
    torch.testing.assert_close(loss, oracles.distance(model(x)).mean().detach())


def test_a_buffer_replaced_by_a_step_that_fails_is_put_back():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4).double())

        def forward(self, h):
            self.mean = self.mean * 0.9 + 0.1
            return h + self.mean

    model = chain_of(Running())
    before = model[1].mean
    with pytest.raises(NonFiniteError):
        hzo.backward(model, lambda out: out.sum() * torch.inf, normal(3, 4))
    assert model[1].mean is before
    assert not before.any()

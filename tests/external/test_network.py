"""hzo.module: a network as one function of autograd's, recorded forwards and swept backwards."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import DerivativeError, DistributedError, InputError, NonFiniteError, TapeError


class Net(nn.Module):
    """Buffers, dropout, in-place code, several outputs, a parameter that is not used, one that has no part in all."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.side, self.unused, self.drop = nn.Linear(8, 2), nn.Linear(2, 2), nn.Dropout(0.2)

    def forward(self, x, *, scale=1.0):
        h = F.relu(self.norm(self.conv(x)), inplace=True)
        h = self.drop(h).mean((2, 3))
        return {"logits": self.last(h) * scale, "h": h, "side": self.side(h), "sign": self.last(h).sign(), "n": 3}


X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Y = torch.tensor([0, 1, 2, 3])


def network():
    torch.manual_seed(0)
    return Net().double()


def state_after(model, times=1):
    """Gradients of a loss of two outputs, of the input behind another layer, and the buffers."""
    torch.manual_seed(1)
    x = X.clone().requires_grad_()
    out = model(2 * x, scale=0.5)
    loss = F.cross_entropy(out["logits"], Y) + out["h"].square().sum()
    for k in range(times):
        loss.backward(retain_graph=k < times - 1)
    return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("times", [1, 2])
def test_gradient_is_autograds(times):
    with hzo.count_queries() as count:
        found = state_after(hzo.module(network()), times)
    assert count.queries > 0
    for a, b in zip(found, state_after(network(), times), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_zero_and_none_as_for_autograd():
    """Where a derivative is zero everywhere there is a gradient of zeros; where no path leads there is none."""
    found = []
    for model in (hzo.module(network()), network()):
        model(X)["sign"].sum().backward()
        found.append({name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()})
    assert found[0] == found[1]
    assert found[0]["side.weight"] is None
    assert not torch.tensor(found[0]["last.weight"]).any()


def test_it_stays_the_module_that_it_was():
    model = network()
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert hzo.module(model) is model
    assert hzo.module(model) is model
    assert isinstance(model, Net)
    assert type(model).__name__ == "Net"
    assert list(model.state_dict()) == names
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert inspect.signature(model.forward) == inspect.signature(Net().forward)
    assert type(hzo.plain(model)) is Net


def test_copies():
    model = hzo.module(network())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert type(made) is type(model)
        for a, b in zip(state_after(made), state_after(network()), strict=True):
            assert a is None or torch.allclose(a, b)


def test_inside_other_modules_autograd_runs_as_ever():
    torch.manual_seed(0)
    first, middle, last = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 1)
    x, found = torch.randn(3, 4), []
    for part in (hzo.module(copy.deepcopy(middle)), middle):
        model = nn.Sequential(copy.deepcopy(first), part, copy.deepcopy(last))
        model(x).sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_run_once():
    model, seen = hzo.module(nn.Sequential(nn.Linear(2, 2), nn.Tanh())), []
    model[0].weight.register_hook(lambda g: seen.append("parameter"))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    model[0].register_full_backward_hook(lambda *_: seen.append("module inside"))
    model.register_full_backward_hook(lambda *_: seen.append("module"))
    x = torch.ones(1, 2, requires_grad=True)
    x.register_hook(lambda g: seen.append("input"))
    model(x * 1).sum().backward()
    assert sorted(seen) == ["accumulated", "input", "module", "module inside", "parameter"]


def test_checkpointing_around_it():
    found = []
    for use_reentrant in (True, False):
        model, x = hzo.module(network()).eval(), X.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(lambda z, m=model: m(z)["h"], x, use_reentrant=use_reentrant).sum().backward()
        found.append([x.grad, model.conv.weight.grad])
    model, x = network().eval(), X.clone().requires_grad_()
    model(x)["h"].sum().backward()
    for grads in found:
        torch.testing.assert_close(grads, [x.grad, model.conv.weight.grad])


def test_writing_to_an_output():
    """As for autograd: fine where nothing reads it, and an error where the sweep does."""
    linear = hzo.module(nn.Linear(3, 3))
    linear(torch.randn(2, 3)).relu_().sum().backward()
    out = hzo.module(network())(X)
    out["h"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out["logits"].sum().backward()


def test_weights_that_change_before_the_backward_pass():
    model = hzo.module(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    out = model(torch.ones(1, 2))
    with torch.no_grad():
        model[1].weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_writing_to_the_input():
    model = hzo.module(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)))
    with pytest.raises(TapeError, match="writes in place to an input that requires a gradient"):
        model(2 * torch.ones(2, 3, requires_grad=True))
    x = -torch.ones(2, 3)
    model(x).sum().backward()
    assert not x.any()


def test_memory_is_released():
    """A graph that was run through, or forgotten, holds nothing of the recording."""
    import gc
    import weakref

    model = hzo.module(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    gc.disable()
    try:
        out = model(torch.ones(1, 2))
        pullback = weakref.ref(out.grad_fn.pullback)
        out.sum().backward()
        del out
        assert pullback() is None
    finally:
        gc.enable()


def test_second_backward_pass():
    out = hzo.module(nn.Linear(2, 2))(torch.ones(1, 2)).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_inside_of_a_recording_it_is_as_it_was():
    model, plain = hzo.module(network()).eval(), network().eval()
    for m in (model, plain):
        hzo.backward(m, lambda out, y: F.cross_entropy(out["logits"], y), X, Y)
    torch.testing.assert_close(model.conv.weight.grad, plain.conv.weight.grad)


def test_without_gradients_it_runs_as_it_is():
    model = hzo.module(network()).eval()
    with torch.no_grad():
        assert not model(X)["h"].requires_grad
    model.requires_grad_(False)
    assert model(X)["h"].grad_fn is None


def test_compiled_around_it():
    model = hzo.module(nn.Linear(3, 1))
    compiled = torch.compile(lambda x: model(x).sum(), backend="eager")
    compiled(torch.ones(1, 3)).backward()
    assert model.weight.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_what_it_does_not_do():
    model = hzo.module(nn.Linear(2, 1))
    with pytest.raises(DerivativeError, match=r"under torch\.func"):
        torch.func.vmap(model)(torch.ones(3, 2))
    with pytest.raises(DerivativeError, match="forward mode"):
        torch.func.jvp(model, (torch.ones(1, 2),), (torch.ones(1, 2),))
    x = torch.ones(1, 2, requires_grad=True)
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(DerivativeError, match=r"a second derivative of a module made by hzo\.module"):
        g.sum().backward()
    with pytest.raises(InputError, match=r"expected an nn.Module .* hzo.blackbox\(f\)"):
        hzo.module(torch.tanh)
    with pytest.raises(InputError, match="written in Python"):
        hzo.module(torch.jit.script(nn.Linear(2, 2)))


class Part(nn.Module):
    """A part of a model, between two layers; ``run`` is its forward pass."""

    def __init__(self, run):
        super().__init__()
        self.before, self.after = nn.Linear(5, 8), nn.Linear(8, 2)
        self.part = Run(run)


class Run(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.layer, self.run = nn.Linear(8, 8), run

    def forward(self, *args):
        return self.run(self, *args)


class Output(dict):
    __getattr__ = dict.__getitem__


def gradients_of_part(run, loss, wrap, given=lambda h: h):
    torch.manual_seed(0)
    model = Part(run).double()
    wrap(model.part)
    h = model.before(torch.randn(6, 5, dtype=torch.float64))
    loss(model, model.part(given(h))).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def keep_loss(part, h):
    part.aux = torch.softmax(part.layer(h), 1).square().mean()
    return h.sin()


def keep_containers(part, h):
    y = part.layer(h).sin()
    part.log = [*getattr(part, "log", []), y.mean()]
    part.named, part.both, part.given = {"std": [y.std()]}, (y.sum(), "sum"), h
    return y


def distribution(part, h):
    return torch.distributions.Normal(part.layer(h), F.softplus(h))


def kept_loss(m, y):
    return m.after(y).sum() + m.part.aux


def kept_containers(m, y):
    part = m.part
    return m.after(y).mean() + part.log[-1] + part.named["std"][0] + 0.1 * part.both[0] + part.given.square().mean()


PARTS = {
    "a loss in an attribute": (keep_loss, kept_loss),
    "tensors in containers": (keep_containers, kept_containers),
    "an output object": (lambda p, h: Output(y=p.layer(h).sin(), cache=object()), lambda m, o: m.after(o.y).sum()),
    "a distribution": (distribution, lambda m, d: -d.log_prob(torch.ones(8).double()).mean() + m.after(d.mean).sum()),
    "its input": (lambda p, h: (h, p.layer(h).sin()), lambda m, o: (m.after(o[0]) * m.after(o[1])).sum()),
    "a parameter": (lambda p, h: (p.layer(h), p.layer.bias), lambda m, o: m.after(o[0] * o[1]).sum()),
    "a tensor from outside": (lambda p, h: (p.layer(h).sin(), p.other), lambda m, o: m.after(o[0] * o[1]).sum()),
}


@pytest.mark.parametrize("name", PARTS)
def test_results_wherever_they_are(name):
    run, loss = PARTS[name]
    found = []
    for wrap in (hzo.module, hzo.plain):
        torch.manual_seed(0)
        model = Part(run).double()
        wrap(model.part)
        h = model.before(torch.randn(6, 5, dtype=torch.float64))
        model.part.other = h.exp()
        for _ in range(2):  # what is in an attribute from the call before is no result of this one
            out = model.part(h)
        value = loss(model, out)
        inside = [n for n in nodes(value) if n in ("SinBackward0", "SoftmaxBackward0")]
        assert not inside or wrap is hzo.plain  # autograd does not go into the module
        value.backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def nodes(loss):
    """The names of autograd's nodes behind a loss."""
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [inner for inner, _ in node.next_functions]
    return [node.name() for node in seen]


def test_inputs_in_objects():
    def run(part, d):
        return part.layer(d.rsample()) * d.mean

    def loss(m, y):
        return m.after(y).square().mean()

    def given(h):
        return torch.distributions.Normal(h, F.softplus(h))

    a, b = (gradients_of_part(run, loss, wrap, given) for wrap in (hzo.module, hzo.plain))
    for name, g in a.items():
        torch.testing.assert_close(g, b[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [lambda m, f: f[0].sum() + m.after(f[0]).sum(), lambda m, f: f[0].sin().sum()])
def test_results_that_are_nowhere_are_refused(loss):
    kept = []

    def run(part, h):
        kept[:] = [part.layer(h).exp().sin()]
        return h.sin()

    with pytest.raises(TapeError, match=r"attribute"):
        gradients_of_part(run, lambda m, y: m.after(y).sum() + loss(m, kept), hzo.module)


def test_gradient_penalties_are_refused():
    """PyTorch's once_differentiable drops them without a word where no cotangent requires a gradient."""
    model = hzo.module(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)))
    x = torch.randn(3, 5, requires_grad=True)
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(DerivativeError, match=r"gradient penalty.*hzo\.record\(\)"):
        (model(x).mean() + g.norm()).backward()
    model.zero_grad()
    model(x).sum().backward(create_graph=True)  # nobody differentiates that
    assert model[0].weight.grad.any()


def test_a_hook_takes_a_derivative_of_what_was_recorded():
    """Implicit layers, as in the tutorials of deep equilibrium models."""

    def run(part, h):
        def step(z):
            return torch.tanh(0.3 * part.layer(z) + h)

        with torch.no_grad():
            z = torch.zeros_like(h)
            for _ in range(60):
                z = step(z)
        result, start = step(z), z.clone().requires_grad_()
        again = step(start)

        def hook(g):
            u = g
            for _ in range(60):
                u = g + torch.autograd.grad(again, start, u, retain_graph=True)[0]
            return u

        result.register_hook(hook)
        return result

    def loss(m, y):
        return m.after(y).square().mean()

    a, b = (gradients_of_part(run, loss, wrap) for wrap in (hzo.module, hzo.plain))
    for name, g in a.items():
        torch.testing.assert_close(g, b[name], rtol=1e-8, atol=1e-12)


def test_a_failed_call_leaves_no_trace():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            self.norm(x)
            raise NonFiniteError("as it says")

    model = hzo.module(Failing())
    with pytest.raises(NonFiniteError, match="as it says"):
        model(torch.randn(4, 2))
    assert not model.norm.running_mean.any()


def test_the_wrapper_belongs_around_it():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(DistributedError, match=r"DistributedDataParallel\(hzo.module\(model\)\)"):
            hzo.module(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
    finally:
        torch.distributed.destroy_process_group()

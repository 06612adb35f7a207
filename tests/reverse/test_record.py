"""What people write in a forward pass or a loss: each recorded step must have autograd's gradient, to rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import InputError, TapeError

SEED = 1
X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers and whatever else; ``run(self, x)`` is its forward."""

    def __init__(self, run, **parts):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(5, 8), nn.Linear(8, 3), run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def distance(model):
    return F.mse_loss(model(X), Y)


def gradients(model, run):
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(SEED)
    run(model)
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def by_tape(model, loss):
    with hzo.record() as step:
        value = loss(model)
    step.backward(value)


def agrees(model, loss=distance, tolerance=1e-9, dtype=torch.float64):
    """The tape's gradient against autograd's on a copy of the model."""
    model = model.to(dtype)
    twin = copy.deepcopy(model)
    found = gradients(model, lambda m: by_tape(m, loss))
    exact = gradients(twin, lambda m: loss(m).mean().backward())
    assert any(g is not None and g.any() for g in exact.values())
    for name, g in exact.items():
        if g is None:
            assert found[name] is None or not found[name].any(), f"{name} has a gradient, and none by autograd"
            continue
        assert found[name] is not None or not g.any(), f"{name} has no gradient"
        if found[name] is not None:
            error = float((found[name] - g).abs().max() / g.abs().max().clamp(min=1e-6))
            assert error <= tolerance, f"{name} is off by {error:.1e}"
    for (name, one), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, n=name: f"buffer {n}: {text}")


def tanh(s, x):
    return s.b(torch.tanh(s.a(x)))


@torch.jit.script
def scripted(x, n: int):
    for _ in range(n):
        x = x * torch.sigmoid(x)
    return x


def assigned_in_vmap(s, x):
    def row(r):
        z = torch.zeros_like(r[:3])
        z[0] = s.b(torch.tanh(s.a(r)))[0]
        z[1:] += 2
        return z

    return torch.func.vmap(row)(x)


def hooked(s, x):
    h = torch.tanh(s.a(x))
    h.register_hook(lambda g: g * 2)
    return s.b(h)


def clamped(s, x):
    with torch.no_grad():
        s.a.weight.clamp_(-0.2, 0.2)
    return tanh(s, x)


def averaged(s, x):
    with torch.no_grad():
        s.c.mul_(0.9).add_(s.a.weight.detach() * 0.1)
    return s.b(torch.tanh(F.linear(x, s.c) + s.a(x)))


def rows_written(s, x):
    rows = torch.zeros(10, 6, 8, dtype=x.dtype)
    h = s.a(x)
    for k in range(10):
        rows[k] = torch.tanh(h) * k
        h = h + rows[k].mean(0)
    return s.b(rows[2:].mean(0) + rows[:, 1:].sum())


def cache_grown(s, x):
    cache = torch.empty(0, 8, dtype=x.dtype)
    for r in x:
        cache = torch.cat([cache, s.a(r)[None]])
    cache[cache < 0] *= 0.1
    cache.t()[1] += cache[:, 0]
    return s.b(cache)


def permuted_writes(s, x):
    a, b = s.a(x).chunk(2, 1)
    a = a.clone()
    a += b
    c = torch.stack([a, b * 2])
    c[0, :, 1] = c[1, :, 0]
    d = c.permute(1, 0, 2)
    d[:, 0] *= 3
    return s.b(d.reshape(6, 8))


def data_written(s, x):
    h = s.a(x) * 1
    h.data.mul_(2)
    return s.b(h)


def detached_in_place(s, x):
    h = s.a(x)
    return s.b(h) + s.b(torch.tanh(h).detach_())


def packed(s, x):
    sequence = s.a(x)[:, :, None].expand(6, 8, 4).contiguous()
    p = nn.utils.rnn.pack_padded_sequence(sequence, torch.tensor([8, 7, 5, 3, 2, 1]), batch_first=True)
    out, _ = nn.utils.rnn.pad_packed_sequence(s.r(p)[0], batch_first=True)
    return s.b(out.mean(2))


def branch_on_a_value(s, x):
    return s.b(s.a(x)) if s.a(x).sum().item() > 0 else s.b(-s.a(x))


def derivative_by_transform(s, x):
    inner = torch.func.grad(lambda z: tanh(s, z).sum())(x)
    return tanh(s, x) + inner.sum(1, keepdim=True)


def hessian(s, x):
    return torch.func.hessian(lambda z: tanh(s, z).sum())(x[0]).sum() * x[:, :3]


def attention(s, x):
    h = s.a(x)[None]
    return s.b(s.m(h, h, h)[0][0])


def noise_drawn(s, x):
    return s.b(s.a(x) + torch.randn_like(s.a(x)) * s.a(x).abs())


FORWARDS = {
    "in-place writes inside vmap": (assigned_in_vmap, {}),
    "scripted function": (lambda s, x: s.b(scripted(s.a(x), 3)), {}),
    "gradient by torch.func inside": (derivative_by_transform, {}),
    "gradient under vmap inside": (
        lambda s, x: torch.func.vmap(torch.func.grad(lambda z: tanh(s, z).sum()))(x)[:, :3],
        {},
    ),
    "jacobian under vmap": (lambda s, x: torch.func.vmap(torch.func.jacrev(lambda z: tanh(s, z)))(x).sum(2), {}),
    "hook of a tensor": (hooked, {}),
    "weights clamped in the forward pass": (clamped, {}),
    "a running average of weights": (averaged, {"c": nn.Parameter(torch.randn(8, 5), requires_grad=False)}),
    "rows of a buffer written in a loop": (rows_written, {}),
    "a cache that grows, is masked and transposed": (cache_grown, {}),
    "writes through a permuted view": (permuted_writes, {}),
    "writes to .data": (data_written, {}),
    "detach_": (detached_in_place, {}),
    "packed sequence": (packed, {"r": nn.GRU(4, 4, batch_first=True)}),
    "branch on a value": (branch_on_a_value, {}),
    "noise of the size of an activation": (noise_drawn, {}),
    "embedding with max_norm": (
        lambda s, x: s.b(s.e(torch.arange(6) % 4)) + 0 * tanh(s, x),
        {"e": nn.Embedding(4, 8, max_norm=0.5)},
    ),
    "attention with dropout": (attention, {"m": nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.2)}),
    "transformer layer": (
        lambda s, x: s.b(s.m(s.a(x)[None])[0]),
        {"m": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)},
    ),
    "a weight used twice, transposed": (lambda s, x: F.linear(tanh(s, x) @ s.b.weight, s.a.weight.T)[:, :3], {}),
    "old spectral norm": (lambda s, x: s.b(s.c(x)), {"c": nn.utils.spectral_norm(nn.Linear(5, 8))}),
    "spectral norm": (lambda s, x: s.b(s.c(x)), {"c": nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8))}),
    "masked selection": (lambda s, x: s.b(s.a(x)) * s.a(x)[s.a(x) > 0].mean(), {}),
    "largest values": (lambda s, x: s.a(x).topk(3, 1)[0], {}),
    "gumbel softmax, hard": (lambda s, x: s.b(F.gumbel_softmax(s.a(x), hard=True)), {}),
    "alpha dropout": (lambda s, x: s.b(F.alpha_dropout(s.a(x), 0.4, True)), {}),
    "channel dropout": (lambda s, x: s.b(F.dropout2d(s.a(x)[:, :, None, None], 0.4)[:, :, 0, 0]), {}),
    "unbound and summed": (lambda s, x: sum(s.b(h) for h in torch.unbind(torch.stack([s.a(x)] * 3))), {}),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forward(name):
    run, parts = FORWARDS[name]
    torch.manual_seed(0)
    agrees(Net(run, **copy.deepcopy(parts)))


def gradient_penalty(model):
    x = X.clone().requires_grad_()
    out = model(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.square().mean() + ((g.norm(dim=1) - 1) ** 2).mean()


def one_step_ahead(model):
    """The loss after a step of gradient descent, as meta-learning has it."""
    gs = torch.autograd.grad(F.mse_loss(model(X), Y), list(model.parameters()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(model.named_parameters(), gs, strict=True)}
    return F.mse_loss(torch.func.functional_call(model, moved, (X,)), Y)


LOSSES = {
    "gradient penalty": gradient_penalty,
    "the loss after a step": one_step_ahead,
    "a loss per sample": lambda m: (m(X) - Y).square().sum(1),
    "two passes": lambda m: F.mse_loss(m(X), m(X.flip(0))) + F.l1_loss(m(2 * X), Y),
    "a penalty on weights": lambda m: F.mse_loss(m(X), Y) + 0.1 * sum(p.square().sum() for p in m.parameters()),
    "a penalty alone": lambda m: sum(p.abs().sum() for p in m.parameters()),
    "likelihood with a variance": lambda m: F.gaussian_nll_loss(m(X), Y, m(2 * X).square()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name):
    torch.manual_seed(0)
    agrees(Net(tanh), LOSSES[name])


def test_a_compiled_model_runs_as_eager():
    torch.manual_seed(0)
    model = Net(tanh).double()
    compiled = torch.compile(model)
    found = gradients(model, lambda _: by_tape(compiled, distance))
    exact = gradients(model, lambda m: distance(m).backward())
    for name, g in exact.items():
        torch.testing.assert_close(found[name], g)


def test_autocast():
    def run(s, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tanh(s, x.float()).double()

    torch.manual_seed(0)
    agrees(Net(run), dtype=torch.float32, tolerance=2e-2)


@pytest.mark.parametrize("kind", ["full", "pre"])
def test_backward_hooks_of_modules(kind):
    torch.manual_seed(0)
    model = Net(tanh)
    if kind == "full":
        model.b.register_full_backward_hook(lambda _, gi, go: (gi[0] * 0.1 + go[0].sum(),))
    else:
        model.b.register_full_backward_pre_hook(lambda _, go: (go[0] * 3,))
    agrees(model)


def test_hooks_of_parameters():
    torch.manual_seed(0)
    model = Net(tanh).double()
    seen = []
    model.a.weight.register_hook(lambda g: g * 0)
    model.b.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    by_tape(model, distance)
    assert not model.a.weight.grad.any()
    assert torch.equal(seen[0], model.b.weight.grad)


def test_retained_gradients():
    torch.manual_seed(0)
    model = Net(tanh).double()
    with hzo.record() as step:
        h = torch.tanh(model.a(X))
        h.retain_grad()
        loss = F.mse_loss(model.b(h), Y)
    step.backward(loss)
    found = h.grad
    again = torch.tanh(model.a(X))
    again.retain_grad()
    F.mse_loss(model.b(again), Y).backward()
    torch.testing.assert_close(found, again.grad)


def test_gradients_own_their_memory():
    """What goes into .grad is handed over where it is nobody else's: never a view, or what somebody else holds."""
    a, b, c, d = (torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(4))
    kept = []
    d.register_hook(kept.append)
    with hzo.record() as step:
        product = c @ torch.ones(3, 3, dtype=torch.float64)
        product.retain_grad()
        loss = (a + b + product + d * 2).square().sum() + b[0].sum()
    step.backward(loss)
    tensors = [a.grad, b.grad, c.grad, d.grad, product.grad, kept[0]]
    before = [t.clone() for t in tensors]
    for t in tensors[:4]:
        assert t.is_contiguous()
        assert t._base is None
    for k, t in enumerate(tensors):
        t.add_(1)
        for j, other in enumerate(tensors):
            assert torch.equal(other, before[j] + 1 if j <= k else before[j])


def test_a_gradient_that_a_function_keeps_is_copied():
    class Kept(torch.autograd.Function):
        made = torch.ones(3, dtype=torch.float64)

        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return Kept.made

    x = torch.randn(3, dtype=torch.float64).requires_grad_()
    for _ in range(2):
        x.grad = None
        with hzo.record() as step:
            loss = Kept.apply(x).sum()
        step.backward(loss)
        x.grad.add_(5)
        assert torch.equal(Kept.made, torch.ones(3, dtype=torch.float64))


def test_what_lies_before_the_recording_is_no_silent_zero():
    model = Net(tanh).double()
    before = model.a(X)
    with hzo.record() as step:
        loss = model.b(before).square().mean()
    with pytest.raises(hzo.errors.TapeError, match="begin the recording earlier"):
        step.backward(loss)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_from_elsewhere():
    model = Net(tanh).double()
    loss = distance(model)
    with hzo.record() as step:
        distance(model)
    with pytest.raises(hzo.errors.InputError, match="not made inside the recording"):
        step.backward(loss)


def test_recordings_are_freed():
    import gc
    import weakref

    model = Net(tanh).double()
    with hzo.record() as step:
        loss = distance(model)
    step.backward(loss)
    gone = weakref.ref(step.tape)
    del step, loss
    gc.collect()
    assert gone() is None


def test_a_failed_step_is_undone():
    import random

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(5)
            self.register_buffer("rows", torch.zeros(3))

        def forward(self, x):
            self.rows[1] += 1
            random.random()
            torch.rand(3)
            x = self.bn(x)
            self.rows += x.detach().sum()
            self.eval()
            raise OverflowError("out of ink")

    model, x = Failing(), torch.randn(4, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random.seed(3)
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(OverflowError, match="out of ink"):
        hzo.backward(model, lambda o: o.sum(), x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert model.training


def test_threads_each_have_their_gradient():
    import threading

    problems = []
    for k in range(4):
        torch.manual_seed(k)
        problems.append(Net(tanh).double())
    exact = [gradients(m, lambda m: distance(m).backward()) for m in problems]
    found = [None] * 4

    def work(k):
        for _ in range(5):
            leaves, _ = hzo.grad_and_value(problems[k], lambda o: F.mse_loss(o, Y), X)
            found[k] = leaves

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for got, want in zip(found, exact, strict=True):
        for name, g in want.items():
            torch.testing.assert_close(got[name], g)


def test_a_declared_module_is_refused():
    """It is one operation of which the tape knows nothing; its own code may cut the gradient."""
    model = nn.Sequential(nn.Linear(3, 3), hzo.declare(nn.Hardtanh(), "elementwise"))
    with pytest.raises(TapeError, match="declared as one operation"), hzo.record():
        model(torch.randn(2, 3))


def test_several_gradients_under_one_autocast():
    """PyTorch keeps the casts of weights for the block, with the history of the step that made them."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            model.zero_grad()
            hzo.backward(model, lambda out: out.float().square().mean(), x)
            found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
        model(x).float().square().mean().backward()  # and autograd's own history is whole behind them
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    for g, p in zip(found[0], model.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=0.05, atol=1e-3)


WRITES = {
    "weights that an optimizer steps": lambda m, x, y: torch.optim.SGD(m.parameters(), 1.0).step(),
    "one weight": lambda m, x, y: m.last.weight.data is not None and m.last.weight.detach().mul_(2),
    "weights that are loaded": lambda m, x, y: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "a model in another dtype": lambda m, x, y: m.float(),
    "a batch that is refilled": lambda m, x, y: x.zero_(),
    "a target": lambda m, x, y: y.zero_(),
    "a frozen scale": lambda m, x, y: m.scale.mul_(2),
    "an activation": lambda m, x, y: m.kept.detach().mul_(2),
}


class Kept(nn.Module):
    """A model of which every part is needed for its gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.rand(4))
        self.double()

    def forward(self, x):
        self.kept = torch.tanh(self.first(x))
        return self.last(self.kept * self.scale)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_changes_between_the_block_and_backward_is_an_error(write):
    """Weights are measured when the gradient is taken: others would give another step's gradient, without a word."""
    model, x, y = Kept(), torch.randn(3, 4).double(), torch.randn(3, 2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    with hzo.record() as tape:
        loss = F.mse_loss(model(x), y)
    write(model, x, y)
    with pytest.raises(TapeError, match="after the recording"):
        tape.backward(loss)


def test_what_no_derivative_needs_may_change_behind_the_block():
    """As for autograd: biases, the first weight of a network, statistics of a norm that runs again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 4).double()
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    with hzo.record() as tape:
        loss = model(x).square().mean()
    model(torch.randn(5, 4).double())
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[0].bias.mul_(2)
        model[3].bias.mul_(2)
    tape.backward(loss)
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("change", [lambda loss, w: loss.div_(4), lambda loss, w: loss.add_(w.square().sum())])
def test_a_loss_that_is_changed_in_place_behind_the_block_is_an_error(change):
    """The tape has not seen it: the gradient would be that of the loss as it was."""
    model = nn.Linear(3, 2)
    with hzo.record() as tape:
        loss = model(torch.randn(4, 3)).square().mean()
    change(loss, model.weight)
    with pytest.raises(TapeError, match="inside of the with block"):
        tape.backward(loss)
    assert model.weight.grad is None


def test_a_recording_is_entered_once():
    layer, x = nn.Linear(2, 2), torch.randn(3, 2)
    recording = hzo.record(layer)
    with recording as tape:
        loss = layer(x).square().sum()
    tape.backward(loss)
    with pytest.raises(TapeError, match="make a new one for each step"), recording:
        pass


@pytest.mark.parametrize("given", [3, nn.Linear(2, 2).parameters()])
def test_what_is_no_module_is_refused(given):
    with pytest.raises(InputError, match="expected modules"):
        hzo.record(given)

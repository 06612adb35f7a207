"""What surrounds a recording: hooks, checkpoints, derivatives that hooks take, what autograd's engine would do."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import hzo
from hzo.errors import TapeError
from hzo.tracing.promises import untouched
from support.tape_oracle import check, leaves_of


@pytest.mark.parametrize("how", ["grad_fn.register_hook", "grad_fn.register_prehook", "Module.register_backward_hook"])
def test_hooks_of_nodes_are_refused_by_name(how):
    """They would hang on an engine that never runs."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    if how.startswith("Module"):
        model[1].register_backward_hook(lambda module, g_in, g_out: (g_in[0] * 2,))
        run = model
    else:

        def run(x):
            h = model[1](model[0](x))
            getattr(h.grad_fn, how.partition(".")[2])(lambda *grads: (grads[0][0] * 2,))
            return model[2](h)

    with pytest.raises(TapeError, match="node of autograd"), hzo.record():
        run(torch.randn(2, 3))
    x = torch.ones(3, requires_grad=True)  # outside they work
    y = x * 2
    y.grad_fn.register_hook(lambda g_in, g_out: (g_in[0] * 7, None))
    y.sum().backward()
    assert x.grad.tolist() == [14] * 3


@pytest.mark.parametrize("mode", ["all", "any"])
def test_hooks_of_several_tensors_are_refused_by_name(mode):
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    torch.autograd.graph.register_multi_grad_hook((x, y), print, mode=mode)
    with hzo.record() as step:
        loss = (x * y).sum()
    with pytest.raises(TapeError, match="register_multi_grad_hook"):
        step.backward(loss)
    assert x.grad is None
    assert y.grad is None


def derivative_in_a_checkpoint(a, b):
    h = checkpoint(lambda t: torch.tanh(t @ b), a, use_reentrant=False)
    (inner,) = torch.autograd.grad(h.square().sum(), a, create_graph=True)
    return inner * a


def selective(a, b):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def keep(ctx, op, *args, **kwargs):
        product = op is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, keep)
    return checkpoint(lambda t: torch.tanh(torch.tanh(t @ b) @ b), a, use_reentrant=False, context_fn=contexts)


def written_behind(a, b):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        h = (a @ b).sigmoid()
    h.mul_(2)
    return h


def without_inputs_that_have_gradients(a, b):
    """Reentrant checkpointing gives weights no gradient where no input has one."""
    return checkpoint(lambda t: t @ b, torch.ones(3, 4, dtype=a.dtype), use_reentrant=True) + a @ b


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize(
    "function", [derivative_in_a_checkpoint, selective, written_behind, without_inputs_that_have_gradients]
)
def test_checkpoints(function):
    check(function, leaves_of((3, 4), (4, 4)), dropped=False)


def test_a_hook_that_solves_for_the_adjoint():
    """Implicit layers: a fixed point without a graph, and a hook that takes derivatives of what was recorded."""

    def fixed_point(x, w):
        def f(z):
            return torch.tanh(0.3 * z @ w + x)

        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(60):
                z = f(z)
        z = f(z)
        at = z.detach().requires_grad_()
        image = f(at)

        def adjoint(g):
            u = g
            for _ in range(60):
                u = torch.autograd.grad(image, at, u, retain_graph=True)[0] + g
            return u

        z.register_hook(adjoint)
        return z * 2

    check(fixed_point, leaves_of((3, 4), (4, 4)), dropped=False)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cond_runs_as_eager(sign):
    """Beside the branch that was taken: autograd of ``torch.cond`` compiles, which depends on what ran before."""
    x = (sign * torch.rand(3, 4, dtype=torch.float64)).requires_grad_()
    with hzo.record() as tape:
        loss = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.exp(), (x,)).sum()
    tape.backward(loss)
    torch.testing.assert_close(x.grad, (x.cos() if sign > 0 else x.exp()).detach(), rtol=1e-12, atol=0)
    assert torch.cond is torch._higher_order_ops.cond


def test_nested_tensors_are_refused_by_name():
    layer = nn.Linear(3, 4)
    offsets = torch.tensor([0, 2, 5])
    with pytest.raises(TapeError, match="nested tensor"), hzo.record():
        torch.tanh(torch.nested.nested_tensor_from_jagged(layer(torch.randn(5, 3)), offsets))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_tensors_that_wrap_others_are_refused_by_name():
    layer, x = nn.Linear(3, 4), torch.randn(5, 3)

    def masked(h):
        return torch.masked.as_masked_tensor(h, h > 0).mul(2).to_tensor(0.0)

    with pytest.raises(TapeError, match="MaskedTensor, a tensor that wraps others"), hzo.record():
        masked(layer(x))


def test_plain_subclasses_are_followed():
    class Image(torch.Tensor):
        """As torchvision's are."""

    layer, x = nn.Linear(3, 4), torch.randn(5, 3).as_subclass(Image)
    hzo.backward(layer, lambda out: out.square().mean(), x)
    found = layer.weight.grad.clone()
    layer.zero_grad()
    layer(x).square().mean().backward()
    torch.testing.assert_close(found, layer.weight.grad)


def test_masks_of_minus_infinity_are_inputs():
    model = nn.Transformer(4, 1, 1, 1, 8, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    inputs = {"src": x, "tgt": x, "tgt_mask": mask}
    hzo.backward(model, F.mse_loss, inputs, x)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.mse_loss(model(**inputs), x).backward()
    for g, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, atol=1e-12, rtol=1e-9)


class CountsCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))

    def found(self):
        return self.calls


class CountsFlops(FlopCounterMode):
    def __init__(self):
        super().__init__(display=False)

    def found(self):
        return self.get_total_flops()


class Profiles(torch.profiler.profile):
    def __init__(self):
        super().__init__(activities=[torch.profiler.ProfilerActivity.CPU])

    def found(self):
        return sum(event.count for event in self.key_averages() if event.key.startswith("aten::"))


STEPS = {
    "hzo.record": None,
    "hzo.backward": {},
    "a plan of queries": {"tree": "bisect", "assume": "nothing"},
    "a plan by structure": {"tree": "stagewise"},
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", [CountsCalls, CountsFlops, Profiles], ids=lambda mode: mode.__name__)
def test_what_counts_and_profiles_may_stand_around_a_step(mode, step):
    """Counters of operations ask by hooks where the backward pass is; they see the queries, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    with mode() as forward:
        F.mse_loss(model(x), y)
    F.mse_loss(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with mode() as counts:
        if STEPS[step] is None:
            with hzo.record() as tape:
                loss = F.mse_loss(model(x), y)
            tape.backward(loss)
        else:
            hzo.backward(model, F.mse_loss, x, y, **STEPS[step])
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-9)
    assert counts.found() > forward.found() > 0


def test_a_counter_may_be_entered_inside():
    x = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(4, 2).double()
    with hzo.record() as tape, CountsFlops() as counts:
        loss = layer(x).square().sum()
    tape.backward(loss)
    assert counts.found() == 2 * 3 * 4 * 2
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_modules_are_called_as_ever_and_a_hook_of_the_users_is_told_from_ours():
    layer, call = nn.Linear(2, 2), nn.Module.__call__
    with hzo.record():
        assert nn.Module.__call__ is call
        assert untouched(layer)
        handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
        try:
            assert not untouched(layer)
        finally:
            handle.remove()
    assert untouched(layer)

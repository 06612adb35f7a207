"""What people do around ``loss.backward()`` works around ``hzo.backward`` unchanged."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from support import oracles
from support.oracles import normal, relative_errors, worst
from support.training import autograd, batch, grads, network


def test_gradients_accumulate():
    model, (x, y) = network(), batch()
    chain = hzo.trace(model, x)
    for half in (slice(0, 3), slice(3, 6)):
        hzo.backward(chain, lambda out, y: F.cross_entropy(out, y) / 2, x[half], y[half])
    assert worst(relative_errors(grads(model), autograd(model, x, y))) <= oracles.CENTRAL


def test_scale():
    model, (x, y) = network(), batch()
    for scale in (4.0, torch.tensor(4.0)):
        model.zero_grad()
        hzo.backward(model, F.cross_entropy, x, y, scale=scale)
        exact = {name: 4 * g for name, g in autograd(model, x, y).items()}
        assert worst(relative_errors(grads(model), exact)) <= oracles.CENTRAL


def test_mixes_with_autograd():
    """Half of the loss by autograd, half by hzo, into one ``.grad``."""
    model, (x, y) = network(), batch()
    F.cross_entropy(model(x), y).backward()
    hzo.backward(model, F.cross_entropy, x, y)
    exact = {name: 2 * g for name, g in autograd(model, x, y).items()}
    assert worst(relative_errors(grads(model), exact)) <= oracles.CENTRAL


def test_clipping():
    model, (x, y) = network(), batch()
    hzo.backward(model, F.cross_entropy, x, y)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    exact = autograd(model, x, y)
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in exact.values()]).norm())
    clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.01, dtype=torch.float64), rtol=1e-3, atol=0)
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    assert max(float(p.grad.abs().max()) for p in model.parameters()) <= 1e-4


# SparseAdam takes sparse gradients alone; LBFGS has a test of its own; Muon takes matrices alone.
NOT_HERE = {"Optimizer", "SparseAdam", "LBFGS", "Muon"}
OPTIMIZERS = sorted(
    name
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and name not in NOT_HERE
)


def step_by(model, optimizer, x, y, differentiate):
    """Three steps; returns the losses."""
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(float(differentiate(model, x, y)))
        optimizer.step()
    return losses


def by_hzo(model, x, y):
    return hzo.backward(model, F.cross_entropy, x, y)


def by_autograd(model, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, options):
    """The same three steps as with autograd."""
    make = getattr(torch.optim, name)
    models, (x, y) = (network(), network()), batch()
    try:
        optimizers = [make(model.parameters(), lr=1e-2, **options) for model in models]
    except (TypeError, RuntimeError) as error:
        pytest.skip(str(error))
    losses = [
        step_by(model, optimizer, x, y, differentiate)
        for model, optimizer, differentiate in zip(models, optimizers, (by_hzo, by_autograd), strict=True)
    ]
    # Sign-like first steps (Adam, Rprop) blow up the error of components that are nearly zero.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_lbfgs():
    model, (x, y) = network(), batch()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        return by_hzo(model, x, y)

    first = closure()
    optimizer.step(closure)
    assert closure() < 0.1 * first


def test_muon():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model, (x, y) = network(), batch()
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2)
    losses = step_by(model, optimizer, x, y, by_hzo)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 3),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=4),
    ],
)
def test_schedulers(make):
    models, (x, y) = (network(), network()), batch()
    for model, differentiate in zip(models, (by_hzo, by_autograd), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = make(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            differentiate(model, x, y)
            optimizer.step()
            scheduler.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def compiled_child(model):
    return nn.Sequential(*model[:3], torch.compile(nn.Sequential(*model[3:5]), backend="eager"), model[5])


def compiled_in_place(model):
    model[3].compile(backend="eager")
    return model


def compiled_function(model):
    return hzo.Chain([*model[:2], torch.compile(torch.tanh, backend="eager"), *model[3:]])


@pytest.mark.parametrize(
    "make", [compiled_child, compiled_in_place, compiled_function, lambda model: torch.compile(model, backend="eager")]
)
@pytest.mark.parametrize("assume", ["nothing", "structure"])
def test_compiled_stages(make, assume):
    model, (x, y) = network(), batch()
    exact = autograd(model, x, y)
    hzo.backward(make(model), F.cross_entropy, x, y, assume=assume)
    assert worst(relative_errors(grads(model), exact)) <= oracles.CENTRAL


def test_frozen_parameters_are_left_alone():
    model, (x, y) = network(), batch()
    model[1].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    hzo.backward(model, F.cross_entropy, x, y)
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"1.weight", "1.bias", "3.bias"}
    model.requires_grad_(True)  # thawed: traced and planned anew
    hzo.backward(model, F.cross_entropy, x, y)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("hook", [lambda m, args, out: out * 2, None])
def test_hooks(hook):
    """A hook may change what a layer computes: then no closed rule holds, and the parameters are perturbed."""
    model, (x, y) = network(), batch()
    model[3].register_forward_hook(hook or (lambda m, args, out: None))
    model[5].register_forward_pre_hook(lambda m, args: (args[0].sin(),))
    hzo.backward(model, F.cross_entropy, x, y)
    assert worst(relative_errors(grads(model), autograd(model, x, y))) <= oracles.CENTRAL


@pytest.mark.parametrize("perturbed", [False, True])
def test_memory_formats(perturbed):
    """Weights that are not contiguous, by their rule and perturbed."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    model = model.to(memory_format=torch.channels_last)
    model[3].weight = nn.Parameter(model[3].weight.detach().t().contiguous().t())
    if perturbed:
        for layer in (model[0], model[3]):
            layer.register_forward_hook(lambda m, args, out: out.sin())
    x, y = normal(4, 2, 3, 3).to(memory_format=torch.channels_last), torch.arange(4) % 3
    hzo.backward(model, F.cross_entropy, x, y)
    assert worst(relative_errors(grads(model), autograd(model, x, y))) <= oracles.CENTRAL


def test_evaluation_mode_and_back():
    model, (x, y) = network().append(nn.Dropout(0.5)), batch()
    for mode in (False, True, False):
        model.train(mode).zero_grad()
        torch.manual_seed(3)
        hzo.backward(model, F.cross_entropy, x, y)
        torch.manual_seed(3)
        assert worst(relative_errors(grads(model), autograd(model, x, y))) <= oracles.CENTRAL


def compiled_steps(loss_fn):
    def by_backward(model, x, y):
        return hzo.backward(model, loss_fn, x, y)

    def by_record(model, x, y):
        with hzo.record() as tape:
            loss = loss_fn(model(x), y)
        tape.backward(loss)
        return loss

    def by_gradients(model, x, y):
        found, loss = hzo.grad_and_value(model, loss_fn, x, y)
        for name, parameter in model.named_parameters():
            parameter.grad = found[name]
        return loss

    return {"backward": by_backward, "record": by_record, "grad_and_value": by_gradients}


@pytest.mark.parametrize("way", compiled_steps(None))
def test_a_compiled_training_step(way):
    """The compiler does not look into a gradient: it breaks its graph there, and the step is as without it."""
    model, (x, y) = network(), batch(6)
    exact = autograd(model, x, y)
    step = torch.compile(compiled_steps(F.cross_entropy)[way], backend="eager")
    for _ in range(2):
        model.zero_grad()
        loss = step(model, x, y)
    assert torch.allclose(loss, F.cross_entropy(model(x), y))
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, exact[name], rtol=1e-9)

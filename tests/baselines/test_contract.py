"""What every baseline promises beside its estimate: no side effects, accumulation, counts, clean errors."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo.baselines
from hzo.baselines import BASELINES, backprop, coordinate_wise, forward_gradient, mezo, node_perturbation, spsa
from hzo.errors import HzoError, InputError, NonFiniteError, StepError
from hzo.execution.counting import count_queries
from hzo.tracing.chain import Chain

ALL = [known.estimate for known in BASELINES.values()]
RANDOM = [known.estimate for known in BASELINES.values() if known.passes is not None]
BATCH = 6


def network() -> nn.Module:
    """BatchNorm, dropout, a part that is frozen and in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3)
    )
    model[4].eval().requires_grad_(False)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, 3), torch.randint(0, 3, (BATCH,))


def options(method) -> dict:
    chosen = {"samples": 2, "generator": torch.Generator().manual_seed(2)} if method in RANDOM else {}
    if method is node_perturbation:
        chosen["per_sample"] = False  # BatchNorm in train mode mixes samples
    return chosen


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same_bits(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("method", ALL)
def test_leaves_what_one_forward_pass_leaves(method):
    model, (x, y) = network(), batch()
    reference = copy.deepcopy(model)
    torch.manual_seed(3)
    reference(x)
    random_after = torch.get_rng_state()
    torch.manual_seed(3)
    method(model, F.cross_entropy, x, y, **options(method))
    assert torch.equal(torch.get_rng_state(), random_after)
    assert same_bits(bits(model), bits(reference))
    assert [m.training for m in model.modules()] == [m.training for m in reference.modules()]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or not parameter.grad.is_inference()


@pytest.mark.parametrize("method", ALL)
def test_accumulates(method):
    model, (x, y) = network(), batch()
    model.eval()
    method(model, F.cross_entropy, x, y, **options(method))
    once = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    held = [p.grad for p in model.parameters() if p.requires_grad]
    method(model, F.cross_entropy, x, y, **options(method))
    for before, tensor, p in zip(once, held, [p for p in model.parameters() if p.requires_grad], strict=True):
        assert p.grad is tensor
        torch.testing.assert_close(p.grad, 2 * before)


@pytest.mark.parametrize("method", [m for m in ALL if m is not backprop])
def test_runs_where_autograd_raises(method, monkeypatch):
    # Tracing counts operations with a part of torch that looks autograd's functions up when it is first loaded.
    importlib.import_module("torch._dynamo")

    def forbidden(*args, **kwargs):
        raise AssertionError("reverse-mode autograd was called")

    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    model, (x, y) = network(), batch()
    recorded = []

    def loss_fn(output, target):
        recorded.append(output.requires_grad)
        return F.cross_entropy(output, target)

    method(model, loss_fn, x, y, **options(method))
    assert recorded
    assert not any(recorded)


COUNTS = [  # passes at a perturbed state, forward equivalents, base passes; 16 + 8 + 15 trainable elements
    pytest.param(backprop, {}, 0, 0, id="backprop"),
    pytest.param(coordinate_wise, {}, 78, 78, id="coordinate_wise central"),
    pytest.param(coordinate_wise, {"scheme": "forward"}, 39, 39, id="coordinate_wise forward"),
    pytest.param(spsa, {"samples": 3}, 6, 6, id="spsa"),
    pytest.param(mezo, {"samples": 3}, 6, 6, id="mezo"),
    pytest.param(forward_gradient, {"samples": 3}, 3, 8, id="forward_gradient"),
    pytest.param(node_perturbation, {"samples": 3, "per_sample": False}, 6, 6, id="node_perturbation"),
]


@pytest.mark.parametrize(("method", "chosen", "passes", "equivalents"), COUNTS)
@pytest.mark.parametrize("as_chain", [False, True])
def test_counts(method, chosen, passes, equivalents, as_chain):
    model, (x, y) = network(), batch()
    if as_chain:
        model = Chain(list(model))
    # Node perturbation traces what it is given, and finds six stages in either.
    stages = 6 if as_chain or method is node_perturbation else 1
    with count_queries() as count:
        method(model, F.cross_entropy, x, y, **chosen)
    assert count.queries == passes * BATCH
    assert count.stage_evaluations == passes * BATCH * stages
    assert count.base_evaluations == BATCH * stages
    assert count.forward_equivalents == equivalents
    assert count.loss_evaluations == passes * BATCH


@pytest.mark.parametrize("method", [m for m in ALL if m is not backprop])
@pytest.mark.parametrize("failing_call", [1, 2])
def test_error_in_the_middle_changes_nothing(method, failing_call):
    model, (x, y) = network(), batch()
    before, state = bits(model), torch.get_rng_state()
    calls = 0

    def fails(output, target):
        nonlocal calls
        calls += 1
        if calls == failing_call:
            return (output * float("nan")).sum()
        return F.cross_entropy(output, target)

    with pytest.raises(NonFiniteError, match="finite"):
        method(model, fails, x, y, **options(method))
    assert calls == failing_call
    assert same_bits(bits(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [coordinate_wise, spsa, mezo])
def test_parameters_come_back_bit_for_bit(method, dtype):
    model, (x, y) = network().to(dtype), batch()
    before = [p.clone() for p in model.parameters()]
    for _ in range(5):
        method(model, F.cross_entropy, x.to(dtype), y)
    assert same_bits(list(model.parameters()), before)
    assert all(p.grad.dtype is dtype and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", RANDOM)
def test_seeds(method):
    """A generator repeats; without one torch's global state moves on, so that directions differ."""
    model, (x, y) = network(), batch()
    model.eval()
    results = []
    torch.manual_seed(0)
    for generator in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1), None, None):
        model.zero_grad()
        method(model, F.cross_entropy, x, y, generator=generator)
        results.append(model[-1].weight.grad.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[2], results[3])
    torch.manual_seed(0)
    model.zero_grad()
    method(model, F.cross_entropy, x, y)
    assert torch.equal(model[-1].weight.grad, results[2])


@pytest.mark.parametrize("method", ALL)
def test_bad_input(method):
    model, (x, y) = network().eval(), batch()
    with pytest.raises(InputError, match="zero samples"):
        method(model, F.cross_entropy, x[:0], y[:0])
    with pytest.raises(InputError, match="expected a tensor"):
        method(model, F.cross_entropy, 3.0, y)
    with pytest.raises(NonFiniteError, match="input x"):
        method(model, F.cross_entropy, x / 0, y)
    with pytest.raises(InputError, match="real loss"):
        method(model, lambda output, target: output[:2], x, y)
    with pytest.raises(InputError, match="tensor or a number"):
        method(model, lambda output, target: "none", x, y)


@pytest.mark.parametrize("method", ALL)
def test_nothing_to_train(method):
    model, (x, y) = network().eval(), batch()
    model.requires_grad_(False)
    with count_queries() as count:
        loss = method(model, F.cross_entropy, x, y)
    assert loss.isfinite()
    assert count.queries == 0
    assert all(p.grad is None for p in model.parameters())


def test_bad_options():
    model, (x, y) = network().eval(), batch()
    for method in RANDOM:
        with pytest.raises(InputError, match="samples"):
            method(model, F.cross_entropy, x, y, samples=0)
    for mu in (-1.0, float("inf"), True):
        with pytest.raises(InputError, match="step"):
            spsa(model, F.cross_entropy, x, y, mu=mu)
    with pytest.raises(StepError, match=r"vanishes in 0\.weight"):
        mezo(model.bfloat16(), F.cross_entropy, x.bfloat16(), y, mu=1e-6)


def test_forward_gradient_names_what_has_no_derivative():
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Model(nn.Linear):
        def forward(self, x):
            return Rounded.apply(super().forward(x))

    class Detached(nn.Linear):
        def forward(self, x):
            return torch.from_numpy(super().forward(x).detach().numpy().copy())

    x, y = batch()
    for model in (Model(3, 3), Detached(3, 3)):
        before = bits(model)
        with pytest.raises(InputError, match="forward-mode derivative"):
            forward_gradient(model, F.cross_entropy, x, y)
        assert same_bits(bits(model), before)
        spsa(model, F.cross_entropy, x, y)


def test_trains_with_any_optimizer():
    model, (x, y) = network(), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(float(spsa(model.eval(), F.cross_entropy, x, y, samples=20)))
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_all_baselines_are_exported_and_all_errors_are_ours():
    assert set(hzo.baselines.__all__) >= {method.__name__ for method in ALL}
    assert issubclass(InputError, HzoError)


@pytest.mark.parametrize("name", ["spsa", "mezo", "coordinate_wise", "backprop"])
def test_lists_and_dicts_of_a_model_are_as_after_one_call(name):
    """However often a method runs the model."""

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.history, self.table = nn.Linear(3, 2), [], {"calls": 0}

        def forward(self, x):
            self.history.append(1)
            self.table["calls"] += 1
            return self.layer(x)

    model = Noted()
    getattr(hzo.baselines, name)(model, lambda out: out.square().mean(), torch.randn(4, 3))
    assert (model.history, model.table) == ([1], {"calls": 1})
    assert model.layer.weight.grad is not None

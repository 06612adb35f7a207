"""A step that fails, and a trace, leave every source of random numbers and every parameter's memory as it was."""

import random
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hzo
from hzo.errors import HzoError, InputError, NonFiniteError, TapeError


class Drawing(nn.Module):
    """A model that draws from generators of its own and of everybody, and gives a parameter new memory."""

    def __init__(self, replaces: bool = True) -> None:
        super().__init__()
        self.replaces = replaces
        self.layer = nn.Linear(4, 4)
        self.moved = nn.Parameter(torch.zeros(4))
        self.torch_generator = torch.Generator().manual_seed(3)
        self.python = random.Random(3)
        self.numpy = {"new": np.random.default_rng(3)}
        self.old = [np.random.RandomState(3)]

    def forward(self, x: Tensor) -> Tensor:
        if self.replaces:
            self.moved.data = self.moved.data + 1
        drawn = self.python.random() + random.random() + float(np.random.rand())
        drawn += float(self.numpy["new"].random()) + float(self.old[0].rand())
        noise = torch.randn(x.shape, generator=self.torch_generator) + torch.rand(())
        return self.layer(x) * drawn + noise + self.moved


def _state(model: Drawing) -> list[Any]:
    return [
        model.torch_generator.get_state().tolist(),
        torch.get_rng_state().tolist(),
        model.python.getstate(),
        random.getstate(),
        repr(model.numpy["new"].bit_generator.state),
        repr(model.old[0].get_state()),
        repr(np.random.get_state()),
        model.moved.tolist(),
        model.moved.data_ptr(),
    ]


def _failing(output: Tensor) -> Tensor:
    return output.sum() * float("nan")


PLANS: list[dict[str, Any]] = [{}, {"tree": "bisect", "assume": "nothing"}]


@pytest.mark.parametrize("options", PLANS)
def test_failed_step(options: dict[str, Any]) -> None:
    model, x = Drawing(), torch.randn(6, 4)
    before = _state(model)
    with pytest.raises(NonFiniteError):
        hzo.backward(model, _failing, x, **options)
    assert _state(model) == before


def test_trace() -> None:
    model, x = Drawing(), torch.randn(6, 4)
    before = _state(model)
    hzo.trace(model, x)
    assert _state(model) == before


@pytest.mark.parametrize("options", PLANS)
def test_a_step_moves_them_as_a_call_does(options: dict[str, Any]) -> None:
    model, x = Drawing(), torch.randn(6, 4)
    hzo.trace(model, x)

    def after(step: Callable[[], object]) -> list[Any]:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        model.python.seed(1), model.torch_generator.manual_seed(1), model.old[0].seed(1)
        model.numpy["new"], model.moved.data = np.random.default_rng(1), torch.zeros(4)
        step()
        return _state(model)[:-1]

    plain = after(lambda: model(x))
    assert after(lambda: hzo.backward(model, lambda out: out.square().mean(), x, **options)) == plain


def test_two_point_estimates_draw_the_same_numbers() -> None:
    """SPSA's loss up and its loss down differ by the perturbation alone, whatever generator the model draws from."""
    torch.manual_seed(0)
    model, x = Drawing(replaces=False).double(), torch.randn(6, 4, dtype=torch.float64)
    seen: list[Tensor] = []

    def loss(output: Tensor) -> Tensor:
        seen.append(output.detach().clone())
        return output.square().mean()

    hzo.baselines.spsa(model, loss, x, mu=1e-6)
    assert len(seen) >= 2
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=0, atol=1e-4)  # drawn anew they differ by 0.1 and more


@pytest.mark.parametrize("options", PLANS)
def test_a_generator_that_no_module_holds(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)

    class Outside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(x.shape, generator=generator)

    model, x = Outside(4, 4), torch.randn(6, 4)
    before = generator.get_state()
    with pytest.raises(NonFiniteError):
        hzo.backward(model, _failing, x, **options)
    assert torch.equal(generator.get_state(), before)
    hzo.trace(model, x)
    assert torch.equal(generator.get_state(), before)
    hzo.backward(model, lambda out: out.square().mean(), x, **options)
    after = generator.get_state()
    generator.set_state(before)
    model(x)
    assert torch.equal(generator.get_state(), after)


class BoomError(Exception):
    """What the user's own code raises."""


class Holding(nn.Module):
    """A model that changes what it holds, in the way that it is told to, and fails when it is told to."""

    def __init__(self, change: Callable[["Holding", Tensor], object]) -> None:
        super().__init__()
        self.change, self.fails = change, False
        self.layer, self.norm = nn.Linear(4, 4).double(), nn.BatchNorm1d(4).double()
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.number, self.nothing = 0, None
        self.history: list[Any] = [1, 2]
        self.table: dict[str, Any] = {"n": 0, "inner": [torch.zeros(2), {"m": 0}]}
        self.recent: deque[int] = deque([1, 2, 3], maxlen=3)
        self.seen, self.counts = {1, 2}, Counter("a")
        self.space, self.array = SimpleNamespace(k=0, items=[1]), np.zeros(3)
        self.tensor = torch.zeros(3)
        self.register_buffer("statistic", torch.zeros(4).double())
        self.layer.weight.grad = torch.ones(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.layer(x))
        self.change(self, h)
        if self.fails:
            raise BoomError
        return h


CHANGES: dict[str, Callable[[Holding, Tensor], object]] = {
    "a list": lambda m, h: m.history.append(h.detach()),
    "a dict": lambda m, h: m.table.update(n=1, new=2),
    "a list in a dict": lambda m, h: m.table["inner"].append(3),
    "a dict in a list": lambda m, h: m.table["inner"][1].clear(),
    "a tensor in a list": lambda m, h: m.table["inner"][0].add_(1),
    "a deque that is full": lambda m, h: m.recent.append(4),
    "a set": lambda m, h: m.seen.add(3),
    "a counter": lambda m, h: m.counts.update("ab"),
    "an object": lambda m, h: (setattr(m.space, "k", 1), m.space.items.pop()),
    "an array": lambda m, h: m.array.__iadd__(1),
    "a number": lambda m, h: setattr(m, "number", 1),
    "a new attribute": lambda m, h: setattr(m, "fresh", 1),
    "an attribute that goes": lambda m, h: delattr(m, "nothing"),
    "another tensor": lambda m, h: setattr(m, "tensor", h.detach()),
    "a tensor in place": lambda m, h: m.tensor.add_(1),
    "a tensor that gets a history": lambda m, h: m.statistic.add_(h.mean(0)),
    "a buffer": lambda m, h: m.register_buffer("statistic", torch.ones(4)),
    "a new buffer": lambda m, h: m.register_buffer("more", torch.ones(4)),
    "a module": lambda m, h: m.add_module("extra", nn.Identity()),
    "a hook": lambda m, h: m.layer.register_forward_hook(print),
    "a mode": lambda m, h: m.norm.eval(),
    "another parameter": lambda m, h: setattr(m, "frozen", nn.Parameter(torch.zeros(2), requires_grad=False)),
    "weights by .data, behind a view of them": lambda m, h: m.layer.weight.data.mul_(2),
    "which parameters are trained": lambda m, h: m.layer.weight.requires_grad_(False),
    "gradients that are there": lambda m, h: m.zero_grad(),
    "gradients in place": lambda m, h: m.zero_grad(set_to_none=False),
    "an attribute of a layer": lambda m, h: setattr(m.norm, "momentum", 0.5),
}


def _held(value: Any) -> Any:
    """What a module holds, tensors by what they are and hold, in a form that can be compared."""
    if isinstance(value, nn.Module):
        return {name: _held(inner) for name, inner in vars(value).items() if not name.startswith("_hzo")}
    if isinstance(value, Tensor):
        return id(value), value.tolist(), value.requires_grad, value.is_leaf, _held(value.grad) if value.is_leaf else 0
    if isinstance(value, dict):
        return {key: _held(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_held(inner) for inner in value]
    if isinstance(value, SimpleNamespace):
        return _held(vars(value))
    return repr(value)


@pytest.mark.parametrize("options", [None, *PLANS], ids=["record", "no plan", "bisect"])
@pytest.mark.parametrize("failure", ["in the model", "in the loss", "not finite"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_failed_step_leaves_what_modules_hold(
    change: Callable[[Holding, Tensor], object], failure: str, options: dict[str, Any] | None
) -> None:
    """Whatever fails, and where; afterwards the step can be taken as if nothing had been."""
    model, x = Holding(change).eval() if options else Holding(change), torch.randn(6, 4).double()

    def loss(output: Tensor) -> Tensor:
        if failure == "in the loss":
            raise KeyboardInterrupt
        return output.square().mean() * (float("nan") if failure == "not finite" else 1)

    def step() -> None:
        if options is None:
            with hzo.record() as tape:
                value = loss(model(x))
            tape.backward(value)
        else:
            hzo.backward(model, loss, x, **options)

    model.fails = failure == "in the model"
    before = _held(model)
    with pytest.raises((BoomError, KeyboardInterrupt, HzoError)):
        step()
    assert _held(model) == before


def test_the_loss_is_put_back() -> None:
    """A loss that is an object, or a method of one, counts its calls like a model."""

    class Counting:
        def __init__(self) -> None:
            self.calls, self.seen = 0, [0]

        def __call__(self, output: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(1)
            return output.sum() * float("nan")

    for options in PLANS:
        for method in (False, True):
            loss = Counting()
            with pytest.raises(NonFiniteError):
                hzo.backward(nn.Linear(4, 1), loss.__call__ if method else loss, torch.randn(3, 4), **options)
            assert (loss.calls, loss.seen) == (0, [0])


def test_a_recording_that_failed_is_not_swept_again() -> None:
    """What its code changed was put back: the gradient of another loss would be one of a step that never was."""
    model, x = nn.BatchNorm1d(4), torch.randn(6, 4)
    before = model.running_mean.clone()
    with hzo.record() as tape:
        loss = model(x).square().mean()
        bad = loss * float("nan")
    with pytest.raises(InputError):  # an argument that is wrong does not end the step
        tape.backward(3.0)
    with pytest.raises(NonFiniteError):
        tape.backward(bad, retain_graph=True)
    assert torch.equal(model.running_mean, before)
    with pytest.raises(TapeError, match="record it again"):
        tape.backward(loss)


def test_a_recording_that_gave_a_gradient_stays() -> None:
    """The step has taken place, whatever another loss of it is."""
    model, x = nn.BatchNorm1d(4), torch.randn(6, 4)
    with hzo.record() as tape:
        loss = model(x).square().mean()
        bad = loss * float("nan")
    tape.backward(loss, retain_graph=True)
    after = model.running_mean.clone()
    with pytest.raises(NonFiniteError):
        tape.backward(bad)
    assert torch.equal(model.running_mean, after)
    assert after.any()


def test_parameters_that_are_frozen_since_they_were_used_get_no_gradient() -> None:
    """As for autograd, which asks when it would add to ``.grad``."""
    model = nn.Linear(4, 1)
    with hzo.record() as tape:
        loss = model(torch.randn(3, 4)).square().mean()
    model.bias.requires_grad_(False)
    tape.backward(loss)
    assert model.bias.grad is None
    assert model.weight.grad is not None

"""A step that fails, and a trace, leave every source of random numbers and every parameter's memory as it was."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hzo
from hzo.errors import NonFiniteError


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

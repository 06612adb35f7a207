"""What a gradient by a plan holds: activations of a path, and gradients in the memory that becomes ``.grad``."""

import pytest
import torch
from torch import nn

import hzo
from hzo.execution.counting import count_queries
from hzo.plans.memory import stored
from hzo.rules import base
from hzo_lab.records import peak_of

WIDTH, DEPTH, BATCH = 128, 16, 32


def problem(dtype):
    torch.manual_seed(0)
    layers = (layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    model = nn.Sequential(*layers).to(dtype)
    x = torch.randn(BATCH, WIDTH, dtype=dtype)
    chain = hzo.trace(model, x)
    return model, chain, x, stored(chain.traced, hzo.plan(chain), "path")


def loss_fn(output):
    return output.float().square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_held_once(dtype):
    model, chain, x, plan = problem(dtype)
    hzo.backward(chain, loss_fn, x, plan=plan)  # whatever is made once
    model.zero_grad()
    peak = peak_of(lambda: hzo.backward(chain, loss_fn, x, plan=plan))
    size = torch.finfo(dtype).bits // 8
    gradients, layer = DEPTH * (WIDTH + 1) * WIDTH * size, WIDTH * WIDTH * 4  # in float32
    assert peak <= gradients + plan.activation_bytes + 8 * layer  # a few of one layer at once: probe, weight, gradient
    assert peak <= 1.75 * gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_gradients_there_already_an_error_changes_nothing(dtype):
    """What is found is added behind the sweep; a hook of the first layer's weight fails, the last that is reached."""
    model, chain, x, plan = problem(dtype)
    hzo.backward(chain, loss_fn, x, plan=plan)
    before = [p.grad.clone() for p in model.parameters()]

    def fails(_):
        raise RuntimeError("no")

    handle = model[0].weight.register_hook(fails)
    with pytest.raises(RuntimeError, match="no"):
        hzo.backward(chain, loss_fn, x, plan=plan)
    handle.remove()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    hzo.backward(chain, loss_fn, x, plan=plan)
    for p, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, 2 * b, rtol=2e-2, atol=0)


def test_a_gradient_is_taken_once():
    """Each layer has one rule for its input, one for its weight and one for its bias, and none of them runs twice."""
    _, chain, x, plan = problem(torch.float32)
    calls = []
    addmm = torch.ops.aten.addmm.default

    rule = base.rules[addmm]
    counted = base.Rule(lambda call: calls.append([k for k in range(3) if call.needs(k)]) or rule.vjp(call), True, True)
    base.rules[addmm] = counted
    try:
        with count_queries():
            hzo.backward(chain, loss_fn, x, plan=plan)
    finally:
        base.rules[addmm] = rule
    asked = [key for keys in calls for key in keys]
    assert sorted(asked) == sorted([0, 2] * DEPTH + [1] * (DEPTH - 1))

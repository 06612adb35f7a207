"""Simulated analog tiles: noise that a plan has to reckon with, or draws that a query repeats."""

import pytest
import torch
from aihwkit.nn import AnalogLinear
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType

import analog_chain
import hzo


@pytest.mark.parametrize("target", [0.9, 0.97])
def test_chain_of_tiles_reaches_its_target_cosine(target):
    found = analog_chain.reached(target, seed=0)
    assert found["expected"] >= target
    assert found["measured"] >= target - 0.03
    assert abs(found["measured"] - found["expected"]) <= 0.03


def noisy_tile() -> AnalogLinear:
    """Linear, but for noise at its output."""
    config = TorchInferenceRPUConfig()
    forward = config.forward
    forward.inp_res = forward.out_res = -1
    forward.inp_bound = forward.out_bound = 0
    forward.out_noise = 0.1
    forward.noise_management, forward.bound_management = NoiseManagementType.NONE, BoundManagementType.NONE
    return AnalogLinear(16, 8, bias=False, rpu_config=config).requires_grad_(False)


def errors(noise: hzo.Noise | None) -> list[float]:
    """Relative errors of backward passes through the same forward pass's noise."""
    torch.manual_seed(0)
    tile = noisy_tile()
    x, g = torch.randn(8, 16, requires_grad=True), torch.randn(8, 8)
    exact = g @ tile.get_weights()[0]
    box = hzo.blackbox(tile.forward, parameters="ignored", noise=noise)
    found = []
    for _ in range(3):
        torch.manual_seed(1)
        (gradient,) = torch.autograd.grad(box(x), x, g)
        found.append(float((gradient - exact).norm() / exact.norm()))
    return found


def test_tiles_noise_is_that_of_the_forward_pass_unless_declared():
    """Noise added to the output is a constant of the function that the forward pass realised."""
    assert max(errors(noise=None)) <= 1e-3


def test_declared_noise_is_drawn_anew_in_every_query():
    found = errors(noise=hzo.Noise(process=0.1))
    assert min(found) > 1e-2
    assert len(set(found)) == len(found)  # the seed of the forward pass does not decide it

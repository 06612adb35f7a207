"""Simulators in networks: each example learns more than its floor, and its box has the gradient that others find."""

import re
import shutil
from types import ModuleType

import pytest
import torch
from torch import Tensor

import hodgkin_huxley
import hzo

pytest.importorskip("pennylane", reason="PennyLane, Perceval and MuJoCo need Python 3.11")

import pendulum
import photonic
import quantum
import simulators
import spice

needs_ngspice = pytest.mark.skipif(shutil.which("ngspice") is None, reason="needs ngspice: apt-get install ngspice")


@pytest.mark.parametrize(
    "example",
    [hodgkin_huxley, photonic, quantum, pytest.param(spice, marks=needs_ngspice), pendulum],
    ids=lambda e: e.__name__,
)
def test_example_learns_more_than_the_floor(example: ModuleType, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["example", "--quick"])
    example.main()
    found = [float(number) for number in re.findall(r"([\d.]+) %", capsys.readouterr().out)]
    if example is pendulum:  # the floor comes first
        found.reverse()
    assert found[0] > found[-1]


def agreement(part, trusted: simulators.Vjp, *inputs: Tensor) -> float:
    """The cosine of a box's gradient to a trusted one."""
    given = tuple(x.clone().requires_grad_() for x in inputs)
    y = part(*given)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    found = torch.cat([t.flatten() for t in torch.autograd.grad(y, given, g)]).double()
    exact = torch.cat([t.flatten() for t in trusted(inputs, g)]).double()
    return float(found @ exact / (found.norm() * exact.norm()))


def test_neurons_are_those_of_hodgkin_and_huxley():
    torch.manual_seed(0)
    x = torch.randn(64, hodgkin_huxley.NEURONS, dtype=torch.float64)
    twin = simulators.Equations()
    torch.testing.assert_close(torch.as_tensor(hodgkin_huxley.potentials(x.numpy())), twin(x), rtol=1e-9, atol=1e-9)
    box = hzo.blackbox(hodgkin_huxley.potentials, numpy=True, elementwise=True, batched=64, state=None)
    assert agreement(box, simulators.of_twin(twin), x) > 0.9999


def test_photons_are_counted_as_the_twin_says():
    torch.manual_seed(0)
    x = 2 * torch.randn(6, len(photonic.chip.get_parameters()), dtype=torch.float64)
    assert float((torch.as_tensor(photonic.counts(x.numpy())) - simulators.Photons()(x)).abs().mean()) < 0.3
    box = photonic.network(0)[1]
    assert agreement(box, simulators.of_twin(simulators.Photons()), x.float()) > 0.6


def test_spins_have_the_gradient_of_the_circuit_without_shots():
    torch.manual_seed(0)
    x = torch.randn(16, quantum.LAYERS * quantum.QUBITS)
    exact = simulators.of_twin(simulators.exact_spins)
    assert agreement(quantum.network(0)[1], exact, x) > 0.8
    assert agreement(simulators.Own(quantum.measured, simulators.parameter_shift), exact, x) > 0.8


@needs_ngspice
def test_operating_points_have_the_gradient_of_small_signals():
    torch.manual_seed(0)
    x = torch.randn(5, spice.INPUTS)
    box = hzo.blackbox(spice.operating_points, numpy=True)
    assert agreement(box, simulators.transfer, x) > 0.9999


def test_a_step_of_physics_has_the_gradient_of_mujocos_differences():
    x, action = pendulum.starts(8, 0), torch.linspace(-1, 1, 8)[:, None]
    box = hzo.blackbox(pendulum.step, numpy=True, state=None)
    assert agreement(box, simulators.transition, x, action) > 0.9999

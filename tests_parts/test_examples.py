"""Each example runs and learns more than its floor, and its part has the gradient that it should have."""

import re
from types import ModuleType

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import analog
import hzo
import onnx_middle
import quantized
import spiking
import subprocess_simulator
from interferometer import PHASES
from real_parts import Interferometer


def printed(example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """What the example says in percent, in its order."""
    monkeypatch.setattr("sys.argv", ["example", "--quick"])
    example.main()
    return [float(found) for found in re.findall(r"([\d.]+) %", capsys.readouterr().out)]


def gradients(part: nn.Module, inputs: tuple[Tensor, ...], *cotangents: Tensor | None) -> tuple[Tensor, ...]:
    """Of the inputs, from a cotangent for each output; None where an output gets none."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    outputs = part(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((g * y).sum() for g, y in zip(cotangents, outputs, strict=True) if g is not None)
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("example", [spiking, quantized, onnx_middle, subprocess_simulator], ids=lambda e: e.__name__)
def test_example_learns_more_than_the_floor(example, monkeypatch, capsys):
    found = printed(example, monkeypatch, capsys)
    assert found[0] > found[-1]  # the last line is that of the last layer alone


def test_analog_example_recovers_what_the_chip_loses(monkeypatch, capsys):
    digital, programmed, trained = printed(analog, monkeypatch, capsys)
    assert programmed < trained
    assert programmed < digital


@pytest.mark.parametrize(("low", "high"), [(-4, 3), (0, 7)])
def test_fake_quantization_has_the_gradient_of_straight_through(low, high):
    torch.manual_seed(0)
    inside = low + (high - low) * torch.rand(16, 8)
    beyond = 0.5 + torch.rand(16, 8)
    outside = torch.where(torch.rand(16, 8) < 0.5, low - beyond, high + beyond)
    g = torch.randn(16, 8)
    for x in (inside, outside):
        measured, assumed = (gradients(quantized.rounding(how, low, high), (x,), g) for how in ("hzo", "other"))
        torch.testing.assert_close(measured, assumed)


class BoxCar(torch.autograd.Function):
    """A Heaviside step whose derivative is taken to be that of a ramp of width 2h: the surrogate of a query at ±h."""

    @staticmethod
    def forward(ctx, x: Tensor, h: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.h = h
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return g * (x.abs() < ctx.h) / (2 * ctx.h), None


def neuron(current: Tensor, membrane: Tensor) -> tuple[Tensor, Tensor]:
    """snnTorch's leaky neuron, which resets a step after its spike, with box-car surrogates."""
    reset = BoxCar.apply(membrane - 1, spiking.STEP)
    membrane = spiking.DECAY * membrane + current - reset
    return BoxCar.apply(membrane - 1, spiking.STEP), membrane


def test_spiking_box_has_the_gradient_of_a_box_car_surrogate():
    torch.manual_seed(0)
    current, membrane = torch.randn(64, 32), 1 + 2 * torch.randn(64, 32)
    g, cotangent = torch.randn(64, 32), torch.randn(64, 32)
    box = spiking.neurons("hzo")
    assert (membrane > 1).any()
    torch.testing.assert_close(box(current, membrane), neuron(current, membrane))

    # The membrane is linear in the current, and no reset depends on it.
    measured, assumed = (gradients(f, (current, membrane), g, cotangent)[0] for f in (box, neuron))
    torch.testing.assert_close(measured, assumed)
    assert measured.ne(cotangent).any()

    # The next membrane as a function of this one: a decay and a reset.
    measured, assumed = (gradients(f, (current, membrane), None, cotangent)[1] for f in (box, neuron))
    torch.testing.assert_close(measured, assumed)
    assert measured.ne(spiking.DECAY * cotangent).any()


def test_spiking_box_is_the_secant_of_snntorchs_neuron():
    """Through spike and reset together a surrogate multiplies two slopes; the box takes that of the whole."""
    torch.manual_seed(1)
    current, membrane, g = torch.randn(64, 32), 1 + 2 * torch.randn(64, 32), torch.randn(64, 32)
    leaky, h = snn.Leaky(spiking.DECAY, surrogate_disable=True), spiking.STEP
    expected = g * (leaky(current, membrane + h)[0] - leaky(current, membrane - h)[0]) / (2 * h)
    measured = gradients(spiking.neurons("hzo"), (current, membrane), g, None)[1]
    torch.testing.assert_close(measured, expected)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def test_onnx_box_has_the_gradient_of_its_twin():
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh()).requires_grad_(False)
    box = onnx_middle.black_box(onnx_middle.exported(twin))
    x, g = torch.randn(32, 16), torch.randn(32, 16)
    torch.testing.assert_close(box(x), twin(x))
    assert relative_error(*gradients(box, (x,), g), *gradients(twin, (x,), g)) <= 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
def test_simulator_has_the_gradient_of_its_twin(dtype, tolerance):
    torch.manual_seed(0)
    box = next(m for m in subprocess_simulator.network(0).modules() if isinstance(m, hzo.BlackBox))
    x, g = torch.randn(16, PHASES, dtype=dtype), torch.randn(16, 8, dtype=dtype)
    torch.testing.assert_close(box(x), Interferometer()(x))
    assert relative_error(*gradients(box, (x,), g), *gradients(Interferometer(), (x,), g)) <= tolerance

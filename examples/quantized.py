"""A network of 3-bit weights and activations by PyTorch's fake quantization, trained through the rounding.

Rounding has no slope. Asked half a quantum above and half below, it answers with one quantum inside its range and with
none outside: measured, this is the slope that straight-through estimation postulates.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

import hzo
from digits import compare, last_layer_only, options

WIDTH, BITS = 64, 3


def rounding(how: str, low: int, high: int) -> Callable[[Tensor], Tensor]:
    f = partial(torch.fake_quantize_per_tensor_affine, scale=1.0, zero_point=0, quant_min=low, quant_max=high)
    return hzo.blackbox(f, elementwise=True, step=0.5) if how == "hzo" else f  # PyTorch's own is straight-through


class Quantized(nn.Module):
    """ReLU and a linear layer, whose activations and weights are whole multiples of two quanta, learned."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        largest = 2 ** (BITS - 1)
        self.quanta = nn.Parameter(torch.tensor([2.5 * self.layer.weight.std().item() / largest, 0.2]))
        self.round_weight = rounding(how, -largest, largest - 1)
        self.round_activation = rounding(how, 0, 2 * largest - 1)

    def forward(self, x: Tensor) -> Tensor:
        weight, activation = self.quanta
        inputs = activation * self.round_activation(relu(x) / activation)
        return linear(inputs, weight * self.round_weight(self.layer.weight / weight), self.layer.bias)


def network(how: str, seed: int) -> nn.Module:
    """Two quantized layers between a first and a last one of full precision."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, WIDTH), Quantized(how), Quantized(how), nn.ReLU(), nn.Linear(WIDTH, 10))


def main() -> None:
    given = options(__doc__)
    models = {how: network(how, given.seed) for how in ("hzo", "straight-through")}
    models["last layer only"] = last_layer_only(network("hzo", given.seed))
    compare(models, epochs=30, lr=5e-3, given=given)


if __name__ == "__main__":
    main()

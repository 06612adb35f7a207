"""A network on IBM's analog tiles (aihwkit), trained in the loop by forward passes through the noisy chip.

Programming errs five times as usual, reads are noisy, layers narrow: the last layer alone does not win all back.
"""

import torch
from aihwkit.inference import PCMLikeNoiseModel
from aihwkit.nn import AnalogLinear
from aihwkit.optim import AnalogAdam
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import BoundManagementType, WeightClipType
from torch import Tensor, nn

import hzo
from digits import accuracy, options, train

CHIP = TorchInferenceRPUConfig(noise_model=PCMLikeNoiseModel(prog_noise_scale=5.0))
CHIP.mapping.weight_scaling_omega = 1.0  # the largest weight takes the largest conductance, and none a larger one
CHIP.clip.type, CHIP.clip.fixed_value = WeightClipType.FIXED_VALUE, 1.0
CHIP.forward.out_noise, CHIP.forward.inp_res, CHIP.forward.out_res = 0.2, 1 / (2**6 - 2), 1 / (2**6 - 2)
CHIP.forward.bound_management = BoundManagementType.NONE  # it would let samples of a batch influence each other
STEP = 2.0  # far, for the noise: a tile is linear but for its converters


class Tile(nn.Module):
    """A layer on the chip: its input's cotangent is measured there, that of its weights is activation × cotangent."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.tile = AnalogLinear.from_digital(layer, CHIP).eval().analog_module
        self.tile.program_weights()
        self.tile.analog_ctx.requires_grad_(False)  # no weight: aihwkit's note of which tile it is, as large as one
        self.chip = hzo.blackbox(self.tile.forward, parameters="ignored", step=STEP, noise="measured")

    def forward(self, x: Tensor) -> Tensor:
        local = self.tile.get_scales() * nn.functional.linear(x.detach(), self.tile.tile.weight) + self.tile.bias
        return self.chip(x) + local - local.detach()  # adds nothing, and gives conductances and bias their gradient


def digital(seed: int, split: str = "train") -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [module for inputs in (64, 32, 32) for module in (nn.Linear(inputs, 32), nn.ReLU())]
    return train(nn.Sequential(*hidden, nn.Linear(32, 10)), epochs=40, lr=3e-3, seed=seed, split=split)


def on_chip(model: nn.Sequential, tile: type[nn.Module] = Tile) -> nn.Sequential:
    return nn.Sequential(*(tile(m) if isinstance(m, nn.Linear) else m for m in model[:-1]), model[-1])  # it is digital


def main() -> None:
    given = options(__doc__)
    model = digital(given.seed)
    chip = on_chip(model)
    print(f"digital {accuracy(model):.1f} %, on the chip {accuracy(chip, reads=10):.1f} %")
    train(chip, 1 if given.quick else 10, lr=1e-2, seed=given.seed, optimizer=AnalogAdam)
    print(f"trained on the chip {accuracy(chip, reads=10):.1f} %")


if __name__ == "__main__":
    main()

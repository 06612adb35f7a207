"""Eight analog tiles (aihwkit) in a row as one black box: does a plan with measured noise reach its target cosine?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from aihwkit.nn import AnalogLinear
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from torch import Tensor, nn

import hzo
from common import cosine

TILES, WIDTH, BATCH, PASSES = 8, 32, 32, 3


def chip() -> TorchInferenceRPUConfig:
    """Reads with noise of 0.04, converters of 8 bits; aihwkit's defaults for all else."""
    config = TorchInferenceRPUConfig()
    config.forward.out_noise, config.forward.inp_res, config.forward.out_res = 0.04, 1 / 256, 1 / 256
    return config


def tiles() -> list[AnalogLinear]:
    """Programmed with random orthogonal matrices."""
    found = []
    for _ in range(TILES):
        tile = AnalogLinear(WIDTH, WIDTH, bias=False, rpu_config=chip())
        tile.set_weights(torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0])
        found.append(tile.requires_grad_(False))
    return found


def residual(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x + 0.5 * torch.tanh(layer(x))


def ideal(tile: AnalogLinear) -> nn.Linear:
    """What a tile would do without noise and converters, with the weights that were programmed."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    layer.weight.data = tile.get_weights()[0]
    return layer


def through(x: Tensor, chain: Sequence[Callable[[Tensor], Tensor]], cotangent: Tensor) -> Tensor:
    """The cotangent of ``x``."""
    y = x
    for part in chain:
        y = part(y)
    return torch.autograd.grad(y, x, cotangent)[0]


def reached(target: float, seed: int) -> dict[str, Any]:
    """The cosine that was asked for, the one that the plan expects, and the mean of some backward passes, each against
    the exact gradient of the ideal chain. The tree: of each node its first and its last boundary, and its repeats."""
    torch.manual_seed(seed)
    chain = tiles()
    x, cotangent = torch.randn(BATCH, WIDTH, requires_grad=True), torch.randn(BATCH, WIDTH)
    exact = through(x, [residual(ideal(tile)) for tile in chain], cotangent)
    box = hzo.blackbox([residual(t) for t in chain], noise="measured", target_cosine=target)
    through(x, [box], cotangent)  # calibrates
    measured = []
    for _ in range(PASSES):
        with hzo.count_queries() as count:
            measured.append(cosine(through(x, [box], cotangent), exact))
    plan = box.plan_for(x)
    assert plan.expected is not None
    return {
        "target": target,
        "seed": seed,
        "expected": plan.expected.cosine,
        "measured": statistics.mean(measured),
        "runs": measured,
        "forward_equivalents": count.forward_equivalents,
        "tree": [[node.target, node.source, node.repeats] for node in plan.nodes if node.operations],
    }

"""Noise of forward passes: what kinds there are, how large they are, and a source that adds them for experiments.

*Readout* noise is added once to every element that a query returns (a converter, a sensor). *Process* noise is added
by every stage to what it hands on, inside queries and in the base pass alike (an analog tile). Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from sys import float_info

import torch
from torch import Tensor

from hzo.errors import InputError

Level = float | tuple[float, ...]


@dataclass(frozen=True)
class Noise:
    """How noisy the hardware or simulator behind a network is, so that plans can average the noise away.

    Standard deviations of additive noise, in units of the activations: one for all stages, or one for each.

    Raises:
        InputError: a level that is negative or not finite.
    """

    readout: Level = 0.0
    process: Level = 0.0

    def __post_init__(self) -> None:
        for name in ("readout", "process"):
            level = getattr(self, name)
            levels = tuple(level) if isinstance(level, Sequence) else level
            each = levels if isinstance(levels, tuple) else (levels,)
            for std in each:
                if isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 <= std <= float_info.max:
                    raise InputError(f"expected {name} noise to be a standard deviation ≥ 0, got {repr(std)[:60]}")
            object.__setattr__(self, name, levels)

    def readout_of(self, stage: int) -> float:
        """What is added to values that are read behind this stage."""
        return _of(self.readout, stage)

    def process_of(self, stage: int) -> float:
        """What this stage adds to what it hands on."""
        return _of(self.process, stage)

    @property
    def present(self) -> bool:
        """Whether there is any noise at all."""
        return any(
            std > 0
            for level in (self.readout, self.process)
            for std in (level if isinstance(level, tuple) else (level,))
        )

    def for_stages(self, count: int) -> Noise:
        """Itself, if it fits a chain of so many stages.

        Raises:
            InputError: levels for another number of stages.
        """
        for name in ("readout", "process"):
            level = getattr(self, name)
            if isinstance(level, tuple) and len(level) != count:
                raise InputError(f"expected one {name} noise or one for each of {count} stages, got {len(level)}")
        return self


def as_noise(noise: float | Noise | None) -> Noise | None:
    """A number stands for readout noise of all stages."""
    return noise if isinstance(noise, Noise) or noise is None else Noise(readout=noise)


def _of(level: Level, stage: int) -> float:
    return level[stage] if isinstance(level, tuple) else level


class NoiseSource:
    """Adds Gaussian noise to tensors; numbers of its own, so that the model's random state does not move."""

    def __init__(self, noise: Noise, seed: int) -> None:
        self.noise = noise
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def read(self, tensor: Tensor, stage: int) -> Tensor:
        """What is seen of a tensor that is read behind a stage."""
        return self._added(tensor, self.noise.readout_of(stage))

    def processed(self, tensor: Tensor, stage: int) -> Tensor:
        """What a stage really hands on."""
        return self._added(tensor, self.noise.process_of(stage))

    def _added(self, tensor: Tensor, std: float) -> Tensor:
        if not std or not tensor.is_floating_point():
            return tensor
        if tensor.device not in self._generators:
            self._generators[tensor.device] = torch.Generator(tensor.device).manual_seed(self.seed)
        # Drawn in float32 at least: a chip's noise does not know the dtype that carries its results.
        wide = torch.promote_types(tensor.dtype, torch.float32)
        drawn = torch.randn(tensor.shape, generator=self._generators[tensor.device], dtype=wide, device=tensor.device)
        return (tensor + std * drawn).to(tensor.dtype)

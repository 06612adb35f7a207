"""The derivative of a loss along a direction, by a gradient and by the loss itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

_TOLERANCE = 5.0  # times the error bar of a direction


@dataclass(frozen=True)
class Slope:
    """The derivative of the loss along one direction, twice.

    Attributes:
        direction: in words. expected: by the gradient, ⟨g, v⟩. measured: by the loss at both sides.
        error: what rounding and curvature leave uncertain of the measured one.
    """

    direction: str
    expected: float
    measured: float
    error: float

    @property
    def ratio(self) -> float:
        """Expected over measured; 1 for a right gradient."""
        return self.expected / self.measured if self.measured else (1.0 if self.expected == 0 else inf)

    @property
    def agrees(self) -> bool:
        """Whether the two differ by no more than the measurement explains."""
        return abs(self.expected - self.measured) <= _TOLERANCE * self.error

    def __str__(self) -> str:
        verdict = "agrees" if self.agrees else "DISAGREES"
        return (
            f"{self.direction}: gradient {self.expected:.6g}, loss {self.measured:.6g} ± {self.error:.1g}, "
            f"ratio {self.ratio:.6f}: {verdict}"
        )


def measured_slope(name: str, expected: float, loss: Callable[[float], float], step: float, unit: float) -> Slope:
    """Measure along a direction: two central differences, whose difference tells the error.

    Args:
        loss: by how many steps along the direction. step: its length. unit: relative rounding of the loss.
    """
    values = {k: loss(k * step) for k in (1.0, -1.0, 0.5, -0.5)}
    near, far = (values[0.5] - values[-0.5]) / step, (values[1.0] - values[-1.0]) / (2 * step)
    rounding = 4 * unit * max(abs(v) for v in values.values()) / step
    # Rounding of the loss is seldom one unit: it adds up over the network, which the two differences show.
    return Slope(name, expected, near + (near - far) / 3, abs(near - far) + rounding)

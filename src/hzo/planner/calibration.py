"""What is known of a chain beyond its shapes: gains, scales, curvature, noise, rounding and seconds.

Numbers only: ``hzo.calibrate`` (measurement/) measures them by forward passes, planner and error model read them.
Without a measurement a chain is taken to be *unitary*: cotangents neither grow nor shrink, activations and their third
derivatives are of size one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import finfo

from hzo.noise import Noise
from hzo.tracing import Graph


@dataclass(frozen=True)
class Bend:
    """How the squared relative error of one edge grows with the step h: ``size · h**power`` (4 where smooth).

    ``reach``: the source that it was measured from; a part of that way is taken to be linear.
    """

    size: float
    power: float
    reach: int


@dataclass(frozen=True)
class Seconds:
    """How long the parts of a gradient take on this machine, as ``hzo.calibrate`` measured them.

    Attributes:
        edges: of the estimate of a value at a target from the nearest source, for the batch, by target, source, value.
        operations: of every operation inside a query, for one sample.
        decoding: of one element of a result that a query returns: differences, products and sums.
        rules: of all parameter rules. fixed: of the base pass, the loss and what else does not depend on the plan.
    """

    edges: dict[tuple[int, int, int], float]
    operations: tuple[float, ...]
    decoding: float
    rules: float
    fixed: float


@dataclass(frozen=True)
class Calibration:
    """What ``hzo.calibrate`` measured of a network on one batch, from which plans predict their errors and seconds.

    Attributes:
        fingerprint: of the chain.
        norms: squared norm of the cotangent, by position and value, relative to that at the output.
        transport: error amplification, by position: the growth of an estimate's squared error on its way back from the
            output, over that of the squared cotangent.
        scales: root mean square of the activation, by value.
        bends: curvature error by position and value: of the edge that ends there and starts at the next measured
            position.
        noise: measured, for each stage. None: every query is deterministic.
        rounding: standard deviation of what rounding adds to the results of each stage.
        parameters: by name, how much larger the squared relative error of the parameter's gradient is than that of the
            cotangent which it is made of (samples whose errors are independent average out, or their signals do).
        seconds: None where no time was taken.
    """

    fingerprint: str
    norms: dict[tuple[int, int], float]
    transport: dict[int, float]
    scales: dict[int, float]
    bends: dict[tuple[int, int], Bend]
    noise: Noise | None
    rounding: tuple[float, ...]
    parameters: dict[str, float] = field(default_factory=dict)
    seconds: Seconds | None = None

    def __hash__(self) -> int:
        # Equal ones are equal in all fields; the dicts among them have no hash of their own.
        return hash((self.fingerprint, self.rounding))

    def __repr__(self) -> str:
        sizes = [norm**0.5 for (position, _), norm in self.norms.items() if position > 0]
        low, high = (min(sizes), max(sizes)) if sizes else (1.0, 1.0)
        noise = "every query is deterministic"
        if self.noise is not None:
            stages = range(len(self.rounding))
            readout = max(self.noise.readout_of(k) for k in stages)
            process = max(self.noise.process_of(k) for k in stages)
            noise = f"readout noise up to {readout:.2g}, process noise up to {process:.2g}"
        time = "no times" if self.seconds is None else "with times"
        return (
            f"<Calibration of a chain of {len(self.rounding)} stages: cotangents {low:.3g} to {high:.3g} times that at "
            f"the output, {noise}, {time}>"
        )


def unitary(graph: Graph, scheme: str) -> Calibration:
    """The calibration of a chain about which nothing is known; see the top of the file. Source: paper (its unitary
    limit) for gains of one, ours for the rest."""
    norms = {}
    for position in range(len(graph.operations) + 1):
        alive = [v for v in graph.live[position] if graph.values[v].floating]
        norms.update({(position, v): 1 / len(alive) for v in alive})
    # A Taylor series with unit derivatives: h²/6 is lost by central differences, h/2 by forward ones.
    size, power = (1 / 36, 4.0) if scheme == "central" else (1 / 4, 2.0)
    return Calibration(
        fingerprint=graph.fingerprint,
        norms=norms,
        transport={},
        scales={value.index: 1.0 for value in graph.values},
        bends={
            (position, v): Bend(size, power, stage.stop)
            for stage in graph.stages
            for position in range(stage.start, stage.stop)
            for v in graph.live[position]
            if graph.values[v].floating
        },
        noise=None,
        rounding=tuple(_rounding(graph, k) for k in range(len(graph.stages))),
    )


def _rounding(graph: Graph, stage: int) -> float:
    """Of results of size one: uniform over a unit in the last place."""
    found = [
        graph.values[v].dtype
        for op in graph.operations[graph.stages[stage].start : graph.stages[stage].stop]
        for v in op.writes
        if graph.values[v].floating
    ]
    return max((finfo(dtype).eps for dtype in found), default=0.0) / 12**0.5

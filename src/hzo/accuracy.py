"""How wrong an estimate will be: the one error model that planner, plan and documentation share.

A node that estimates g_i from g_j by D directions with step h adds the squared relative error (central differences)

    D (ρ_j + Σ π_s) / (2 h² r ‖g_i‖²)  +  Σ bend  +  D Σ κ_s / (2 h² ‖g_i‖²)

with ρ_j = σ²‖g_j‖² for readout noise at the source, π_s = σ_s²‖g_s‖² for the process noise of every stage s of the
segment, κ_s likewise for rounding, and r repeats, which help against noise alone. Forward differences have four times
the noise, half of it from the stored result, which no repeat changes. Errors of the cotangents that a node starts from
are carried over: 1 + E_i = (1 + τ E_j)(1 + η), with τ how much more errors grow on the way than the cotangent does. A
cosine is 1/√(1 + E). Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from hzo.adjoints.affine import impulse_size
from hzo.calibration import Calibration
from hzo.differences import Scheme
from hzo.graph import Graph
from hzo.noise import Noise
from hzo.plan import Node


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """What the formula needs, for all positions of a chain at once; float64 tensors of (positions,) unless said.

    Attributes:
        gain: squared norm of all cotangents at a position. scale: root mean square of the activities there.
        readout: ρ. process: running sum of π over the stages that end before or at a position.
        rounding, rounded: running sums of κ over the stages before that of the operation at a position, and up to that
            of the operation before it: a part of a stage is taken to round as much as the whole.
        bend, power: of the hop that starts at a position. outer: whether that is a stage boundary.
        transport: how much more errors have grown from the output to a position than cotangents have.
        calibration: what all this was made from.
    """

    scheme: Scheme
    noise: Noise
    calibration: Calibration
    gain: Tensor
    scale: Tensor
    readout: Tensor
    process: Tensor
    rounding: Tensor
    rounded: Tensor
    bend: Tensor
    power: Tensor
    outer: Tensor
    transport: Tensor

    def by_noise(self, spread: Tensor, target: Tensor, source: Tensor, h: Tensor) -> Tensor:
        """η of one repeat that more repeats lower; arguments broadcast. ``spread``: directions D."""
        variance = self.readout[source] + self.process[source] - self.process[target]
        return self._share * spread * variance / (h**2 * self.gain[target])

    def by_measured_adjoint(self, spread: Tensor, target: Tensor, source: Tensor) -> Tensor:
        """η of one measurement of an operation whose adjoint is then applied; no step of the plan plays a part."""
        return spread * self.readout[source] / self.gain[target]

    def lasting(self, spread: Tensor, target: Tensor, source: Tensor, h: Tensor) -> Tensor:
        """η that no repeat lowers, bend apart: rounding, for forward differences the noise of the stored result."""
        variance = self.rounded[source] - self.rounding[target]
        if self.scheme == "forward":
            variance = variance + self.readout[source] + self.process[source] - self.process[target]
        return self._share * spread * variance / (h**2 * self.gain[target])

    def bends(self, targets: Tensor, h: Tensor) -> Tensor:
        """(targets, positions): what curvature adds to an estimate of each target from each position behind it.

        A perturbation is taken to grow along the chain as cotangents grow against it, and stages to bend independently.
        """
        positions = torch.arange(len(self.gain))
        grown = h[:, None] * (self.gain[targets][:, None] / self.gain[None, :]).sqrt()
        hops = (
            self.bend
            * grown**self.power
            * ((positions > targets[:, None]) & self.outer | (positions == targets[:, None]))
        )
        return torch.cat([torch.zeros(len(targets), 1, dtype=hops.dtype), hops.cumsum(1)[:, :-1]], 1)

    def worst_growth(self) -> Tensor:
        """(positions,): growth of errors to each position, where they shrink on no part of the way: what a planner may
        rely on whatever the tree."""
        steps = (self.transport[:-1] / self.transport[1:]).clamp(min=1.0)
        return torch.cat([steps.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=steps.dtype)])

    @property
    def _share(self) -> float:
        return 0.5 if self.scheme == "central" else 1.0


def error_model(graph: Graph, calibration: Calibration, noise: Noise | None, scheme: Scheme) -> ErrorModel:
    """The error model of a chain; a declared noise takes the place of the measured one."""
    noise = noise or calibration.noise or Noise()
    end = len(graph.operations)
    gain, scale, readout = (torch.zeros(end + 1, dtype=torch.float64) for _ in range(3))
    last = 1.0
    for position in range(end, -1, -1):
        alive = [v for v in graph.live[position] if (position, v) in calibration.norms]
        norm = sum(calibration.norms[position, v] for v in alive)
        last = norm if norm > 0 else last  # nothing known, or no influence: as behind it
        gain[position] = last
        # At the output and the input too, all that is alive counts.
        elements = sum(graph.values[v].per_sample for v in alive)
        squares = sum(graph.values[v].per_sample * calibration.scales.get(v, 1.0) ** 2 for v in alive)
        scale[position] = (squares / elements) ** 0.5 if elements and squares else 1.0
        readout[position] = noise.readout_of(graph.stage_of[max(position - 1, 0)]) ** 2 * last
    process = torch.zeros(end + 1, dtype=torch.float64)
    stages = torch.zeros(len(graph.stages) + 1, dtype=torch.float64)
    for k, stage in enumerate(graph.stages):
        process[stage.stop] = noise.process_of(k) ** 2 * gain[stage.stop]
        stages[k + 1] = stages[k] + calibration.rounding[k] ** 2 * gain[stage.stop]
    bend, power = torch.zeros(end + 1, dtype=torch.float64), torch.full((end + 1,), 4.0, dtype=torch.float64)
    for position, found in calibration.bends.items():
        bend[position], power[position] = found.size, found.power
    outer = torch.zeros(end + 1, dtype=torch.bool)
    outer[list(graph.boundaries)] = True
    transport, last = torch.ones(end + 1, dtype=torch.float64), 1.0
    for position in range(end, -1, -1):
        last = transport[position] = calibration.transport.get(position, last)
    return ErrorModel(
        scheme=scheme,
        noise=noise,
        calibration=calibration,
        gain=gain,
        scale=scale,
        readout=readout,
        process=process.cumsum(0),
        rounding=stages[[*graph.stage_of, len(graph.stages)]],
        rounded=stages[[0, *(k + 1 for k in graph.stage_of)]],
        bend=bend,
        power=power,
        outer=outer,
        transport=transport,
    )


def spreads(graph: Graph, node: Node) -> tuple[float, float]:
    """Directions of differences, and what stands in their place where an adjoint is measured by impulses.

    An impulse of height s shows a row of the Jacobian with twice the noise of a reading over s², and there are
    n of them.
    """
    if node.probe.kind != "adjoint":
        return float(node.probe.directions), 0.0
    height = impulse_size(graph.values[node.value].dtype)
    once = node.cost.measurements // max(node.repeats, 1)
    return 0.0, 2.0 * once / height**2


def node_error(model: ErrorModel, graph: Graph, node: Node, step: float | None) -> float:
    """η of a node. ``step``: the distance h of all nodes, for those that have none of their own."""
    spread, measured = (torch.tensor(s, dtype=torch.float64) for s in spreads(graph, node))
    target, source = torch.tensor(node.target), torch.tensor(node.source)
    if not spread:
        return float(model.by_measured_adjoint(measured, target, source)) / node.repeats
    h = step_of(model, node, step)
    lasting = model.lasting(spread, target, source, h) + model.bends(target[None], h[None])[0, node.source]
    return float(model.by_noise(spread, target, source, h) / node.repeats + lasting)


def step_of(model: ErrorModel, node: Node, step: float | None) -> Tensor:
    """The distance that a node steps, as far as it is known before it runs."""
    if node.step is not None:
        return node.step * model.scale[node.target]
    if step is not None:
        return torch.tensor(step, dtype=torch.float64)
    raise AssertionError("a node of a plan for a noise has a step")


def expected_errors(
    model: ErrorModel, graph: Graph, nodes: Sequence[Node], step: float | None
) -> dict[tuple[int, int], float]:
    """The squared relative error E of every estimate, by position and value; nodes in the order in which they run."""
    norms = model.calibration.norms
    found: dict[tuple[int, int], float] = {}
    for node in nodes:
        whole = float(model.gain[node.target])
        size = norms.get((node.target, node.value), 0.0) or whole
        # What is carried over keeps its size; the rest of the cotangent came through the operations.
        carried = min(norms.get((node.source, node.value), 0.0), size) if node.carried else 0.0
        through = [(norms.get((node.source, v), 0.0), found.get((node.source, v), 0.0)) for v in node.outputs]
        mean = sum(norm * error for norm, error in through) / (sum(norm for norm, _ in through) or 1.0)
        incoming = carried * found.get((node.source, node.value), 0.0) + (size - carried) * mean
        own = node_error(model, graph, node, step) * whole / size if node.operations else 0.0
        grown = float(model.transport[node.target] / model.transport[node.source])
        found[node.target, node.value] = (1 + grown * incoming / size) * (1 + own) - 1
    return found


def cosine(error: float) -> float:
    """The cosine of an estimate whose error, independent of what is estimated, has this squared relative size."""
    return float((1 + max(error, 0.0)) ** -0.5)


def path_error(target: float) -> float:
    """What the errors of the nodes along a path may add up to for a cosine: Π (1 + η) ≤ exp(Σ η) = 1 / cosine²."""
    return -2 * log(target)


def parameter_errors(
    graph: Graph, errors: Mapping[tuple[int, int], float], calibration: Calibration
) -> dict[str, float]:
    """E of every parameter's gradient: that of the cotangent which it is made of, times how samples add up there."""
    found: dict[str, float] = {}
    for op in graph.operations:
        own = max((errors.get((op.index + 1, v), 0.0) for v in op.writes), default=0.0)
        for use in op.parameters:
            if use.name:
                error = own * calibration.parameters.get(use.name, 1.0)
                found[use.name] = max(found.get(use.name, 0.0), error)
    return found

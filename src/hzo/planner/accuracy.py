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
from dataclasses import dataclass, fields
from math import log

import torch
from torch import Tensor

from hzo.declared import impulse_size
from hzo.finite_differences import Probe, Scheme
from hzo.noise import Noise
from hzo.planner.calibration import Calibration
from hzo.plans import Node
from hzo.tracing import Graph


@dataclass(frozen=True, eq=False)
class Targets:
    """What is estimated, and where: tensors of one shape.

    Attributes:
        position: of the boundary. size: squared norm of the cotangents. scale: root mean square of the activations.
        bend, power: what curvature adds to an edge from there, at any source from ``reach`` on.
    """

    position: Tensor
    size: Tensor
    scale: Tensor
    bend: Tensor
    power: Tensor
    reach: Tensor

    def column(self) -> Targets:
        """One row for each, to be broadcast against sources."""
        return Targets(*(getattr(self, f.name)[:, None] for f in fields(self)))


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """What the formula needs, for all positions of a chain at once; float64 tensors of (positions,) unless said.

    Attributes:
        gain: squared norm of all cotangents at a position. readout: ρ.
        process: running sum of π over the stages that end before or at a position.
        rounding, rounded: running sums of κ over the stages before that of the operation at a position, and up to that
            of the operation before it: a part of a stage is taken to round as much as the whole.
        bend, power: of the stage that starts at a position; nothing at others.
        transport: how much more errors have grown from the output to a position than cotangents have.
        calibration: what all this was made from.
    """

    scheme: Scheme
    noise: Noise
    calibration: Calibration
    gain: Tensor
    readout: Tensor
    process: Tensor
    rounding: Tensor
    rounded: Tensor
    bend: Tensor
    power: Tensor
    transport: Tensor

    def targets(self, graph: Graph, wanted: Sequence[tuple[int, Sequence[int]]]) -> Targets:
        """Values at positions, as the formula sees them: several at one position as one."""
        rows = [self._target(graph, position, values) for position, values in wanted]
        positions, sizes, scales, bends, powers, reaches = zip(*rows, strict=True)
        size, scale, bend, power = (torch.tensor(t, dtype=torch.float64) for t in (sizes, scales, bends, powers))
        return Targets(torch.tensor(positions), size, scale, bend, power, torch.tensor(reaches))

    def _target(
        self, graph: Graph, position: int, values: Sequence[int]
    ) -> tuple[int, float, float, float, float, int]:
        known = self.calibration
        norms = {v: known.norms.get((position, v), 0.0) for v in values}
        size = sum(norms.values()) or float(self.gain[position])  # nothing known: as all that is alive there
        elements = sum(graph.values[v].per_sample for v in values)
        squares = sum(graph.values[v].per_sample * known.scales.get(v, 1.0) ** 2 for v in values)
        scale = (squares / elements) ** 0.5 if squares else 1.0
        bends = [(norms[v], known.bends[position, v]) for v in values if (position, v) in known.bends]
        if not bends:
            return position, size, scale, 0.0, 4.0, position + 1
        bend = sum(norm * found.size for norm, found in bends) / size
        return position, size, scale, bend, max(b.power for _, b in bends), max(b.reach for _, b in bends)

    def by_noise(self, targets: Targets, source: Tensor, spread: Tensor, h: Tensor, read: float = 1.0) -> Tensor:
        """η of one repeat that more repeats lower; arguments broadcast.

        Args:
            spread: directions D. read: the share of the source's cotangents that the query reads.
        """
        return share(self.scheme) * spread * self._noise(targets, source, read) / (h**2 * targets.size)

    def by_measured_adjoint(self, targets: Targets, source: Tensor, spread: Tensor) -> Tensor:
        """η of one measurement of an operation whose adjoint is then applied; no step of the plan plays a part."""
        return spread * self.readout[source] / targets.size

    def lasting(self, targets: Targets, source: Tensor, spread: Tensor, h: Tensor, read: float = 1.0) -> Tensor:
        """η that no repeat lowers, bend apart: rounding, for forward differences the noise of the stored result."""
        variance = self.rounded[source] - self.rounding[targets.position]
        if self.scheme == "forward":
            variance = variance + self._noise(targets, source, read)
        return share(self.scheme) * spread * variance / (h**2 * targets.size)

    def _noise(self, targets: Targets, source: Tensor, read: float) -> Tensor:
        return read * self.readout[source] + self.process[source] - self.process[targets.position]

    def bends(self, targets: Targets, h: Tensor) -> Tensor:
        """(targets, positions): what curvature adds to an estimate of each target from each position behind it.

        A perturbation is taken to grow along the chain as cotangents grow against it, and stages to bend independently.
        No stage adds more than the whole: a slope that is not seen at all.
        """
        positions, t = torch.arange(len(self.gain)), targets.column()
        grown = h[:, None] * (t.size / self.gain).sqrt()
        behind = (self.bend * grown**self.power).clamp(max=1.0) * (positions > t.position)
        summed = torch.cat([torch.zeros_like(t.size), behind.cumsum(1)[:, :-1]], 1)
        own = (t.bend * h[:, None] ** t.power).clamp(max=1.0)
        return summed + own * (positions >= t.reach)

    def worst_growth(self) -> Tensor:
        """(positions,): growth of errors to each position, where they shrink on no part of the way: what a planner may
        rely on whatever the tree."""
        steps = (self.transport[:-1] / self.transport[1:]).clamp(min=1.0)
        return torch.cat([steps.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=steps.dtype)])


def share(scheme: Scheme) -> float:
    """The share of σ²/h² that noise of deviation σ in each reading leaves in a difference of length h.

    A half for two noisy readings over 2 h (central), one for one over h (forward).
    """
    return 0.5 if scheme == "central" else 1.0


def error_model(graph: Graph, calibration: Calibration, noise: Noise | None, scheme: Scheme) -> ErrorModel:
    """The error model of a chain; a declared noise takes the place of the measured one."""
    noise = noise or calibration.noise or Noise()
    end = len(graph.operations)
    gain, readout, bend, process, transport = (torch.zeros(end + 1, dtype=torch.float64) for _ in range(5))
    power = torch.full((end + 1,), 4.0, dtype=torch.float64)
    last = grown = 1.0
    for position in range(end, -1, -1):
        norm = sum(calibration.norms.get((position, v), 0.0) for v in graph.live[position])
        last = norm if norm > 0 else last  # nothing known, or no influence: as behind it
        gain[position] = last
        readout[position] = noise.readout_of(graph.stage_of[max(position - 1, 0)]) ** 2 * last
        grown = transport[position] = calibration.transport.get(position, grown)
    stages = torch.zeros(len(graph.stages) + 1, dtype=torch.float64)
    for k, stage in enumerate(graph.stages):
        process[stage.stop] = noise.process_of(k) ** 2 * gain[stage.stop]
        stages[k + 1] = stages[k] + calibration.rounding[k] ** 2 * gain[stage.stop]
        for value in graph.live[stage.start]:
            if (found := calibration.bends.get((stage.start, value))) is not None:
                own = calibration.norms.get((stage.start, value), 0.0) / gain[stage.start]
                bend[stage.start] += own * found.size
                power[stage.start] = found.power
    return ErrorModel(
        scheme=scheme,
        noise=noise,
        calibration=calibration,
        gain=gain,
        readout=readout,
        process=process.cumsum(0),
        rounding=stages[[*graph.stage_of, len(graph.stages)]],
        rounded=stages[[0, *(k + 1 for k in graph.stage_of)]],
        bend=bend,
        power=power,
        transport=transport,
    )


def spreads(graph: Graph, node: Node) -> tuple[float, float]:
    """Directions of differences, and what stands in their place where an adjoint is measured by impulses.

    An impulse of height s shows a row of the Jacobian with twice the noise of a reading over s², and there are
    n of them.
    """
    if isinstance(node.estimator, Probe):
        return float(node.estimator.directions), 0.0
    height = impulse_size(graph.values[node.value].dtype)
    once = node.cost.measurements // max(node.repeats, 1)
    return 0.0, 2.0 * once / height**2


def node_error(model: ErrorModel, graph: Graph, node: Node, step: float | None) -> float:
    """η of a node. ``step``: the length h of the differences of all nodes, for those that have none of their own."""
    spread, measured = (torch.tensor(s, dtype=torch.float64) for s in spreads(graph, node))
    target, source = model.targets(graph, [(node.target, (node.value,))]), torch.tensor([node.source])
    if not spread:
        return float(model.by_measured_adjoint(target, source, measured)) / node.repeats
    if node.relative_step is not None:
        h = target.scale * node.relative_step
    elif step is not None:
        h = torch.full_like(target.scale, step)
    else:
        raise AssertionError("a node of a plan for a noise has a step")
    norms = model.calibration.norms
    read = sum(norms.get((node.source, v), 0.0) for v in node.outputs) / float(model.gain[node.source])
    lasting = model.lasting(target, source, spread, h, read or 1.0) + model.bends(target, h)[0, node.source]
    return float(model.by_noise(target, source, spread, h, read or 1.0) / node.repeats + lasting)


def expected_errors(
    model: ErrorModel, graph: Graph, nodes: Sequence[Node], step: float | None
) -> dict[tuple[int, int], float]:
    """The squared relative error E of every estimate, by position and value; nodes in the order in which they run."""
    norms = model.calibration.norms
    found: dict[tuple[int, int], float] = {}
    for node in nodes:
        size = norms.get((node.target, node.value), 0.0) or float(model.gain[node.target])
        # What is carried over keeps its size; the rest of the cotangent came through the operations.
        carried = min(norms.get((node.source, node.value), 0.0), size) if node.carried else 0.0
        through = [(norms.get((node.source, v), 0.0), found.get((node.source, v), 0.0)) for v in node.outputs]
        mean = sum(norm * error for norm, error in through) / (sum(norm for norm, _ in through) or 1.0)
        incoming = carried * found.get((node.source, node.value), 0.0) + (size - carried) * mean
        own = node_error(model, graph, node, step) if node.operations else 0.0
        grown = float(model.transport[node.target] / model.transport[node.source])
        found[node.target, node.value] = grown * incoming / size * (1 + own) + own
    return found


def path_error(target: float) -> float:
    """What the errors of the nodes along a path may add up to for a cosine: Π (1 + η) ≤ exp(Σ η) = 1 / cosine²."""
    return -2 * log(target)


def parameter_errors(
    graph: Graph, errors: Mapping[tuple[int, int], float], calibration: Calibration
) -> dict[str, float]:
    """E of every parameter's gradient: that of the cotangent which it is made of, times how samples add up there."""
    found: dict[str, float] = {}
    for op in graph.operations:
        if not op.batched:
            continue  # derives values from parameters; what reads those counts
        own = max((errors.get((op.index + 1, v), 0.0) for v in op.writes), default=0.0)
        for name in (name for use in op.parameters for name in graph.names_of(use)):
            found[name] = max(found.get(name, 0.0), own * calibration.parameters.get(name, 1.0))
    return found

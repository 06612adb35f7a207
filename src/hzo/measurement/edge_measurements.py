"""Measuring a chain edge by edge: every point's cotangents from the next point's, at several steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import log

import torch
from torch import Tensor

from hzo.execution import Activations
from hzo.finite_differences import evaluations, scale_of, scaled_step
from hzo.gradients import (
    BoundaryCotangents,
    LocalStep,
    ParameterGradients,
    Sweep,
    add_gradients,
    estimate_node,
    with_carried,
)
from hzo.measurement.timing import operation_seconds, timed
from hzo.planner import Bend, Seconds, share
from hzo.plans import Allowed, Node, Plan, check_queries, has_rule, make_node
from hzo.tracing import Graph, GraphOperation

LADDER = (1.0, 0.25, 0.0625, 0.015625)  # steps at which curvature is seen, in units of the activation
SMALL, NOISY, LARGEST = 0.25, 0.5, 1.0  # those of a noisy chain: smaller ones drown
_EDGE_ERROR = 0.01  # squared relative error of one edge that repeats are to reach in a noisy chain
_RESOLVED = 3.0  # times what rounding explains, from which on a difference is taken for curvature
_UNSURE = 0.1  # of what noise explains: a difference below is not told from none


MeasuredDifference = tuple[float, float, float, float | None]
"""A step, its ratio to the next smaller one, the squared difference of the estimates at the two, and that of the next
pair of steps; None for the last where it does not show."""


def _apart(power: float, ratio: float) -> float:
    """Of the squared error at a step h, what an estimate at h / ratio differs by.

    Smooth curvature errs by c·h²: (1 − 1/ratio²)² for a power of 4. A kink at a distance k < h leaves (1 − k/h)/2 of
    its jump: for kinks anywhere (1 − 1/ratio)², for a power of 1. Other powers lie between.
    """
    kinks, smooth = (1 - 1 / ratio) ** 2, (1 - 1 / ratio**2) ** 2
    return kinks + (smooth - kinks) * (power - 1) / 3


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


class EdgeMeasurements:
    """What has been measured so far, from the end to the left.

    In a noisy chain two independent sweeps run side by side: the product of the two has no noise of its own to square,
    so that norms come out unbiased. One sweep more carries a random error along, as estimates carry theirs.
    """

    def __init__(
        self,
        graph: Graph,
        activations: Activations,
        at_the_end: dict[int, Tensor],
        allowed: Allowed,
        reference: Plan,
        noise: tuple[float, ...] | None,
        repeats: int,
        clocked: bool,
    ) -> None:
        """``reference``: whose scheme and perturbed parameters hold. ``clocked``: whether edges are timed, too."""
        self.graph, self.activations, self.allowed = graph, activations, allowed
        self.reference, self.noise, self.repeats = reference, noise, repeats
        self.clocked = clocked and noise is None
        end = len(graph.operations)
        self.sweeps = [self._sweep(dict(at_the_end)) for _ in range(1 if noise is None else 2)]
        self._error = self._sweep({v: self._scattered(v, g) for v, g in at_the_end.items()})
        self.norms = {(end, v): _square(g) for v, g in at_the_end.items()}
        self.transport = {end: 1.0}
        self.bends: dict[tuple[int, int], Bend] = {}
        self.parameters: dict[str, float] = {}
        self._rounding = [0.0] * len(graph.stages)
        self._edges: dict[tuple[int, int, int], float] = {}
        self._rules = 0.0
        self._plain: list[tuple[Node, float]] = []
        self._rules_of(end)

    def _sweep(self, at_the_end: dict[int, Tensor]) -> Sweep:
        local = LocalStep(self.graph, self.activations, (), self.allowed.scheme)
        end = len(self.graph.operations)
        return Sweep(self.graph, self.reference, self.activations, None, {end: at_the_end}, local)

    @property
    def cotangents(self) -> BoundaryCotangents:
        """The best there are: of the one sweep, or of the first of two."""
        return self.sweeps[0].cotangents

    def measure(self, target: int, source: int) -> None:
        """All that is alive at a target, from all that is known at its source."""
        graph = self.graph
        nodes = []
        for value in graph.live[target]:
            node = make_node(graph, value, target, source, self.allowed, everything=True)
            if graph.values[value].floating and node is not None:
                check_queries(graph, node)
                nodes.append(node)
        for node in nodes:
            bend = self._node(node)
            norm = self.norms.get((target, node.value), 0.0)
            if bend is not None and norm > 0:
                self.bends[target, node.value] = Bend(bend.size / norm, bend.power, source)
        self._carry(nodes, target, source)
        self._rules_of(target)

    def _norm(self, position: int) -> float:
        return sum(self.norms.get((position, v), 0.0) for v in self.graph.live[position])

    def _node(self, node: Node) -> Bend | None:
        """Estimate a node's value in every sweep; what curvature adds, in squared size (not relative yet)."""
        found: list[Tensor] = []
        bend = None
        differences = node.probe is not None
        asked = replace(node, relative_step=NOISY, repeats=self._repeats(node)) if self.noise is not None else node
        asked = asked if differences else replace(node, repeats=1 if self.noise is None else self.repeats // 2)
        for sweep in self.sweeps:
            at_source = sweep.cotangents.get(node.source, {})
            total = None
            if node.operations:

                def once(sweep: Sweep = sweep, at: dict[int, Tensor] = at_source) -> Tensor | None:
                    return estimate_node(sweep, asked, at)

                taken, total = timed(once) if self.clocked else (0.0, once())
                if taken:
                    self._edges[node.target, node.source, node.value] = taken
                if differences and not found and total is not None:
                    self._plain.append((node, taken))
                    bend = self._bend(sweep, asked, at_source, total)
            total = with_carried(node, total, at_source)
            if total is None:
                return None
            sweep.cotangents.setdefault(node.target, {})[node.value] = total
            found.append(total)
        squared = float((found[0].double() * found[-1].double()).sum())
        smallest = 1e-6 * float(found[0].norm()) * float(found[-1].norm())  # noise may hide a small one
        self.norms[node.target, node.value] = max(squared, smallest)
        return bend

    def _repeats(self, node: Node) -> int:
        """As many as bring the noise of one edge down to what is needed, within bounds."""
        relative = self._explained(node, NOISY, self.cotangents.get(node.source, {}))
        size = sum(_square(g) for g in self.cotangents.get(node.source, {}).values())
        return max(1, min(self.repeats, round(relative / size / _EDGE_ERROR))) if size > 0 else 1

    def _explained(self, node: Node, step: float, at_source: dict[int, Tensor]) -> float:
        """Squared error that the noise of one measurement leaves in an estimate with this step."""
        assert self.noise is not None
        rows = self._rows(node)
        variance = self.noise[self.graph.stage_of[node.source - 1]] ** 2 * sum(_square(g) for g in at_source.values())
        height = float(torch.as_tensor(scaled_step(rows, step)).double().square().mean())
        return share(self.allowed.scheme) * node.directions * variance / height

    def _rows(self, node: Node) -> Tensor:
        return self.graph.values[node.value].rows(self.activations.tensor(node.value), self.activations.batch)

    def _bend(self, sweep: Sweep, node: Node, at_source: dict[int, Tensor], reference: Tensor) -> Bend | None:
        """Curvature from what larger steps change, where noise and rounding do not explain it."""
        seen = self._through_noise if self.noise is not None else self._beside_rounding
        found = seen(sweep, node, at_source, reference.double())
        if found is None:
            return None
        step, ratio, above, below = found
        highest = 4.0 if self.allowed.scheme == "central" else 2.0
        power = highest if below is None else min(highest, max(1.0, log(above / below, ratio)))
        h = step * scale_of(self._rows(node))
        return Bend(above / _apart(power, ratio) / h**power, power, node.source)

    def _through_noise(
        self, sweep: Sweep, node: Node, at_source: dict[int, Tensor], reference: Tensor
    ) -> MeasuredDifference | None:
        """What the noise of the estimates does not explain of their differences."""
        expected = {step: self._explained(node, step, at_source) / node.repeats for step in (SMALL, NOISY, LARGEST)}
        above, below = (
            _square(self._at(sweep, node, at_source, step) - reference) - expected[step] - expected[NOISY]
            for step in (LARGEST, SMALL)
        )
        if above <= 0:
            return None
        return LARGEST, LARGEST / NOISY, above, max(below, _UNSURE * (expected[SMALL] + expected[NOISY]))

    def _beside_rounding(
        self, sweep: Sweep, node: Node, at_source: dict[int, Tensor], reference: Tensor
    ) -> MeasuredDifference | None:
        """What rounding does not explain; how much it is is kept for the stage."""
        rows = self._rows(node)
        # Rounding lowers with the square of the step: what shows at one, the others have more or less of.
        eps = float(torch.finfo(rows.dtype).eps)
        if eps < 1e-4:
            seen = eps ** (2 / 3)
            shown = _square(self._at(sweep, node, at_source, seen) - reference)
        else:  # a small step is lost in low precision; two large ones that are almost alike round apart
            seen = LADDER[0]
            shown = _square(self._at(sweep, node, at_source, seen) - self._at(sweep, node, at_source, 0.93 * seen)) / 2
        fade = {step: self._inverse_square(rows, step) for step in (seen, *LADDER)}
        stage = self.graph.stage_before(node.source)
        self._rounding[stage] += shown / (share(self.allowed.scheme) * node.directions * fade[seen])
        found = {step: self._at(sweep, node, at_source, step) for step in LADDER}
        apart, floor = [], []
        for above, below in pairwise(LADDER):
            apart.append(_square(found[above] - found[below]))
            floor.append(_RESOLVED * shown * (fade[above] + fade[below]) / fade[seen])
        # Where a quarter of the activation shows nothing, the whole of it may; in low precision nothing less shows.
        k = next((k for k in ((1, 0) if eps < 1e-4 else (0,)) if apart[k] > floor[k]), None)
        if k is None:
            return None
        smaller = apart[k + 1] if apart[k + 1] > floor[k + 1] else None
        return LADDER[k], LADDER[k] / LADDER[k + 1], apart[k], smaller

    def _at(self, sweep: Sweep, node: Node, at_source: dict[int, Tensor], step: float) -> Tensor:
        """The estimate with another step, in float64."""
        found = estimate_node(sweep, replace(node, relative_step=step), at_source)
        assert found is not None
        return found.double()

    @staticmethod
    def _inverse_square(rows: Tensor, step: float) -> float:
        """Mean of 1/h² over the elements: in low precision each has a step of its own."""
        heights = torch.as_tensor(scaled_step(rows, step, precision=rows.dtype)).double()
        return float(heights.square().reciprocal().mean())

    def _carry(self, nodes: list[Node], target: int, source: int) -> None:
        """Carry the random error over an edge; see how it grows beside the cotangent; add what the edge itself adds."""
        before, after = self._error.cotangents.get(source, {}), 0.0
        carried: dict[int, Tensor] = {}
        for node in nodes:
            asked = node if self.noise is None or node.probe is None else replace(node, relative_step=NOISY)
            parts = [estimate_node(self._error, asked, before) for _ in self.sweeps] if node.operations else [None]
            sums = [with_carried(node, part, before) for part in parts]
            if sums[0] is None or sums[-1] is None:
                continue
            carried[node.value] = sums[0]
            after += float((sums[0].double() * sums[-1].double()).sum())  # of two estimates: without their noise
        errors, gains = sum(_square(g) for g in before.values()), self._norm(source)
        if errors > 0 and gains > 0 and after > 0 and self._norm(target) > 0:
            grown = (after / errors) / (self._norm(target) / gains)
            self.transport[target] = self.transport.get(source, 1.0) * grown
        edges = len(self.transport)
        for value, error in carried.items():
            fresh = self._scattered(value, error) / edges**0.5
            self._error.cotangents.setdefault(target, {})[value] = error + fresh

    def _rules_of(self, position: int) -> None:
        """Time of the rules of the operation before a position, and how relative errors add up in its gradients."""
        if position == 0:
            return
        op = self.graph.operations[position - 1]
        at = self.cotangents.get(position, {})
        given = {v: at[v] for v in op.writes if v in at}
        if not given or not op.parameters or not op.batched or not has_rule(op):
            return

        def gradients(cotangents: dict[int, Tensor]) -> dict[int, Tensor]:
            named: ParameterGradients = {}
            found: dict[int, Tensor] = {}  # of what is derived from parameters
            add_gradients(LocalStep(self.graph, self.activations, ()), op, cotangents, found, named)
            return found | {use.value: named[use.name][1] for use in op.parameters if use.name}

        taken, exact = timed(lambda: gradients(given))
        if not self._along(op):
            self._rules += taken
        wrong = {v: self._scattered(v, g) for v, g in given.items()}
        response = gradients(wrong)
        for use in op.parameters:
            signal, error = _square(exact[use.value]), _square(response[use.value])
            if signal <= 0:
                continue
            for name in self.graph.names_of(use):
                self.parameters[name] = max(self.parameters.get(name, 0.0), error / signal)

    def _along(self, op: GraphOperation) -> bool:
        """Whether the adjoint of an operation gives the gradients of its parameters along."""
        if self.allowed.assume != "structure":
            return False
        return any(self.graph.requires[v] for v in op.reads)

    def _scattered(self, value: int, cotangent: Tensor) -> Tensor:
        """A random error as large as the cotangent, in every sample."""
        found, batch = self.graph.values[value], self.activations.batch
        rows = found.rows(cotangent, batch)
        drawn = torch.randn_like(rows)
        drawn *= rows.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
        return found.from_rows(drawn, batch)

    def rounding_of_stages(self) -> tuple[float, ...]:
        """Standard deviation of what rounding adds to the results of each stage."""
        found = []
        for stage, variance in zip(self.graph.stages, self._rounding, strict=True):
            norm = sum(self.norms.get((stage.stop, v), 0.0) for v in self.graph.live[stage.stop])
            found.append((variance / norm) ** 0.5 if norm > 0 else 0.0)
        return tuple(found)

    def seconds(self, fixed: float) -> Seconds:
        """The times of all parts; those of operations in chunks of the size that queries have."""
        graph = self.graph
        operations = operation_seconds(graph, self.activations)
        spent = elements = 0.0
        for node, taken in self._plain:
            queries = node.directions * evaluations(self.allowed.scheme) * self.activations.batch
            spent += max(0.0, taken - queries * sum(operations[k] for k in node.operations))
            elements += queries * sum(graph.values[v].per_sample for v in node.outputs)
        return Seconds(self._edges, operations, spent / elements if elements else 0.0, self._rules, fixed)

"""``plan``: which boundaries are estimated from which, and by which probe.

Three steps: the boundaries that parameters need; a tree over them (the shortest path through all boundaries for
``planned``), first where a single tensor is alive, then inside stages; and for every edge of the tree the tensors
whose cotangents it must give.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch

from hzo.chain import Chain
from hzo.choice import Allowed, check_spacing, choose_probe
from hzo.cost import parameter_cost
from hzo.differences import Scheme, check_scheme, check_step
from hzo.errors import CoupledSamplesError, InputError, NondeterministicError, PlanError
from hzo.graph import Attribute, Graph, Operation, ParameterUse
from hzo.memory import with_storage
from hzo.parameter_rules import find_rule
from hzo.plan import Cost, Node, ParameterProbe, Plan
from hzo.structure import Assume, check_assume
from hzo.trees import Edge, Tree, check_tree, fixed_tree

Wanted = dict[int, set[int]]
"""Values whose cotangents are asked for, by position."""


def plan(
    chain: Chain,
    tree: Tree = "planned",
    assume: Assume = "structure",
    scheme: Scheme = "central",
    step: float | None = None,
    noise: float | None = None,
    boundaries: str = "needed",
    spacing: int | None = None,
    memory: int | None = None,
) -> Plan:
    """Plan the gradient of a traced chain.

    Args:
        chain: traced, ``hzo.trace(model, x)``.
        tree: ``"planned"`` (the cheapest for exact differences: every boundary from the next, boundaries that no
            parameter needs only where they save queries), ``"flat"``, ``"bisect"`` (HZO), ``"stagewise"`` or a whole
            number b ≥ 2 of parts.
        assume: ``"nothing"``: coordinate differences throughout. ``"locality"``: elements whose outputs cannot meet
            share a query (coloring; all of them where a segment is elementwise). ``"structure"``: single operations by
            their adjoints as well.
        scheme: ``"central"`` or ``"forward"`` differences.
        step: distance h for all nodes; None derives it from dtype and scale of each tensor.
        noise: standard deviation of what queries return on top; stages that do not repeat are accepted when given.
        boundaries: ``"needed"`` by a parameter's gradient, or ``"all"`` stage boundaries, the input's included.
        spacing: None: exact. A number k allows elements of one color to share outputs if they are k apart along every
            axis on which the segment sees windows; random signs keep such a node unbiased, and the plan takes it where
            it costs less than the exact coloring. ``hzo.report_crosstalk()`` tells its error. Each gradient then draws
            one number more from the random state than a forward pass does.
        memory: bytes that stored activities and pending cotangents of one gradient of the batch traced may take (the
            perturbed copies of a chunk have a budget of their own: ``hzo.backward(memory=)``). None stores all that is
            read again. A number does so too where that fits, else stores a path of about log₂ L boundaries and runs
            stages again, about (L/2) log₂ L of them; the gradients stay the same to the bit.

    The plan predicts exactly what ``hzo.count_queries`` will count. Source: trees: paper and ours.

    Raises:
        InputError: not a chain. TraceError: a chain that has not seen an input.
        PlanError: an unknown option, a chain without anything to train, or more memory needed than allowed.
        CoupledSamplesError: a query would run a stage in which samples influence each other (BatchNorm in train mode).
        NondeterministicError: a stage that does not repeat, and no noise declared.
    """
    if not isinstance(chain, Chain):
        raise InputError(
            f"expected a traced chain, got a {type(chain).__name__}: chain = hzo.trace(model, x), then hzo.plan(chain)"
        )
    graph = chain.traced
    check_tree(tree), check_assume(assume), check_scheme(scheme), check_step(step)
    if boundaries not in ("needed", "all"):
        raise PlanError(f"expected boundaries 'needed' or 'all', got {boundaries!r}")
    if noise is not None and not 0 <= noise < float("inf"):
        raise InputError(f"expected a noise ≥ 0, got {noise}")
    _check_repeats(graph, noise)
    wanted = wanted_by_parameters(graph)
    if boundaries == "all":
        wanted = wanted_everywhere(graph, wanted)
    trainable = tuple(dict.fromkeys(use.name for op in graph.operations for use in op.parameters if use.name))
    if not trainable and boundaries == "needed":
        raise PlanError("no parameter of this chain requires a gradient; set requires_grad=True on those to train")
    allowed = Allowed(assume, scheme, check_spacing(spacing, assume))
    edges = tree_edges(graph, tree, wanted, allowed)
    found = Plan(
        fingerprint=graph.fingerprint,
        tree=tree,
        assume=assume,
        scheme=scheme,
        step=step,
        noise=noise,
        nodes=nodes_of(graph, edges, wanted, allowed, everything=boundaries == "all"),
        perturbed=tuple(perturbed_parameters(graph, scheme)),
        trainable=trainable,
        batch=graph.nominal_batch,
        labels=tuple(graph.describe(position) for position in range(len(graph.operations) + 1)),
    )
    return with_storage(graph, found, memory)


def wanted_by_parameters(graph: Graph) -> Wanted:
    """The outputs of every operation with a trainable parameter, at the boundary right behind it."""
    wanted: Wanted = {}
    for op in graph.operations:
        alive = graph.live[op.index + 1]
        values = {v for v in op.writes if v in alive and graph.values[v].floating}
        if op.batched and op.parameters and values:
            wanted[op.index + 1] = values
    return wanted


def wanted_everywhere(graph: Graph, wanted: Wanted) -> Wanted:
    """All floating tensors at all stage boundaries, beside what parameters need."""
    result = {position: set(values) for position, values in wanted.items()}
    for position in graph.boundaries:
        result.setdefault(position, set()).update(v for v in graph.live[position] if graph.values[v].floating)
    return result


def tree_edges(graph: Graph, tree: Tree, wanted: Wanted, allowed: Allowed) -> list[Edge]:
    """Edges between positions, the rightmost target first.

    The tree first goes over stage boundaries and positions where one tensor carries all influence, then inside those
    stages that hold parameters between several live tensors.
    """
    end = len(graph.operations)
    needed = sorted(position for position in wanted if position < end)
    if not needed:
        return []
    if tree == "flat":
        return [(position, end) for position in reversed(needed)]
    inside: dict[int, list[int]] = {}
    outer = {end}
    for position in needed:
        if position in graph.boundaries or _single(graph, position):
            outer.add(position)
        else:
            stage = graph.stage_of[position]
            inside.setdefault(stage, []).append(position)
            outer.add(graph.stages[stage].stop)
    first = graph.stages[graph.stage_of[max(needed[0] - 1, 0)]].start
    if tree == "planned":
        path = shortest_path(graph, [first, *(p for p in needed if p > first), end], allowed)
        return path if first not in needed else [*path, (first, path[-1][0] if path else end)]
    groups = [[first, *sorted(outer - {first})]]
    groups += [[graph.stages[s].start, *points, graph.stages[s].stop] for s, points in inside.items()]
    edges: list[Edge] = []
    for points in groups:
        edges += [(points[t], points[s]) for t, s in fixed_tree(tree, len(points) - 1)]
    if first in outer:  # the left end itself is asked for: from the boundary next to it
        edges += [(first, groups[0][1])]
    return sorted(edges, key=lambda edge: -edge[0])


def _single(graph: Graph, position: int) -> bool:
    """Whether one tensor carries all influence past a position, as it does at the boundaries of a traced model."""
    return sum(graph.requires[v] for v in graph.live[position]) == 1


def shortest_path(graph: Graph, points: Sequence[int], allowed: Allowed) -> list[Edge]:
    """The cheapest way to estimate all ``points`` but the first, over any positions between them.

    With exact differences no path is too long, so each point takes its cotangent from the next on the path, and only
    points that nobody asked for may be passed over.
    """
    edges: list[Edge] = []
    for left, right in pairwise(points[1:]):
        between = range(left, right + 1)
        best: dict[int, Path] = {right: (0, Fraction(0), 0, right)}
        for target in reversed(between[:-1]):
            best[target] = min(_through(graph, target, s, best[s], allowed) for s in between if s > target)
        position = left
        while position != right:
            edges.append((position, best[position][3]))
            position = best[position][3]
    return sorted(edges, key=lambda edge: -edge[0])


Path = tuple[int, Fraction, int, int]
"""Nodes that cannot be estimated, forward equivalents, queries, and the next boundary: compared in this order."""


def _through(graph: Graph, target: int, source: int, onward: Path, allowed: Allowed) -> Path:
    """The cost of a path that takes everything alive at ``target`` from ``source``."""
    blocked, cost = 0, Cost()
    for value in graph.live[target]:
        node = make_node(graph, value, target, source, allowed) if graph.requires[value] else None
        if node is not None:
            blocked += not _possible(graph, node)
            cost += node.cost
    total = cost.forward_equivalents_of(graph.nominal_batch)
    return onward[0] + blocked, onward[1] + total, onward[2] + cost.queries + cost.adjoints, source


def _possible(graph: Graph, node: Node) -> bool:
    """Whether a node's queries mean anything: samples kept apart, and nothing infinite to take a difference of."""
    if node.probe.kind == "adjoint" or not node.operations:
        return True
    finite = all(graph.values[v].finite for v in (node.value, *node.outputs))
    return finite and not any(graph.operations[k].coupled for k in node.operations)


def make_node(
    graph: Graph, value: int, target: int, source: int, allowed: Allowed, everything: bool = False
) -> Node | None:
    """The estimate of one value at ``target`` from ``source``; None where it has no influence there."""
    alive = [v for v in graph.live[source] if graph.values[v].floating and (everything or graph.requires[v])]
    operations = graph.slice(value, target, source, [v for v in alive if v != value])
    outputs = graph.reached(value, operations, alive)
    carried = value in alive
    if not operations and not carried:
        return None
    probe, cost = choose_probe(graph, value, operations, outputs, allowed)
    return Node(value, target, source, operations, outputs, carried, probe, cost)


def nodes_of(graph: Graph, edges: list[Edge], wanted: Wanted, allowed: Allowed, everything: bool) -> tuple[Node, ...]:
    """For every edge the values to estimate: what is asked for at its target, and what edges from there need."""
    need: Wanted = {position: set(values) for position, values in wanted.items()}
    nodes: list[Node] = []
    for target, source in reversed(edges):  # leftmost first: by then all that a target must give is known
        for value in sorted(need.get(target, ())):
            node = make_node(graph, value, target, source, allowed, everything)
            if node is None:
                continue
            _check_coupling(graph, node)
            need.setdefault(source, set()).update(node.outputs, {value} if node.carried else ())
            nodes.append(node)
    return tuple(reversed(nodes))


def perturbed_parameters(graph: Graph, scheme: Scheme) -> list[ParameterProbe]:
    """Parameters and derived values that no closed rule covers."""
    found = []
    for op in graph.operations:
        for k, use in enumerate(op.parameters):
            if not has_rule(graph, op, use):
                elements = operand(graph, use).numel()
                cost = parameter_cost(graph, op.index, elements, scheme)
                found.append(ParameterProbe(op.index, k, elements, cost))
    return found


def operand(graph: Graph, use: ParameterUse) -> torch.Tensor:
    """The tensor that a use refers to; for a derived value one of its shape, without memory."""
    if isinstance(use.where, Attribute):
        return use.where.get()
    return graph.values[use.where.value].without_memory()


def has_rule(graph: Graph, op: Operation, use: ParameterUse) -> bool:
    """Whether the gradient of this operand has a closed form; decided from shapes alone."""
    written = [v for v in op.writes if graph.values[v].floating]
    if use.slot is None or len(written) != 1:
        return False
    args, kwargs = graph.arguments_without_memory(op)
    return find_rule(op.target, args, kwargs, frozenset({use.slot})) is not None


def _check_repeats(graph: Graph, noise: float | None) -> None:
    for op in graph.operations:
        if not op.deterministic and noise is None:
            raise NondeterministicError(
                f"{op.name} gave two results for the same input, with the same random state; differences of its "
                "results would be noise. Make it repeat, or say how large its noise is: hzo.plan(chain, noise=...)"
            )


def _check_coupling(graph: Graph, node: Node) -> None:
    for k in node.operations if node.probe.kind != "adjoint" else ():
        op = graph.operations[k]
        if op.coupled:
            raise CoupledSamplesError(
                f"{op.name} lets the samples of a batch influence each other (as BatchNorm does in train mode), and "
                f"lies between {graph.describe(node.target)} and {graph.describe(node.source)}, where all samples are "
                "perturbed at once. Plan with tree='planned', assume='structure', which knows the norms of torch; or "
                "put it into eval mode (module.eval()), use a norm that keeps samples apart (GroupNorm, LayerNorm), "
                "or freeze all parameters before it"
            )

"""From the edges of a tree to nodes: which tensors a segment must give, by which probe, at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hzo.errors import CoupledSamplesError, PlanError
from hzo.finite_differences import Scheme
from hzo.plans.choice import Allowed, choose_estimator, has_adjoint
from hzo.plans.cost import parameter_cost, rule_cost
from hzo.plans.options import Boundaries, PlanOptions
from hzo.plans.plan import Node, ParameterProbe, Plan, PlannedEdge
from hzo.tracing import Graph, GraphOperation, declared_step

Wanted = dict[int, set[int]]
"""Values whose cotangents are asked for, by position."""


def wanted_by_gradients(graph: Graph) -> Wanted:
    """The outputs of every operation with a trainable parameter, at the boundary right behind it, and the inputs that
    require a gradient."""
    alive = set(graph.differentiated) & set(graph.live[0])
    wanted: Wanted = {0: alive} if alive else {}
    for op in graph.operations:
        values = {v for v in op.writes if v in graph.live[op.index + 1] and graph.values[v].floating}
        if op.batched and op.parameters and values:
            wanted[op.index + 1] = values
    return wanted


def wanted_everywhere(graph: Graph, wanted: Wanted) -> Wanted:
    """All floating tensors at all stage boundaries, beside what parameters need."""
    result = {position: set(values) for position, values in wanted.items()}
    for position in graph.boundaries:
        result.setdefault(position, set()).update(v for v in graph.live[position] if graph.values[v].floating)
    return result


def plan_without_nodes(graph: Graph, options: PlanOptions) -> Plan:
    """All of a plan that does not depend on its edges."""
    return Plan(
        **options.given,
        fingerprint=graph.fingerprint,
        calls=graph.calls,
        nodes=(),
        perturbed=tuple(perturbed_parameters(graph, options.scheme)),
        trainable=tuple(dict.fromkeys(use.name for op in graph.operations for use in op.parameters if use.name)),
        batch=graph.nominal_batch,
        labels=tuple(graph.describe(position) for position in range(len(graph.operations) + 1)),
    )


def with_edges(graph: Graph, plan: Plan, edges: Sequence[PlannedEdge]) -> Plan:
    """The plan with these edges and the nodes that follow from them.

    Raises:
        CoupledSamplesError: a query would run a stage in which samples influence each other.
        PlanError: a query would run a custom Function, which has a backward of its own.
    """
    allowed = Allowed(plan.assume, plan.scheme, plan.spacing)
    smoothed = [replace(edge, repeats=plan.draws) for edge in edges] if plan.mu is not None else edges
    nodes = nodes_of(graph, smoothed, wanted_by(graph, plan.boundaries), allowed, everything=plan.boundaries == "all")
    return replace(plan, edges=tuple(edges), nodes=nodes)


def wanted_by(graph: Graph, boundaries: Boundaries) -> Wanted:
    """The tensors whose gradients a plan must estimate, by their place in the network: those that parameters need."""
    wanted = wanted_by_gradients(graph)
    return wanted_everywhere(graph, wanted) if boundaries == "all" else wanted


def make_node(
    graph: Graph, value: int, target: int, source: int, allowed: Allowed, everything: bool = False
) -> Node | None:
    """The estimate of one value at ``target`` from ``source``; None where it has no influence there."""
    alive = [v for v in graph.live[source] if graph.values[v].floating and (everything or graph.requires[v])]
    operations = graph.operations_between(value, target, source, [v for v in alive if v != value])
    outputs = graph.reached(value, operations, alive)
    carried = value in alive
    if not operations and not carried:
        return None
    estimator, cost = choose_estimator(graph, value, operations, outputs, allowed)
    return Node(value, target, source, operations, outputs, carried, estimator, cost)


def nodes_of(
    graph: Graph, edges: Sequence[PlannedEdge], wanted: Wanted, allowed: Allowed, everything: bool
) -> tuple[Node, ...]:
    """For every edge the values to estimate: what is asked for at its target, and what edges from there need."""
    need: Wanted = {position: set(values) for position, values in wanted.items()}
    nodes: list[Node] = []
    for edge in reversed(edges):  # leftmost first: by then all that a target must give is known
        for value in sorted(need.get(edge.target, ())):
            node = make_node(graph, value, edge.target, edge.source, allowed, everything)
            if node is None:
                continue
            check_queries(graph, node)
            need.setdefault(edge.source, set()).update(node.outputs, {value} if node.carried else ())
            nodes.append(_decided(graph, node, edge))
    return tuple(reversed(nodes))


def _decided(graph: Graph, node: Node, edge: PlannedEdge) -> Node:
    """A node as its edge was decided; an adjoint takes no step, and what asks no query is not asked twice."""
    if not node.operations:
        return node
    differences = node.probe is not None
    repeats = edge.repeats if differences or node.cost.measurements else 1
    return replace(
        node,
        repeats=repeats,
        relative_step=edge.relative_step if differences else None,
        declared_step=_declared_step(graph, node) if differences else None,
        cost=node.cost * repeats,
    )


def _declared_step(graph: Graph, node: Node) -> float | None:
    """The widest step declared for what goes into an operation that reads the perturbed value."""
    readers = (graph.operations[k] for k in node.operations if node.value in graph.operations[k].reads)
    found = [step for op in readers if (step := declared_step(op.module)) is not None]
    return max(found, default=None)


def possible(graph: Graph, node: Node) -> bool:
    """Whether a node's queries mean anything: samples kept apart, and nothing infinite to take a difference of."""
    if node.probe is None:
        return True
    finite = all(graph.values[v].finite for v in (node.value, *node.outputs))
    return finite and not any(graph.operations[k].coupled or graph.operations[k].own_backward for k in node.operations)


def check_queries(graph: Graph, node: Node) -> None:
    """Raise where what a query of this node would tell is not the gradient.

    Raises:
        CoupledSamplesError: samples influence each other. PlanError: a custom Function says what its gradient is.
    """
    if node.probe is None:
        return
    for k in node.operations:
        op = graph.operations[k]
        if op.own_backward:
            kind = "a custom autograd Function" if op.rule == "custom Function" else "an operator of PyTorch's"
            raise PlanError(
                f"{op.target!r} is {kind}, whose forward and backward may disagree (as in a "
                f"straight-through estimator); differences of its forward, between {graph.describe(node.target)} and "
                f"{graph.describe(node.source)}, would leave out its backward. Plan with tree='planned', "
                "assume='structure', which calls its backward; or, to follow its forward, call that without the "
                "Function, or inside hzo.blackbox"
            )
        if op.coupled:
            raise CoupledSamplesError(
                f"{op.name} lets the samples of a batch influence each other (as BatchNorm does in train mode), and "
                f"lies between {graph.describe(node.target)} and {graph.describe(node.source)}, where all samples are "
                "perturbed at once. Plan with tree='planned', assume='structure', which knows the norms of torch; or "
                "put it into eval mode (module.eval()), use a norm that keeps samples apart (GroupNorm, LayerNorm), "
                "or freeze all parameters before it"
            )


def perturbed_parameters(graph: Graph, scheme: Scheme) -> list[ParameterProbe]:
    """Parameters and derived values that no rule covers; those whose rule measures something, with no elements."""
    found = []
    for op in graph.operations:
        for k, use in enumerate(op.parameters):
            if not has_rule(op):
                elements = graph.values[use.value].numel
                cost = parameter_cost(graph, op.index, elements, scheme)
                found.append(ParameterProbe(op.index, k, elements, cost))
            elif use.value in (op.measured or {}):
                found.append(ParameterProbe(op.index, k, 0, rule_cost(graph, op, use.value, adjoints=0)))
    return found


def has_rule(op: GraphOperation) -> bool:
    """Whether the gradients of an operation's parameters follow from its rule; of a use, see ``measured``."""
    return has_adjoint(op)

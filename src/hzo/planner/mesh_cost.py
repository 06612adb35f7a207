"""What one process of a mesh does in one gradient: its samples, its share of the queries, what it sends, how long.

Which share is whose is decided where queries run (``vjp_rows``, ``distributed/``); here the same is counted before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from hzo._options import positive
from hzo.distributed import Shares
from hzo.errors import InputError
from hzo.planner.calibration import Calibration, Seconds
from hzo.planner.seconds import seconds_of
from hzo.plans import MeshCost, Plan, RankCost, share_of
from hzo.tracing import Graph

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


_MOST = 10**7  # processes


@dataclass(frozen=True)
class Mesh:
    """Processes that share a gradient: so many along ``sample``, and so many along ``query`` for each of these.

    ``link``: seconds that an exchange takes, and words that go over it in a second; None where that is not known.
    """

    samples: int
    queries: int
    link: tuple[float, float] | None = None


def as_mesh(mesh: DeviceMesh | Sequence[int] | None, link: Sequence[float] | None, words: int) -> Mesh | None:
    """A mesh as ``hzo.plan`` takes it.

    Args:
        mesh: a ``DeviceMesh``, of which every process must call this where it has several; or its two numbers.
        words: how much is sent to try a link.

    Raises:
        InputError: neither; more processes than anybody has; a link that is not two positive numbers, or has no mesh.
    """
    if link is not None and (mesh is None or not isinstance(link, (tuple, list)) or len(link) != 2):
        raise InputError(
            f"expected link to be (seconds that an exchange takes, words sent in a second), beside mesh=; got {link!r}"
        )
    known = (
        None if link is None else (positive("seconds of link", link[0]), positive("words a second of link", link[1]))
    )
    if mesh is None:
        return None
    if isinstance(mesh, (tuple, list)):
        if len(mesh) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in mesh):
            raise InputError(
                "expected mesh to be a torch.distributed.DeviceMesh, or its numbers of processes along sample and "
                f"query, (2, 4); got {mesh!r}"
            )
        if mesh[0] * mesh[1] > _MOST:
            raise InputError(f"expected a mesh of at most {_MOST:,} processes, got {mesh[0]} × {mesh[1]}")
        return Mesh(mesh[0], mesh[1], known)
    here = Shares(mesh, timeout=600.0)
    return Mesh(here.size("sample"), here.size("query"), known or here.link(words))


def words_of_parameters(graph: Graph) -> int:
    """How many numbers the gradients of all parameters are: what processes exchange to average them."""
    return sum(_parameters(graph).values())


def _parameters(graph: Graph) -> dict[str, int]:
    return {use.name: graph.values[use.value].numel for op in graph.operations for use in op.parameters if use.name}


def rank_cost(graph: Graph, plan: Plan, mesh: Mesh, known: Seconds | None = None) -> RankCost:
    """What the busiest process of a mesh does in one gradient of the batch traced, divided evenly.

    Every exchange is counted, with memory for all repeats of a node at once. What is sent to compare batch and plan,
    and to hear of failures, some hundred words, is not among the words.
    """
    ways, batch = mesh.queries, -(-plan.batch // mesh.samples)
    queries, spent = 0, Fraction(0)
    words = exchanges = 0
    for node in plan.nodes:
        share = share_of(node.probe, ways)
        queries += int(node.cost.queries * share) * batch + node.cost.measurements
        spent += node.cost.forward_equivalents * share * batch / plan.batch + node.cost.measured / plan.batch
        if share < 1 and node.probe is not None:
            words += node.repeats * node.probe.draws * batch * node.probe.elements
            exchanges += 2 * node.probe.draws  # of all repeats at once
        if ways > 1 and node.probe is not None and node.repeats > 1:  # they agree on how many these are
            exchanges += 2
    for probe in plan.perturbed:
        share = share_of(probe, ways)
        queries += int(probe.cost.queries * share) * batch + probe.cost.measurements
        spent += probe.cost.forward_equivalents * share * batch / plan.batch + probe.cost.measured / plan.batch
        if share < 1:
            words += probe.elements
            exchanges += 2
    if ways > 1:  # to compare twice what is there, to hear of failures, to compare what was found
        exchanges += 2 + 2 + 1 + 2
    if mesh.samples > 1:  # the same, less the last; the loss, who has which gradient, and these
        sizes = _parameters(graph)
        kinds = {graph.values[u.value].dtype for op in graph.operations for u in op.parameters if u.name}
        words, exchanges = words + 1 + len(sizes) + sum(sizes.values()), exchanges + 2 + 2 + 1 + 2 + len(kinds)
    seconds = None
    if known is not None:
        seconds = seconds_of(graph, plan, known, batch=batch, ways=ways)
        if mesh.link is not None:
            seconds += exchanges * mesh.link[0] + words / mesh.link[1]
    return RankCost(mesh.samples, ways, batch, queries, float(spent), words, exchanges, seconds)


def mesh_cost(graph: Graph, plan: Plan, mesh: Mesh, known: Seconds | None = None) -> MeshCost:
    """What a mesh does, and which division of as many processes would take the least.

    That is the least time where it is known; else the fewest operations of the busiest process, its base pass with
    them, and of those that have as few the one that sends the fewest words.
    """
    processes = mesh.samples * mesh.queries
    others = [
        rank_cost(graph, plan, Mesh(n, processes // n, mesh.link), known)
        for n in range(1, min(processes, plan.batch) + 1)
        if processes % n == 0
    ]

    def price(cost: RankCost) -> tuple[float, float, int]:
        work = cost.forward_equivalents + cost.batch / plan.batch
        return cost.seconds if cost.seconds is not None and mesh.link is not None else 0.0, round(work, 9), cost.words

    coupled = any(op.coupled for op in graph.operations)
    return MeshCost(rank_cost(graph, plan, mesh, known), min(others, key=price), coupled)


def with_mesh(graph: Graph, plan: Plan, mesh: Mesh, calibration: Calibration | None = None) -> Plan:
    """The plan, with what it costs on a mesh."""
    return replace(plan, mesh=mesh_cost(graph, plan, mesh, None if calibration is None else calibration.seconds))

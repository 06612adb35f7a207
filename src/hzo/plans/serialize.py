"""Plans as files: decisions as JSON that people can read, from which a plan is made again for its chain.

A file holds what was decided (the tree's edges with their repeats and steps, and what may be assumed) and what is
expected of it. Nodes, probes and costs follow from those and the chain. Ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from math import isfinite
from os import PathLike
from pathlib import Path
from sys import float_info
from typing import Any, get_args

from hzo._files import replace_file
from hzo._options import one_of, positive, shown
from hzo.errors import HzoError, InputError, PlanError
from hzo.finite_differences import check_scheme
from hzo.noise import Level, Noise
from hzo.plans.fit import difference
from hzo.plans.memory import stored
from hzo.plans.nodes import plan_without_nodes, wanted_by, with_edges
from hzo.plans.options import PlanOptions, check_boundaries, check_spacing
from hzo.plans.plan import Expected, Plan, PlannedEdge
from hzo.plans.storage import Storage
from hzo.plans.trees import check_tree
from hzo.structure import check_assume
from hzo.tracing import Chain, Graph

FORMAT = "hzo plan"
VERSION = 4  # positions count calls of PyTorch's operators (ATen); edges have relative steps
_MOST = 10**15  # of anything that is counted; what is beyond it is no plan
_AGAIN = "restore the file, or make the plan again with hzo.plan and save it with hzo.save_plan"


def save_plan(plan: Plan, path: str | PathLike[str]) -> None:
    """Write a plan to a JSON file; a file that is there is replaced whole or not at all.

    Raises:
        InputError: not a plan, or a path that cannot be written.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"expected a plan made by hzo.plan, got a {type(plan).__name__}")
    if not isinstance(path, (str, PathLike)):
        raise InputError(f"expected the path of a file to write the plan to, got {path!r}")
    try:
        replace_file(Path(path), _text(plan).encode())
    except OSError as error:
        raise InputError(
            f"the plan cannot be written to {path}: {error.strerror or error}; make it writable, or choose another path"
        ) from error


def load_plan(chain: Chain, path: str | PathLike[str]) -> Plan:
    """Read a plan from the JSON file that ``hzo.save_plan`` wrote, for the chain that it was made for.

    Equal to the plan that was saved. A chain traced for another batch size gets the same decisions, with the totals of
    its own batch. Cost: no forward pass; probes are chosen as for a new plan.

    Raises:
        InputError: not a chain, or a file that cannot be read. TraceError: a chain that has not seen an input.
        PlanError: not a plan's file, one of another version or chain, or decisions that fit no plan.
        CoupledSamplesError: as ``hzo.plan``.
    """
    if not isinstance(chain, Chain):
        raise InputError(
            f"expected a traced chain, got a {type(chain).__name__}: chain = hzo.trace(model, x), then "
            "hzo.load_plan(chain, path)"
        )
    graph = chain.traced
    if not isinstance(path, (str, PathLike)):
        raise InputError(f"expected the path of a plan's file, got {path!r}")
    values = _Fields(_read(Path(path)), str(path))
    _check_format(values)
    calls = values.take("calls", _calls, missing=())  # files of before 2026-12 have none
    if (found := values.take("fingerprint")) != graph.fingerprint:
        where = f": {difference(calls, graph)}" if calls else ""
        raise PlanError(
            f"{path} holds a plan for another chain, input shape, dtype or set of trainable parameters (fingerprint "
            f"{found!r}, this chain's is {graph.fingerprint!r}){where}; load it for its own, or make one for this: "
            "plan = hzo.plan(chain)"
        )
    made = plan_without_nodes(graph, _options(graph, values, str(path)))
    storage: Storage = values.take("storage", _storage)
    rows = values.rows("edges")
    edges = [_planned_edge(row) for row in rows]
    _check_tree(graph, made, edges, str(path))
    planned = stored(graph, with_edges(graph, made, edges), storage)
    expected = values.take("expected")
    if expected is not None:
        planned = replace(planned, expected=_expected(_Fields(expected, f"{path}, expected"), rows, planned, str(path)))
    values.take("summary")
    for fields in (values, *rows):
        fields.finish()
    return planned


def _text(plan: Plan) -> str:
    """JSON with one line for every field, and one for every edge."""
    rows: list[dict[str, Any]] = [{"where": plan.labels[edge.target], **asdict(edge)} for edge in plan.edges]
    expected = None
    if plan.expected is not None:
        expected = {"seconds": plan.expected.seconds, "parameters": plan.expected.parameters}
        errors: dict[int, dict[str, float]] = {edge.target: {} for edge in plan.edges}
        for (position, value), error in plan.expected.errors.items():
            errors[position][str(value)] = error
        for row in rows:
            row["errors"] = errors[row["target"]]
    edges = ["    " + _json(row) for row in rows]
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": plan.fingerprint,
        "calls": plan.calls,
        **plan.given,
        "noise": None if plan.noise is None else asdict(plan.noise),
        "storage": plan.storage,
        "expected": expected,
        "summary": _summary(plan),
    }
    lines = [f"  {_json(name)}: {_json(value)}" for name, value in fields.items()]
    lines.append('  "edges": [' + ("\n" + ",\n".join(edges) + "\n  ]" if edges else "]"))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _summary(plan: Plan) -> dict[str, Any]:
    """Totals for the reader; loading makes them again."""
    return {
        "batch": plan.batch,
        "queries": plan.queries,
        "stage_evaluations": plan.stage_evaluations,
        "forward_equivalents": plan.forward_equivalents,
        "adjoints": plan.adjoints,
        "activation_bytes": plan.activation_bytes,
        "lowest_cosine": None if plan.expected is None else plan.expected.cosine,
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"expected a plan in {path}, which does not exist; save one there: hzo.save_plan") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; make it readable") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise PlanError(f"expected {path} to be JSON, as hzo.save_plan writes it: {error}; {_AGAIN}") from error


class _Fields:
    """A JSON object whose fields are taken one by one: none missing, none left over, each checked."""

    def __init__(self, values: Any, source: str) -> None:
        if not isinstance(values, dict):
            raise PlanError(f"expected {source} to be a JSON object, got {shown(values)}; {_AGAIN}")
        self.source = source
        self._left: dict[str, Any] = dict(values)

    def take(self, name: str, check: Callable[[Any], Any] = lambda value: value, missing: Any = None) -> Any:
        """What ``check`` makes of a field, ``missing`` where there is none; its errors say where it stands."""
        if name not in self._left:
            if missing is not None:
                return missing
            raise PlanError(f"{self.source}: the field {name!r} is missing; {_AGAIN}")
        value = self._left.pop(name)
        try:
            return check(value)
        except HzoError as error:
            raise PlanError(f"{self.source}, {name}: {error}; {_AGAIN}") from None

    def rows(self, name: str) -> list[_Fields]:
        """A field that is a list of objects."""
        found = self.take(name)
        if not isinstance(found, list):
            raise PlanError(f"expected {self.source}, {name}, to be a list, got {shown(found)}; {_AGAIN}")
        return [_Fields(row, f"{self.source}, {name}[{k}]") for k, row in enumerate(found)]

    def finish(self) -> None:
        if self._left:
            raise PlanError(f"{self.source}: unknown field {', '.join(map(repr, self._left))}; correct or remove it")


def _check_format(values: _Fields) -> None:
    if values.take("format") != FORMAT:
        raise PlanError(f"{values.source} is not a plan's file (its format is not {FORMAT!r}); {_AGAIN}")
    if (version := values.take("version")) != VERSION:
        raise PlanError(
            f"{values.source} is of version {shown(version)}, this hzo reads version {VERSION}; use the hzo that "
            "wrote it, or make the plan again"
        )


def _calls(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(call, str) for call in value):
        raise PlanError(f"expected a list of calls in words, got {shown(value)}")
    return tuple(value)


def _whole(low: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or value < low:
            raise PlanError(f"expected a whole number from {low} on, got {shown(value)}")
        if value > _MOST:
            raise PlanError(f"expected a whole number up to {_MOST:,}, got {shown(value)}")
        return value

    return check


def _at_least_zero(value: Any) -> float:
    if type(value) not in (int, float) or not value >= 0 or (type(value) is int and value > float_info.max):
        raise PlanError(f"expected a number from 0 on, got {shown(value)}")
    return float(value)


def _positive(value: Any) -> float | None:
    if value is not None and type(value) not in (int, float):
        raise PlanError(f"expected a positive finite number or null, got {shown(value)}")
    return None if value is None else positive("number", value)


def _seconds(value: Any) -> float | None:
    if value is not None and not isfinite(_at_least_zero(value)):
        raise PlanError("expected seconds to be finite, or null")
    return None if value is None else float(value)


def _storage(value: Any) -> Storage:
    return one_of("storage", value, get_args(Storage), PlanError)


def _noise(graph: Graph, value: Any) -> Noise | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"readout", "process"}:
        raise PlanError(f"expected an object of readout and process, or null, got {shown(value)}")
    levels: Mapping[str, Level] = {k: tuple(level) if isinstance(level, list) else level for k, level in value.items()}
    if any(isinstance(level, str) for level in levels.values()):
        raise PlanError(f"expected noise as numbers, got {shown(value)}")
    return Noise(**levels).for_stages(len(graph.stages))


def _options(graph: Graph, values: _Fields, source: str) -> PlanOptions:
    assume = values.take("assume", check_assume)
    found = {
        "tree": values.take("tree", check_tree),
        "assume": assume,
        "scheme": values.take("scheme", check_scheme),
        "step": values.take("step", _positive),
        "noise": values.take("noise", lambda noise: _noise(graph, noise)),
        "boundaries": values.take("boundaries", check_boundaries),
        "spacing": values.take("spacing", lambda spacing: check_spacing(spacing, assume)),
        "mu": values.take("mu", _positive),
        "draws": values.take("draws", _whole(1)),
    }
    try:
        return PlanOptions(**found)
    except PlanError as error:
        raise PlanError(f"{source}: {error}; {_AGAIN}") from error


def _planned_edge(row: _Fields) -> PlannedEdge:
    row.take("where")
    edge = PlannedEdge(row.take("target", _whole(0)), row.take("source", _whole(1)), row.take("repeats", _whole(1)))
    return replace(edge, relative_step=row.take("relative_step", _positive))


def _check_tree(graph: Graph, made: Plan, edges: list[PlannedEdge], source: str) -> None:
    """Whether every edge starts from what is known by then, and all that the plan must estimate is a target.

    Raises:
        PlanError: says which edge is at fault, or what is missing.
    """
    end = len(graph.operations)
    known = {end}
    for k, edge in enumerate(edges):
        where = f"{source}, edges[{k}] (target {edge.target}, source {edge.source})"
        if edge.target >= edge.source or edge.source > end:
            raise PlanError(f"{where}: expected target < source ≤ {end}, the chain's end; {_AGAIN}")
        if edge.source not in known:
            raise PlanError(f"{where}: no edge before it has its source as target; {_AGAIN}")
        if edge.target in known:
            raise PlanError(f"{where}: another edge has the same target; {_AGAIN}")
        known.add(edge.target)
    missing = [p for p, values in wanted_by(graph, made.boundaries).items() if values and p not in known]
    if missing:
        names = ", ".join(graph.describe(p) for p in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise PlanError(f"{source}: no edge estimates {names}; {_AGAIN}")


def _expected(values: _Fields, rows: list[_Fields], plan: Plan, source: str) -> Expected:
    """The errors of every node, from the edges; of every parameter, and the time."""
    asked = {(node.target, node.value) for node in plan.nodes}
    found: dict[tuple[int, int], float] = {}
    for row, edge in zip(rows, plan.edges, strict=True):
        errors = row.take("errors", _errors)
        found.update({(edge.target, int(value)): error for value, error in errors.items() if value.isdecimal()})
    if set(found) != asked:
        position, value = min(asked ^ set(found))
        raise PlanError(
            f"{source}: the errors are not those of this plan's estimates, first at target {position}, value {value}; "
            f"{_AGAIN}"
        )
    parameters = values.take("parameters", _errors)
    if not set(parameters) <= set(plan.trainable):
        unknown = min(set(parameters) - set(plan.trainable))
        raise PlanError(f"{source}: errors for {unknown!r}, which is no trainable parameter of this chain; {_AGAIN}")
    seconds = values.take("seconds", _seconds)
    values.finish()
    return Expected(found, parameters, seconds)


def _errors(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        raise PlanError(f"expected an object of errors, got {shown(values)}")
    return {name: _at_least_zero(error) for name, error in values.items()}

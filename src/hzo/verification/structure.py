"""``check_structure``: every promise that the library would use for a chain, tested numerically on the given input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hzo.declared import call_of, find_adjoint
from hzo.errors import StructureError
from hzo.execution import Activations, contained, copied, counting, query, run_with_parameter
from hzo.gradients import base_pass, by_rule, traced_for
from hzo.locality import slice_locality
from hzo.plans import has_rule
from hzo.structure import is_elementwise
from hzo.tracing import Chain, Graph, GraphOperation, ParameterUse, declared
from hzo.verification import properties
from hzo.verification.adjoint import dot_product_test
from hzo.verification.properties import PropertyResult

_NAMED = 8  # violations that an error spells out


@dataclass(frozen=True)
class Check:
    """One promise of one operation about one operand, and what its test found."""

    stage: str
    operation: str
    promise: str
    operand: str
    finding: PropertyResult

    def __str__(self) -> str:
        f = self.finding
        text = f"{self.stage}, {self.operation}: {self.promise} in {self.operand}: error {f.error:.2g}"
        return f"{text}, tolerance {f.tolerance:.2g}, {f.tests} tests"


@dataclass(frozen=True)
class StructureReport:
    """The result of ``hzo.check_structure``: every promise tested, with its error and tolerance; ``print`` shows it.

    All that were tested hold, or there would be an error; those that could not be tested are listed.
    """

    checks: tuple[Check, ...]

    def __str__(self) -> str:
        promises: dict[str, list[Check]] = {}
        for check in self.checks:
            promises.setdefault(check.promise, []).append(check)
        untested = [check for check in self.checks if not check.finding.tests]
        lines = [f"{len(self.checks) - len(untested)} promises hold"]
        lines += [f"  not tested: {c.promise}, {c.operation} in {c.stage}: {c.finding.where}" for c in untested]
        for promise, checks in promises.items():
            worst = max(checks, key=lambda c: c.finding.error / max(c.finding.tolerance, 1e-300))
            lines.append(
                f"  {promise}: {len(checks)}, worst error {worst.finding.error:.2g} of a tolerance of "
                f"{worst.finding.tolerance:.2g} ({worst.operation} in {worst.stage})"
            )
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(frozen=True)
class _StructureTest:
    graph: Graph
    activations: Activations
    generator: torch.Generator
    coordinates: int


@torch.no_grad()
def check_structure(model: Chain | nn.Module, x: Any, *, coordinates: int = 16, seed: int = 0) -> StructureReport:
    """Test by perturbation, at a given input, what hzo assumes about each operation of a model.

    Tested of every operation: that it is deterministic, keeps samples apart (where it is not known to couple them), is
    elementwise, affine or local where that is promised, that its adjoint rule is the adjoint of what it computes, and
    that the closed parameter rules are those of what it computes.

    Args:
        model: a chain, traced or not, or a module.
        x: input with the batch first, as for ``hzo.trace``; two samples at least, or samples cannot be told apart.
        coordinates: single elements of each sample along which an adjoint is tested, beside random directions.
        seed: of directions and moves, drawn apart from the global random state.

    Cost: some hundred runs of every operation, counted as ``check_evaluations``. Buffers, random state and training
    flags are as before. Source: ours; the dot-product test: textbook.

    Raises:
        StructureError: names stage, operation, promise, positions and size of every violation.
        See ``hzo.trace`` for what it raises.
    """
    chain = traced_for(model, x, strict=False)
    graph = chain.traced
    modules = [chain.model, *graph.opaque_modules]
    with contained(modules), counting.as_checks():
        activations, _ = base_pass(chain, copied(x))
        task = _StructureTest(graph, activations, torch.Generator().manual_seed(seed), coordinates)
        checks = [
            Check(_stage(graph, op), op.name, promise, operand, finding)
            for op in graph.operations
            if op.deterministic  # of others plans assume nothing
            for promise, operand, finding in (*_operand_checks(task, op), *_parameter_checks(task, op))
        ]
    broken = [check for check in checks if not check.finding.holds]
    if broken:
        raise StructureError(_message(broken))
    return StructureReport(tuple(checks))


def _stage(graph: Graph, op: GraphOperation) -> str:
    k = graph.stage_of[op.index]
    return f"stage {k} ({graph.stages[k].name})"


def _message(broken: list[Check]) -> str:
    lines = [f"{len(broken)} of the promises that plans rely on do not hold for this input:"]
    for check in broken[:_NAMED]:
        f = check.finding
        lines.append(
            f"  {check.stage}, operation {check.operation}: promise {check.promise!r} about {check.operand}: "
            f"{f.where}; expected {f.expected:.6g}, got {f.got:.6g}: off by {f.error:.3g}, tolerance {f.tolerance:.3g}"
        )
    if len(broken) > _NAMED:
        lines.append(f"  … and {len(broken) - _NAMED} more")
    lines.append(
        "Declare what does hold: hzo.declare(module, *hzo.infer_structure(module, x)), or nothing: "
        "hzo.declare(module); or assume nothing: hzo.plan(chain, assume='nothing')"
    )
    return "\n".join(lines)


Found = Iterator[tuple[str, str, PropertyResult]]
"""Promise, operand in words, finding."""


def _operand_checks(task: _StructureTest, op: GraphOperation) -> Found:
    graph, activations, generator = task.graph, task.activations, task.generator
    outputs = _handed_on(graph, op)
    if not op.batched or not outputs:
        return
    for value in op.reads:
        found = graph.values[value]
        if not found.batched or found.batch_dim is None or not found.floating:
            continue
        if not bool(activations.tensor(value).isfinite().all()):
            continue
        rows = found.rows(activations.tensor(value), activations.batch)
        shape = graph.values[value].row_shape
        operand = f"its operand of shape {'×'.join(map(str, found.sample_shape))}"

        def run(moved: Tensor, value: int = value) -> list[Tensor]:
            state = {value: graph.values[value].rows_to_copies(moved, activations.batch)}
            written = query(graph, op, activations, state, 1)
            counting.add(check_evaluations=activations.batch)
            return [graph.values[v].copies_to_rows(written[v], activations.batch) for v in outputs]

        yield "deterministic", operand, properties.deterministic(run, rows)
        declared_rule = find_adjoint(graph, op, value)
        promise = op.rule if has_rule(op) else declared_rule.promise if declared_rule is not None else None
        if not op.coupled or declared(op.module):  # whatever is declared, is declared of each sample
            yield "samples apart", operand, properties.samples_apart(run, rows, generator)
        yield from ((p, operand, f) for p, f in _declared_checks(task, op, run, rows, shape))
        if not op.coupled:
            same = all(graph.values[v].sample_shape == found.sample_shape for v in outputs)
            if is_elementwise(op) and same:
                yield "elementwise", operand, properties.elementwise(run, rows, shape, generator)
            else:
                patterns = slice_locality(graph, value, [op.index], outputs).patterns
                for k, pattern in enumerate(patterns):
                    if any(pattern.links):
                        yield "local", operand, properties.local(run, rows, pattern, k, generator)
        if promise is not None:
            yield f"adjoint rule ({promise})", operand, _adjoint_check(task, op, value, run, rows)


def _handed_on(graph: Graph, op: GraphOperation) -> list[int]:
    """The results that something reads: a rule is asked for no others, the statistics of a norm, say."""
    read = [v for v in op.writes if graph.values[v].floating and graph.last_read[v] > op.index]
    return [v for v in read if not graph.values[v].batched or graph.values[v].batch_dim is not None]


def _declared_checks(
    task: _StructureTest, op: GraphOperation, run: properties.Evaluate, rows: Tensor, shape: tuple[int, ...]
) -> Iterator[tuple[str, PropertyResult]]:
    """Promises that no rule of the library spells out for this call, and which must hold all the same."""
    promises = declared(op.module) or ()
    value = task.graph.values[op.writes[0]]
    came = f"{shape[1:]} goes in and {value.sample_shape[1:]} comes out"
    if "elementwise" in promises and shape != value.sample_shape:
        yield "elementwise", PropertyResult(float("inf"), 0.0, 0, came)
    if "affine" in promises:
        yield "affine", properties.affine(run, rows, task.generator)
    if "symmetric" in promises:
        yield "symmetric", properties.symmetric(run, rows, task.generator)
    if "tokens" in promises:
        if task.graph.values[op.reads[0]].shape[:-1] != value.shape[:-1]:
            yield "tokens", PropertyResult(float("inf"), 0.0, 0, came)
        else:
            yield "tokens", properties.alike(run, rows, rows.shape[1] // shape[-1], task.generator)


def _adjoint_check(
    task: _StructureTest, op: GraphOperation, value: int, run: properties.Evaluate, rows: Tensor
) -> PropertyResult:
    graph, activations = task.graph, task.activations
    outputs = _handed_on(graph, op)

    def carry(cotangents: list[Tensor]) -> Tensor:
        given = {v: graph.values[v].from_rows(g, activations.batch) for v, g in zip(outputs, cotangents, strict=True)}
        return graph.values[value].rows(_carried(task, op, value, given), activations.batch)

    apart = not op.coupled
    shape = graph.values[value].row_shape
    try:
        return dot_product_test(run, carry, rows, shape, task.generator, apart=apart, coordinates=task.coordinates)
    except Exception as error:  # a rule for another operation than this one may fail in any way
        words = f"the rule fails: {type(error).__name__}: {error}"
        return PropertyResult(float("inf"), 0.0, 0, words)


def _carried(task: _StructureTest, op: GraphOperation, value: int, cotangents: dict[int, Tensor]) -> Tensor:
    """What the engine would get of the rule, or of what was declared: the operand's cotangent."""
    graph, activations = task.graph, task.activations
    adjoint = find_adjoint(graph, op, value)
    if adjoint is not None:
        return adjoint.apply(call_of(graph, op, activations, value, cotangents), value)
    return by_rule(graph, activations, op, cotangents, frozenset({value}))[value]


def _parameter_checks(task: _StructureTest, op: GraphOperation) -> Found:
    if has_rule(op) and _handed_on(task.graph, op):
        for use in op.parameters:
            yield "parameter rule", use.name or _derived(task.graph, use), _parameter_check(task, op, use)


def _derived(graph: Graph, use: ParameterUse) -> str:
    """A value derived from parameters, in words that name these."""
    behind, names = [use.value], []
    while behind:
        value = behind.pop()
        if value in graph.names:
            names.append(graph.names[value])
        elif graph.values[value].producer >= 0:
            behind += graph.operations[graph.values[value].producer].reads
    return f"what is derived of {', '.join(dict.fromkeys(names))}" if names else "a derived operand"


def _parameter_check(task: _StructureTest, op: GraphOperation, use: ParameterUse) -> PropertyResult:
    """The rule assumes that an operator computes what its name says."""
    graph, activations = task.graph, task.activations
    outputs = _handed_on(graph, op)
    parameter = activations.tensor(use.value)

    def run(moved: Tensor) -> list[Tensor]:
        results = run_with_parameter(graph, op, activations, use.value, moved.reshape(parameter.shape))
        return [results[v].reshape(1, -1) for v in outputs]

    def carry(cotangents: list[Tensor]) -> Tensor:
        given = {v: g.view(activations.tensor(v).shape) for v, g in zip(outputs, cotangents, strict=True)}
        return by_rule(graph, activations, op, given, frozenset({use.value}))[use.value].reshape(1, -1)

    rows = parameter.detach().reshape(1, -1)
    return dot_product_test(run, carry, rows, tuple(parameter.shape), task.generator, coordinates=task.coordinates)

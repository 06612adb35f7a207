"""Plans as tables on a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

import hzo
from hzo.finite_differences import evaluations
from hzo.plans import Cost, Node, expectation
from hzo_lab.reports.plan_report import PlannedTree
from hzo_lab.reports.progress_display import large


def _table(title: str, *numbers: str, first: Sequence[str]) -> Table:
    shown = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )
    for name in first:
        shown.add_column(name, no_wrap=True, overflow="ellipsis")
    for name in numbers:
        shown.add_column(name, justify="right", no_wrap=True)
    return shown


def node_table(plan: hzo.Plan, rows: int, width: int) -> Table:
    """One row a node, in the order in which they run; of many the first and the last. Fits ``width`` columns."""
    nodes = [node for node in plan.nodes if node.operations]
    hidden = nodes[(rows + 1) // 2 : len(nodes) - rows // 2] if len(nodes) > rows else []
    names = ["directions", "repeats", "step", "forward eq.", "share", *(["cosine"] if plan.expected else [])]
    title = f"tree {plan.tree}, assume {plan.assume}, {plan.scheme} differences"
    shown = _table(title, *names, first=("cotangent at", "from", "probe"))
    for node in nodes:
        if hidden and node is hidden[0]:
            cost = sum((other.cost for other in hidden), start=Cost())
            shown.add_row(f"… {len(hidden)} more …", "", "", "", "", "", *_price(plan, cost), style="dim")
        if not any(node is other for other in hidden):
            shown.add_row(*_cells(plan, node))
    # Numbers are shown whole, labels take what is left.
    target, source, *others = ([str(cell) for cell in (column.header, *column.cells)] for column in shown.columns)
    left = width - sum(2 + max(map(len, cells)) for cells in others) - 2
    longest = max(map(len, source))
    shown.columns[0].max_width = max(6, left - longest, left // 2)
    shown.columns[1].max_width = max(6, left - min(max(map(len, target)), shown.columns[0].max_width))
    return shown


def _place(label: str) -> str:
    """A label without the name of its stage."""
    return re.sub(r"^inside (stage \d+) \(.*\), ", r"\1, ", label)


def _cells(plan: hzo.Plan, node: Node) -> tuple[str, ...]:
    probe = node.probe
    step = plan.step if node.relative_step is None else node.relative_step
    return (
        _place(plan.labels[node.target]),
        _place(plan.labels[node.source]),
        str(node.estimator) if probe is None else probe.kind,
        "-" if probe is None else f"{probe.directions:,} × {evaluations(plan.scheme)}",
        f"{node.repeats:,}",
        "-" if probe is None else "auto" if step is None else f"{step:.3g}",
        *_price(plan, node.cost),
        *([] if plan.expected is None else [f"{plan.expected.cosine_of((node.target, node.value)):.4f}"]),
    )


def _price(plan: hzo.Plan, cost: Cost) -> tuple[str, str]:
    spent, whole = cost.forward_equivalents_of(plan.batch), plan.cost.forward_equivalents_of(plan.batch)
    return f"{float(spent):,.2f}", f"{float(spent / whole):.1%}" if whole else "-"


def totals(plan: hzo.Plan) -> list[str]:
    """What one gradient takes and gives, a line each."""
    lines = [
        f"one gradient of {plan.batch} samples: {plan.queries:,} queries, {plan.stage_evaluations:,} stage "
        f"evaluations, {plan.forward_equivalents:,.2f} forward equivalents, {plan.adjoints:,} adjoints",
        expectation(plan),
        f"memory: activations of {'all stages' if plan.storage == 'all' else 'a path'} stored, at most "
        f"{plan.activation_bytes:,} bytes at once, {plan.recomputed:,} stages run again",
    ]
    lines += [] if plan.mesh is None else str(plan.mesh).splitlines()
    if plan.perturbed:
        elements = sum(probe.elements for probe in plan.perturbed)
        lines.append(f"parameters without a closed rule, perturbed one by one: {elements:,} elements")
    return lines


def comparison_table(outcomes: Sequence[PlannedTree], title: str) -> Table:
    """One row a tree; the cheapest in bold. Columns that would be empty are left out."""
    plans = [outcome.plan for outcome in outcomes if outcome.plan is not None]
    adjoints = any(plan.adjoints for plan in plans)
    timed = any(plan.expected is not None and plan.expected.seconds is not None for plan in plans)
    run = any(outcome.measured is not None for outcome in outcomes)
    numbers = ["queries", "stage ev.", "forward eq.", *(["adjoints"] if adjoints else []), "cosine"]
    numbers += ["seconds"] if timed else []
    numbers += ["counted", "expected", "measured", "took, s"] if run else []
    shown = _table(title, *numbers, first=("tree", "repeats"))
    if any(outcome.reason for outcome in outcomes):
        shown.add_column("", overflow="fold", ratio=1)
    cheapest = min((plan.forward_equivalents for plan in plans), default=0.0)
    for outcome in outcomes:
        plan, found = outcome.plan, outcome.measured
        cells = ["-"] * len(numbers)
        if plan is not None:
            expected = plan.expected
            cells = [large(plan.queries), large(plan.stage_evaluations), _amount(plan.forward_equivalents)]
            cells += [large(plan.adjoints)] if adjoints else []
            cells += [_cosine(None if expected is None else expected.cosine)]
            cells += [_seconds(None if expected is None else expected.seconds)] if timed else []
            if run and found is not None:
                cells += [_amount(found.forward_equivalents), _cosine(found.expected), _cosine(found.cosine)]
                cells += [_seconds(found.seconds)]
            elif run:
                cells += ["-"] * 4
        best = plan is not None and plan.forward_equivalents == cheapest
        repeats = "-" if outcome.repeats == "1" else outcome.repeats
        shown.add_row(
            outcome.tree, repeats, *cells, *([outcome.reason] if outcome.reason else []), style="bold" if best else ""
        )
    return shown


def explanations(outcomes: Sequence[PlannedTree]) -> list[str]:
    """What the columns of a comparison mean, as far as it has them."""
    plans = [outcome.plan for outcome in outcomes if outcome.plan is not None]
    if not plans:
        return []
    lines = ["predicted for one gradient of the batch; forward eq.: operations of all queries over one forward pass's"]
    if any(plan.expected is not None for plan in plans):
        lines.append("cosine: the lowest that is expected of an estimated cotangent")
    else:
        lines.append("no cosine is predicted without a noise, a target or --calibrate")
    if any(outcome.measured is not None for outcome in outcomes):
        lines.append(
            "run: forward eq. counted; the lowest cosine at a stage boundary, expected and measured against the exact "
            "cotangents; the time it took"
        )
    return lines


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"

"""What is shown of runs and plans: tables, drawings, comparisons."""

from hzo_lab.reports.plan_drawing import check_picture, draw
from hzo_lab.reports.plan_report import (
    PlannedNetwork,
    PlannedTree,
    all_trees,
    exact_cotangents,
    forward_seconds,
    measured,
    planned_network,
)
from hzo_lab.reports.plan_tables import comparison_table, explanations, node_table, totals
from hzo_lab.reports.progress_display import clock, display, large, percent

__all__ = [
    "PlannedNetwork",
    "PlannedTree",
    "all_trees",
    "check_picture",
    "clock",
    "comparison_table",
    "display",
    "draw",
    "exact_cotangents",
    "explanations",
    "forward_seconds",
    "large",
    "measured",
    "node_table",
    "percent",
    "planned_network",
    "totals",
]

"""Counted stage evaluations beside recurrences and formulas, for all trees: claim 2 of the paper, and its Fig. 4.

Our reading of "query complexity" is stage evaluations: all trees make the same number of queries, M·(L−1) a sample;
what falls from L² to L·log L is how long they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from math import log2

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from torch import nn

import hzo
from hzo.plans import Tree
from hzo_lab.paper.finding import Finding, Row, Setting, in_words, select, verdict
from hzo_lab.paper.measure import exponent
from hzo_lab.paper.plotting import MARKERS, TREE_COLORS, new_figure, tree_name

CLAIM = "The query complexity falls from O(ML²) to O(ML log L), by a recurrence."
COMPARED: tuple[Tree, ...] = ("flat", "bisect", "stagewise", 4, "planned")
BATCH = 2
READING = (
    "Query complexity is read as stage evaluations for one sample, one of the readings that the abstract leaves open: "
    "the number of queries is M·(L−1) for every tree.",
    "Chains of nn.Linear(M, M), forward differences, assume='nothing'; central differences cost twice that.",
)
# Of cost ~ L^e, the logarithm divided out where the formula has one.
EXPONENTS = {"flat": 2, "bisect": 1, "stagewise": 1, "4-ary": 1, "planned": 1}
LOGARITHMIC = ("bisect", "4-ary")
SLACK = 0.05


@cache
def segments(tree: Tree, depth: int) -> int:
    """Stages that one direction of every boundary runs, by the recurrences; times M, the cost for one sample.

    Bisection: T(1) = 0, T(n) = ⌈n/2⌉ + T(⌊n/2⌋) + T(⌈n/2⌉) (paper). The cheapest tree is stagewise here, where all
    stages have one width (ours).
    """
    if depth <= 1:
        return 0
    if tree == "flat":
        return depth * (depth - 1) // 2
    if tree in ("stagewise", "planned"):
        return depth - 1
    parts = 2 if tree == "bisect" else int(tree)
    cuts = sorted({q * depth // parts for q in range(parts)} | {depth})
    inner = sum(segments(tree, right - left) for left, right in pairwise(cuts))
    return inner + sum(depth - cut for cut in cuts[1:-1])


def count(tree: Tree, depth: int, width: int, device: torch.device) -> Row:
    """One gradient of a chain of linear layers, counted, beside plan and formula."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).to(device)
    x = torch.randn(BATCH, width, device=device)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, tree, assume="nothing", scheme="forward")
    with hzo.count_queries() as counted:
        hzo.grad_and_value(chain, F.mse_loss, x, torch.zeros_like(x), plan=plan)
    return {
        "tree": tree_name(tree), "L": depth, "M": width, "formula": width * segments(tree, depth),
        "counted": counted.stage_evaluations / BATCH, "predicted": plan.stage_evaluations / BATCH,
        "queries": counted.queries / BATCH,
    }  # fmt: skip


def count_trees(setting: Setting, name: str, points: Sequence[tuple[int, int]]) -> list[Row]:
    """Rows of all trees at these (L, M)."""
    rows = []
    for depth, width in points:
        rows += [count(tree, depth, width, setting.device) for tree in COMPARED]
        if depth & (depth - 1) == 0:
            setting.tell(f"{name}: L = {depth}, M = {width}")
    return rows


def equal(rows: list[Row]) -> dict[str, bool]:
    """What was counted is what the formula says, to the last evaluation."""
    return {
        "counted = formula": all(row["counted"] == row["formula"] for row in rows),
        "counted = predicted by the plan": all(row["counted"] == row["predicted"] for row in rows),
        "M·(L−1) queries, whatever the tree": all(row["queries"] == row["M"] * (row["L"] - 1) for row in rows),
    }


def complexity(setting: Setting) -> Finding:
    """Every depth, powers of two or not: the counts are the recurrences'."""
    torch.manual_seed(0)
    depths = (2, 3, 5, 8, 11, 16) if setting.smoke else tuple(range(2, 65))
    rows = count_trees(setting, "complexity", [(depth, 4) for depth in depths])
    parts = equal(rows)
    last = {row["tree"]: row["counted"] for row in select(rows, L=max(depths))}
    found = (
        f"Counted = recurrence = plan in all {len(rows)} cases, L from {min(depths)} to {max(depths)}. At L = "
        f"{max(depths)}, M = 4: " + ", ".join(f"{tree} {cost:,.0f}" for tree, cost in last.items()) + "."
        if all(parts.values())
        else in_words(parts).strip()
    )
    return Finding(
        claim=CLAIM, found=found, verdict=verdict(parts), rows=rows, plot=plot_recurrences(rows), seeds=(0,),
        configuration={"L": list(depths), "M": 4, "batch": BATCH}, summary={"evaluations_at_largest_L": last},
        notes=READING,
    )  # fmt: skip


def plot_recurrences(rows: list[Row]) -> Figure:
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    depths = range(2, max(row["L"] for row in rows) + 1)
    for tree in COMPARED:
        name, mine = tree_name(tree), select(rows, tree=tree_name(tree))
        axes.plot(depths, [segments(tree, n) for n in depths], color=TREE_COLORS[name], lw=1)
        axes.plot(
            [r["L"] for r in mine], [r["counted"] / r["M"] for r in mine], MARKERS[name], color=TREE_COLORS[name],
            ms=4, label=name, ls="",
        )  # fmt: skip
    axes.set(yscale="log", xlabel="depth L", ylabel="stage evaluations / M, one sample")
    axes.set_title("Points: counted. Lines: recurrences")
    axes.legend()
    return figure


def fig4(setting: Setting) -> Finding:
    """Powers of two and four, log-log: exponents of L and of M."""
    torch.manual_seed(0)
    depths, widths = ((16, 32, 64), (2, 4, 8)) if setting.smoke else ((16, 32, 64, 128, 256), (2, 4, 8, 16, 32, 64))
    fixed_width, fixed_depth = 4, 16
    points = dict.fromkeys([(depth, fixed_width) for depth in depths] + [(fixed_depth, width) for width in widths])
    rows = count_trees(setting, "fig4", list(points))
    fitted = exponents(rows, fixed_width, fixed_depth)
    parts = {**equal(rows), **judge(fitted)}
    found = (
        "Cost ~ M^e: "
        + ", ".join(f"{tree} {e['M']:.3f}" for tree, e in fitted.items())
        + ". Cost ~ L^e (over log L for bisect and 4-ary): "
        + ", ".join(f"{tree} {e['L']:.3f}" for tree, e in fitted.items())
        + "."
        + in_words(parts)
    )
    return Finding(
        claim=CLAIM + " (Fig. 4 compares the complexities.)", found=found, verdict=verdict(parts), rows=rows,
        plot=plot_exponents(rows, fitted, fixed_width, fixed_depth), seeds=(0,),
        configuration={"L": list(depths), "M": list(widths), "batch": BATCH, "fixed_M": fixed_width,
                       "fixed_L": fixed_depth},
        summary={"exponents": fitted, "expected": EXPONENTS}, notes=READING,
    )  # fmt: skip


def exponents(rows: list[Row], width: int, depth: int) -> dict[str, dict[str, float]]:
    """By tree, those of L and M; for L·log L of the cost over log₂ L. 4-ary trees at powers of four, where their
    formula is exact."""
    found = {}
    for tree in EXPONENTS:
        over_l = [r for r in select(rows, tree=tree, M=width) if tree != "4-ary" or log2(r["L"]) % 2 == 0]
        over_m = select(rows, tree=tree, L=depth)
        cost = [r["counted"] / (log2(r["L"]) if tree in LOGARITHMIC else 1) for r in over_l]
        found[tree] = {
            "L": exponent([r["L"] for r in over_l], cost),
            "M": exponent([r["M"] for r in over_m], [r["counted"] for r in over_m]),
        }
    return found


def judge(fitted: dict[str, dict[str, float]]) -> dict[str, bool]:
    return {
        "exponents of L": all(abs(fitted[tree]["L"] - e) <= SLACK for tree, e in EXPONENTS.items()),
        "exponents of M": all(abs(e["M"] - 1) <= SLACK for e in fitted.values()),
    }


def plot_exponents(rows: list[Row], fitted: dict[str, dict[str, float]], width: int, depth: int) -> Figure:
    figure = new_figure(10, 4.4)
    over_depth, over_width = figure.subplots(1, 2)
    for tree in COMPARED:
        name = tree_name(tree)

        def draw(axes: Axes, key: str, mine: list[Row], label: str, name: str = name) -> None:
            style = {"color": TREE_COLORS[name], "marker": MARKERS[name], "ms": 5}
            axes.loglog([r[key] for r in mine], [r["counted"] for r in mine], ls="", label=label, **style)
            axes.loglog([r[key] for r in mine], [r["formula"] for r in mine], color=TREE_COLORS[name], lw=1)

        power = f"L^{fitted[name]['L']:.2f}" + (" log L" if name in LOGARITHMIC else "")
        draw(over_depth, "L", sorted(select(rows, tree=name, M=width), key=lambda r: r["L"]), f"{name}: {power}")
        mine = sorted(select(rows, tree=name, L=depth), key=lambda r: r["M"])
        draw(over_width, "M", mine, f"{name}: M^{fitted[name]['M']:.2f}")
    over_depth.set(xlabel="depth L", ylabel="stage evaluations, one sample", title=f"M = {width}")
    over_width.set(xlabel="width M", title=f"L = {depth}")
    for axes in (over_depth, over_width):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.legend(fontsize=9)
    figure.suptitle("Points: counted. Lines: formulas. Exponents fitted to the points", fontsize=10, x=0.01, ha="left")
    return figure

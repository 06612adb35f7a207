"""What each tree costs that keeps one target at every boundary: 64 stages, readout noise 1e-3, cosine 0.997.

    python experiments/depth64.py              # writes results/planner/depth64.json and .png

Stages of width 64, orthogonal linear ones and residual ones with tanh, nothing assumed of them. Each tree gets the
repeats that keep the target: one number for all nodes, or each node its own. Predicted and counted cost are compared,
and the lowest cosine over all boundaries but the output is measured, the lowest of three draws of the noise. Then with
the steps free, and the tree's shape as the noise grows.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import hzo
from common import WIDTH, cosine, data, network, options, table, write
from hzo.plans import longest_path

DEPTH, NOISE, STEP, TARGET = 64, 1e-3, 0.1, 0.997
COMPARED = (
    ("flat", "uniform"),
    ("stagewise", "uniform"),
    ("bisect", "uniform"),
    ("flat", "optimal"),
    ("stagewise", "optimal"),
    ("bisect", "optimal"),
    ("planned", "optimal"),
)


def orthogonal() -> nn.Sequential:
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*layers)


def compare(kind: str, model: nn.Sequential, draws: int, step: float | None) -> list[dict[str, Any]]:
    x, y = data()
    chain = hzo.trace(model, x)
    exact = hzo.cotangents(chain, F.mse_loss, x, y, boundaries="all")
    known = None if step is not None else hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing")
    rows = []
    for tree, repeats in COMPARED:
        if step is None and tree == "flat":
            continue  # its long segments are never worth their price, and take minutes
        plan = hzo.plan(
            chain,
            tree,
            assume="nothing",
            boundaries="all",
            step=step,
            noise=NOISE,
            calibration=known,
            target_cosine=TARGET,
            repeats=repeats,
        )
        with hzo.count_queries() as count:
            noisy = hzo.noisy(chain, readout=NOISE, seed=0)
            found = [hzo.cotangents(noisy, F.mse_loss, x, y, plan=plan) for _ in range(draws)]
        lowest = [min(cosine(a, b) for a, b in zip(one[:-1], exact[:-1], strict=True)) for one in found]
        assert plan.expected is not None
        rows.append(
            {
                "stages": kind,
                "step": "0.1" if step else "free",
                "tree": tree,
                "repeats": repeats,
                "cost": plan.forward_equivalents,
                "counted": count.forward_equivalents / draws,
                "stage_evaluations": plan.stage_evaluations,
                "expected": plan.expected.cosine,
                "measured": min(lowest),
                "path": longest_path([(n.target, n.source) for n in plan.nodes]),
                "most_repeats": max(n.repeats for n in plan.nodes),
            }
        )
    return rows


def shapes(levels: tuple[float, ...]) -> list[dict[str, Any]]:
    """The planned tree as the noise grows, beside what it saves."""
    x, _ = data()
    chain = hzo.trace(orthogonal(), x)
    rows = []
    for level in levels:
        given: dict[str, Any] = {"assume": "nothing", "boundaries": "all", "step": STEP, "noise": level}
        price = {
            t: hzo.plan(chain, t, target_cosine=TARGET, **given) for t in ("planned", "bisect", "stagewise", "flat")
        }
        edges = [(n.target, n.source) for n in price["planned"].nodes]
        rows.append(
            {
                "noise": level,
                "path": longest_path(edges),
                "mean_length": sum(s - t for t, s in edges) / len(edges),
                **{name: plan.forward_equivalents for name, plan in price.items()},
            }
        )
    return rows


def main() -> None:
    given = options(__doc__ or "")
    draws = 1 if given.quick else 3
    rows = []
    for kind, model in (("orthogonal", orthogonal()), ("residual tanh", network("residual", "tanh", DEPTH))):
        rows += compare(kind, model, draws, STEP)
        if not given.quick:
            rows += compare(kind, model, draws, None)
    columns = ("stages", "step", "tree", "repeats", "cost", "counted", "expected", "measured", "path", "most_repeats")
    table(rows, columns)
    summary = []
    for kind in ("orthogonal", "residual tanh"):
        fixed = [row for row in rows if row["stages"] == kind and row["step"] == "0.1"]
        best = min(row["cost"] for row in fixed if row["repeats"] == "uniform")
        cost = {(row["tree"], row["repeats"]): row["cost"] for row in fixed}
        planned = cost["planned", "optimal"]
        summary.append(
            {
                "stages": kind,
                "planned_over_best_uniform": planned / best,
                "bisect_optimal_over_planned": cost["bisect", "optimal"] / planned,
            }
        )
    table(summary, tuple(summary[0]))
    levels = (3e-6, 1e-5, 3e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)
    growing = shapes(levels[::4] if given.quick else levels)
    table(growing, tuple(growing[0]))

    figure = Figure((11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    fixed = [row for row in rows if row["stages"] == "orthogonal" and row["step"] == "0.1"]
    names = [f"{row['tree']}\n{row['repeats']}" for row in fixed]
    bars = left.bar(names, [row["cost"] for row in fixed], color="#4477aa")
    left.bar_label(bars, [f"{row['measured']:.4f}" for row in fixed], fontsize=8)
    left.set(yscale="log", ylabel="forward equivalents of a gradient")
    left.set_title("Price of a cosine of 0.997 at each of 64 boundaries\n(above the bars: measured)", fontsize=10)
    left.tick_params(axis="x", labelsize=7)
    for name, colour in (("flat", "#ccbb44"), ("stagewise", "#66ccee"), ("bisect", "#ee6677"), ("planned", "#228833")):
        right.plot([row["noise"] for row in growing], [row[name] for row in growing], "o-", label=name, color=colour)
    for row in growing:
        right.annotate(
            str(row["path"]), (row["noise"], row["planned"]), (0, -13), textcoords="offset points", fontsize=7
        )
    right.set(xscale="log", yscale="log", xlabel="readout noise", ylabel="forward equivalents of a gradient")
    right.set_title("Each with its best repeats\n(below the points: longest path of the planned tree)", fontsize=10)
    right.legend(frameon=False)
    write("depth64", given, figure, rows=rows, summary=summary, growing=growing, target=TARGET, readout=NOISE)


if __name__ == "__main__":
    main()

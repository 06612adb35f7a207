"""How the price of a cosine grows with depth, tree by tree: the recursions, and plans that were run.

    python experiments/asymptotics.py          # writes results/planner/asymptotics.json and .png

Orthogonal stages of width 16, readout noise so high that a node of length one needs 40 repeats
to keep the target by itself. Lines: cost by the recursions with repeats that need not be whole, in units of one stage
evaluation of all directions at one repeat for the whole error. Points: stage evaluations that were counted, in the same
units; numbers: the lowest cosine that was measured.
"""

from __future__ import annotations

from math import log, sqrt
from typing import Any

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn, randn

import hzo
from common import cosine, options, table, write
from hzo.plans import b_ary, flat, longest_path, stagewise, total_length

WIDTH, BATCH, STEP, TARGET, PRICE = 16, 64, 0.1, 0.99, 40
ERROR = -2 * log(TARGET)


def planned(n: int) -> list[float]:
    """v(n) = min over m of (√m + √v(n−m))² + v(m)."""
    v = [0.0, 0.0]
    for length in range(2, n + 1):
        v.append(min((sqrt(m) + sqrt(v[length - m])) ** 2 + v[m] for m in range(1, length)))
    return v


def bisect_optimal(n: int, known: dict[int, float]) -> float:
    """The same recursion with m = ⌈n/2⌉."""
    if n < 2:
        return 0.0
    if n not in known:
        m = (n + 1) // 2
        known[n] = (sqrt(m) + sqrt(bisect_optimal(n - m, known))) ** 2 + bisect_optimal(m, known)
    return known[n]


def curves(depths: list[int]) -> dict[str, list[float]]:
    best = planned(max(depths))

    def uniform(edges: list[tuple[int, int]]) -> float:
        return float(total_length(edges) * longest_path(edges))

    return {
        "flat": [uniform(flat(n)) for n in depths],
        "stagewise": [uniform(stagewise(n)) for n in depths],
        "bisect, uniform": [uniform(b_ary(n, 2)) for n in depths],
        "4-ary, uniform": [uniform(b_ary(n, 4)) for n in depths],
        "bisect, optimal": [bisect_optimal(n, {}) for n in depths],
        "planned": [best[n] for n in depths],
    }


def points(depths: list[int]) -> list[dict[str, Any]]:
    rows = []
    noise = sqrt(2 * STEP**2 * ERROR * PRICE / WIDTH)  # of a node: WIDTH · noise² / (2 step²) = PRICE · ERROR
    trees = (("flat", "uniform"), ("stagewise", "uniform"), ("bisect", "uniform"), (4, "uniform"))
    for n in depths:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n)))
        for layer in model:
            nn.init.orthogonal_(layer.weight)
        x, y = randn(BATCH, WIDTH), randn(BATCH, WIDTH)
        chain = hzo.trace(model, x)
        exact = hzo.cotangents(chain, F.mse_loss, x, y, boundaries="all")[1:-1]
        for tree, repeats in (*trees, ("bisect", "optimal"), ("planned", "optimal")):
            plan = hzo.plan(
                chain, tree, assume="nothing", step=STEP, noise=noise, target_cosine=TARGET, repeats=repeats
            )
            units = plan.stage_evaluations / (2 * WIDTH * BATCH * PRICE)
            row = {"depth": n, "tree": str(tree), "repeats": repeats, "units": units, "measured": None}
            if units < 1500:  # what lies above would run for minutes
                with hzo.count_queries() as count:
                    found = hzo.cotangents(hzo.noisy(chain, noise), F.mse_loss, x, y, plan=plan)[1:-1]
                assert count.stage_evaluations == plan.stage_evaluations
                row["measured"] = min(cosine(a, b) for a, b in zip(found, exact, strict=True))
            rows.append(row)
    return rows


def main() -> None:
    given = options(__doc__ or "")
    depths = [4, 8, 16, 32, 64, 128, 256, 512]
    lines = curves(depths)
    table(
        [{"depth": n, **{name: line[k] for name, line in lines.items()}} for k, n in enumerate(depths)],
        ("depth", *lines),
    )
    rows = points([8, 16] if given.quick else [8, 16, 32, 64])
    table(rows, tuple(rows[0]))
    figure = Figure((7.5, 5), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(lines, ("#ccbb44", "#66ccee", "#ee6677", "#aa3377", "#4477aa", "#228833"), strict=True))
    for name, line in lines.items():
        axes.plot(depths, line, color=colours[name], label=name)
    names = {("flat", "uniform"): "flat", ("stagewise", "uniform"): "stagewise", ("4", "uniform"): "4-ary, uniform"}
    names |= {("bisect", r): f"bisect, {r}" for r in ("uniform", "optimal")} | {("planned", "optimal"): "planned"}
    for row in rows:
        name = names[row["tree"], row["repeats"]]
        axes.plot(row["depth"], row["units"], "o", color=colours[name])
    axes.set(
        xscale="log", yscale="log", xlabel="depth", ylabel="cost of a gradient, in units of M·η/E stage evaluations"
    )
    axes.set_xticks(depths, [str(n) for n in depths])
    axes.set_title(
        "Price of one error at every boundary, readout noise\nlines: recursions; points: counted", fontsize=10
    )
    axes.legend(frameon=False)
    write("asymptotics", given, figure, depths=depths, curves=lines, points=rows, target=TARGET, price=PRICE)


if __name__ == "__main__":
    main()

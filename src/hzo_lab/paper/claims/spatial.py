"""Spatial parallel perturbation: directions of a convolutional segment by coloring, beside one for every element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import hzo
from hzo.structure import Assume
from hzo_lab.paper.finding import Finding, Row, Setting, in_words, mean_spread, select, verdict
from hzo_lab.paper.measure import by_backprop, relative_error
from hzo_lab.paper.plotting import new_figure

CLAIM = "Spatial parallel perturbation cuts the cost for convolutions further."
CHANNELS, BATCH = 4, 4
COLORS = "C·(2d+1)² directions, capped by the map"
TOLERANCE = 1e-6  # relative, in float64: central differences of tanh leave about u^(2/3) = 4e-11


def spatial(setting: Setting) -> Finding:
    side, depths = (12, (1, 2)) if setting.smoke else (20, (1, 2, 3, 4, 6, 8))
    seeds = setting.seeds(5)
    rows = []
    for seed in seeds:
        for depth in depths:
            rows += [measure(seed, depth, side, assume, setting.device) for assume in ("locality", "nothing")]
        setting.tell(f"spatial: seed {seed}")
    parts = judge(rows)
    saved = {d: select(rows, depth=d, assume="nothing")[0]["queries"] for d in depths}
    factors = {d: saved[d] / select(rows, depth=d, assume="locality")[0]["queries"] for d in depths}
    worst = max(row["error"] for row in rows)
    found = (
        f"A segment of d layers of 3 × 3 {'takes' if parts[COLORS] else 'does not take'} C·(2d+1)² directions on a "
        f"{side} × {side} map: "
        + ", ".join(f"{factors[d]:.3g}× fewer queries for d = {d}" for d in depths)
        + f". Largest relative error to backprop's gradient: {worst:.1e} (float64)."
        + in_words(parts)
    )
    return Finding(
        claim=CLAIM,
        found=found,
        verdict=verdict(parts),
        rows=rows,
        plot=plot(rows, side),
        seeds=seeds,
        configuration={"channels": CHANNELS, "side": side, "batch": BATCH, "depths": list(depths), "dtype": "float64"},
        summary={"factor_by_depth": factors, "worst_relative_error": worst},
        notes=(
            "One segment of d zero-padded 3 × 3 convolutions with tanh, whose cotangent at the left is estimated at "
            "once from the right; the gradient compared is that of the convolution before it.",
            "The saving is in queries, and equally in forward equivalents: all queries of a segment cost the same.",
        ),
    )


def measure(seed: int, depth: int, side: int, assume: Assume, device: torch.device) -> Row:
    """The cotangent behind a trained convolution from the end of ``depth`` frozen ones."""
    torch.manual_seed(seed)

    def stage() -> nn.Module:
        return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Tanh())

    trained, segment = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), [stage() for _ in range(depth)]
    model = nn.Sequential(trained, *segment).to(device, torch.float64)
    for frozen in list(model)[1:]:
        frozen.requires_grad_(False)
    x = torch.randn(BATCH, CHANNELS, side, side, dtype=torch.float64, device=device)
    y = torch.randn_like(x)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, tree="flat", assume=assume)
    with hzo.count_queries() as counted:
        found, _ = hzo.grad_and_value(chain, F.mse_loss, x, y, plan=plan)
    exact = by_backprop(model, F.mse_loss, x, y)
    elements = CHANNELS * side**2
    return {
        "seed": seed, "depth": depth, "assume": assume,
        "formula": CHANNELS * min(2 * depth + 1, side) ** 2 if assume == "locality" else elements,
        "directions": sum(node.directions for node in plan.nodes),
        "queries": counted.queries // BATCH, "stage_evaluations": counted.stage_evaluations // BATCH,
        "forward_equivalents": counted.forward_equivalents,
        "error": max(relative_error(found[name], exact[name]) for name in exact),
    }  # fmt: skip


def judge(rows: list[Row]) -> dict[str, bool]:
    local, whole = select(rows, assume="locality"), select(rows, assume="nothing")
    return {
        COLORS: all(row["directions"] == row["formula"] for row in rows),
        "two queries a direction": all(row["queries"] == 2 * row["directions"] for row in rows),
        "as exact as coordinate by coordinate": all(row["error"] <= TOLERANCE for row in rows),
        "fewer queries": all(a["queries"] < b["queries"] for a, b in zip(local, whole, strict=True)),
    }


def plot(rows: list[Row], side: int) -> Figure:
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    depths = sorted({row["depth"] for row in rows})
    for assume, color, label in (("nothing", "#777777", "every element"), ("locality", "#0072B2", "by colors")):
        mine = [select(rows, assume=assume, depth=d)[0] for d in depths]
        left.semilogy(depths, [r["formula"] for r in mine], color=color, lw=1)
        left.semilogy(depths, [r["directions"] for r in mine], "o", color=color, label=label)
        errors = [mean_spread([r["error"] for r in select(rows, assume=assume, depth=d)])[0] for d in depths]
        right.semilogy(depths, errors, "o-", color=color, label=label)
    left.set(xlabel="3 × 3 layers in the segment", ylabel="directions", title=f"{CHANNELS} channels, {side} × {side}")
    right.set(xlabel="3 × 3 layers in the segment", ylabel="relative error to backprop", title="float64")
    left.text(0.98, 0.05, "lines: C·S² and C·(2d+1)²", transform=left.transAxes, ha="right", color="0.3")
    left.legend(loc="center right")
    right.legend()
    return figure

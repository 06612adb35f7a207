"""Gradient equivalence: the error of the whole gradient against the step, for all trees and both schemes."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import hzo
from hzo.finite_differences import Scheme
from hzo.plans import Tree
from hzo_lab.paper import measure
from hzo_lab.paper.finding import Finding, Row, Setting, in_words, mean_spread, select, verdict
from hzo_lab.paper.images import first_batch, images
from hzo_lab.paper.plotting import MARKERS, TREE_COLORS, new_figure, tree_name
from hzo_lab.training import models

CLAIM = "HZO's updates are equivalent in direction to backprop's (Theorem 1, gradient equivalence)."
COMPARED: tuple[Tree, ...] = ("bisect", "flat", "stagewise", 4, "planned")
ORDERS: dict[Scheme, int] = {"central": 2, "forward": 1}
STEPS = tuple(10.0 ** (-k / 2) for k in range(1, 19))
# Where the error is the scheme's alone: below, rounding u/h shows; above, the next order of the expansion.
FITTED = (1e-3, 3.2e-2)
SLACK = 0.1  # of the fitted order
ROUNDING = {"float64": 1e-9, "float32": 1e-4}  # of 1 − cosine at the default step: far above u^(4/3), far below "low"


def theorem1(setting: Setting) -> Finding:
    depth, width, batch = (4, 8, 8) if setting.smoke else (16, 16, 16)
    steps = STEPS[::2] if setting.smoke else STEPS
    seeds = setting.seeds(5)
    source = images(setting, flat=True)
    rows: list[Row] = []
    for seed in seeds:
        rows += sweep(setting, source, seed, depth=depth, width=width, batch=batch, steps=steps)
        setting.tell(f"theorem1: seed {seed}")
    slopes = fitted_orders(rows)
    parts = judge(rows, slopes)
    fitted = {order: [s["slope"] for s in slopes.values() if s["order"] == order] for order in ORDERS.values()}
    lowest = {dtype: min(r["cosine"] for r in select(rows, step=None, dtype=dtype)) for dtype in ROUNDING}
    found = (
        "The error of the gradient falls with the step's power "
        + " and ".join(f"{min(fitted[order]):.3f} to {max(fitted[order]):.3f} ({s})" for s, order in ORDERS.items())
        + f" over {len(COMPARED)} trees, down to {smallest(rows):.1e}; at the default step the cosine is "
        f"1 − {1 - lowest['float64']:.0e} in float64 and 1 − {1 - lowest['float32']:.0e} in float32, or nearer."
        + in_words(parts)
    )
    return Finding(
        claim=CLAIM,
        found=found,
        verdict=verdict(parts),
        rows=rows,
        plot=plot(rows),
        seeds=seeds,
        configuration={
            "model": f"residual MLP, tanh, {depth} blocks of width {width}", "data": source.name, "batch": batch,
            "assume": "nothing", "trees": [tree_name(t) for t in COMPARED], "fitted_steps": list(FITTED),
        },
        summary={"orders": slopes, "smallest_error": smallest(rows), "lowest_cosine": lowest},
        notes=source.notes,
    )  # fmt: skip


def sweep(
    setting: Setting, source: Any, seed: int, *, depth: int, width: int, batch: int, steps: tuple[float, ...]
) -> list[Row]:
    """Relative error and cosine of the gradient of all parameters, by scheme, tree, step and dtype."""
    rows = []
    for dtype in ("float64", "float32"):
        kind = getattr(torch, dtype)
        x, y = first_batch(source, batch, seed, setting.device, kind)
        model = models.build("mlp", source.shape, 10, depth=depth, width=width, activation="tanh", seed=seed)
        model = model.to(setting.device, kind)
        exact = measure.flattened(measure.by_backprop(model.double(), F.cross_entropy, x.double(), y))
        chain = hzo.trace(model.to(kind), x)
        given_steps = steps if dtype == "float64" else ()
        for scheme, tree, step in product(ORDERS, COMPARED, (*given_steps, None)):
            plan = hzo.plan(chain, tree, assume="nothing", scheme=scheme, step=step)
            found = measure.flattened(hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=plan)[0])
            rows.append(
                {
                    "seed": seed, "dtype": dtype, "scheme": scheme, "tree": tree_name(tree), "step": step,
                    "error": measure.relative_error(found, exact), "cosine": measure.cosine(found, exact),
                }
            )  # fmt: skip
    return rows


def fitted_orders(rows: list[Row]) -> dict[str, dict[str, float]]:
    """By scheme and tree: the exponent of the step in the error (geometric mean over seeds)."""
    found = {}
    for scheme, order in ORDERS.items():
        for tree in dict.fromkeys(row["tree"] for row in rows):
            mine = [
                r for r in select(rows, scheme=scheme, tree=tree) if r["step"] and FITTED[0] <= r["step"] <= FITTED[1]
            ]
            slope = measure.exponent([r["step"] for r in mine], [r["error"] for r in mine])
            found[f"{scheme}, {tree}"] = {"order": order, "slope": slope}
    return found


def smallest(rows: list[Row]) -> float:
    return float(min(row["error"] for row in rows))


def judge(rows: list[Row], slopes: dict[str, dict[str, float]]) -> dict[str, bool]:
    default = [row for row in rows if row["step"] is None]
    return {
        "the scheme's order for every tree": all(abs(s["slope"] - s["order"]) <= SLACK for s in slopes.values()),
        "cosine of one at the default step": all(1 - row["cosine"] <= ROUNDING[row["dtype"]] for row in default),
    }


def plot(rows: list[Row]) -> Figure:
    figure = new_figure(10, 4.4)
    for axes, (scheme, order) in zip(figure.subplots(1, 2, sharey=True), ORDERS.items(), strict=True):
        for tree, color in TREE_COLORS.items():
            mine = [row for row in select(rows, scheme=scheme, tree=tree) if row["step"] is not None]
            steps = sorted({row["step"] for row in mine})
            errors = [mean_spread([row["error"] for row in select(mine, step=step)])[0] for step in steps]
            axes.loglog(steps, errors, lw=1, marker=MARKERS[tree], ms=5, mfc="none", color=color, label=tree)
        top = max(row["error"] for row in select(rows, scheme=scheme) if row["step"] is not None)
        guide = [(h, top * (h / max(STEPS)) ** order) for h in FITTED]
        axes.loglog(*zip(*guide, strict=True), color="0.3", lw=1, ls=":")
        axes.annotate(f"slope {order}", guide[0], textcoords="offset points", xytext=(-4, 10), ha="right", color="0.3")
        axes.set(title=f"{scheme} differences", xlabel="step h")
    figure.axes[0].set_ylabel("relative error to backprop, all parameters")
    figure.axes[0].legend()
    return figure

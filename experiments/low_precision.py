"""Predicted against measured cosine where the forward pass runs in bfloat16 or float16.

    python experiments/low_precision.py [--quick]

No noise but rounding. The reference are the exact cotangents, in float32, of the same rounded weights. Steps are those
that the plan chooses from a calibration (``chosen``), and the default ones, which know the dtype alone (``default``;
the same error model predicts for them).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import hzo
from common import ACTIVATIONS, cosine, data, expected_error, network, options, table, write
from hzo.planner import error_model, expected_errors
from hzo.plans import Expected

BANDS = {"residual": 0.02, "plain": 0.05}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def with_default_steps(chain: hzo.Chain, plan: hzo.Plan, calibration: hzo.Calibration, dtype: torch.dtype) -> hzo.Plan:
    step = torch.finfo(dtype).eps ** (1 / 3)
    nodes = tuple(replace(n, step=step if n.operations else None) for n in plan.nodes)
    model = error_model(chain.traced, calibration, None, "central")
    errors = expected_errors(model, chain.traced, nodes, None)
    return replace(plan, nodes=nodes, expected=Expected(errors, {}))


def run(kind: str, act: str, depth: int, name: str, seed: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    model = network(kind, act, depth).to(DTYPES[name])
    x, y = (t.to(DTYPES[name]) for t in data())
    wide = hzo.trace(copy.deepcopy(model).float(), x.float())
    exact = hzo.cotangents(wide, F.mse_loss, x.float(), y.float(), boundaries="all")
    chain = hzo.trace(model, x)
    calibration = hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing", seconds=False)
    rows = []
    for tree, steps in product(("flat", "bisect", "stagewise"), ("chosen", "default")):
        if tree == "flat" and depth > 16:
            continue
        plan = hzo.plan(chain, tree=tree, assume="nothing", boundaries="all", calibration=calibration)
        plan = plan if steps == "chosen" else with_default_steps(chain, plan, calibration, DTYPES[name])
        got = hzo.cotangents(chain, F.mse_loss, x, y, plan=plan)
        for boundary in sorted({0, 1, depth // 2, depth - 1}):
            error, found = expected_error(chain, plan, boundary), cosine(got[boundary], exact[boundary])
            rows.append(
                {
                    "kind": kind, "act": act, "depth": depth, "dtype": name, "tree": tree, "steps": steps,
                    "boundary": boundary, "predicted": (1 + error) ** -0.5, "measured": found,
                    "off": (1 + error) ** -0.5 - found,
                    "error_ratio": (found**-2 - 1) / error if error > 0 and found > 0 else None,
                }
            )  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, steps in zip(figure.subplots(1, 2), ("chosen", "default"), strict=True):
        for (k, tree), (kind, marker) in product(
            enumerate(("flat", "bisect", "stagewise")), (("residual", "o"), ("plain", "x"))
        ):
            mine = [r for r in rows if (r["tree"], r["kind"], r["steps"]) == (tree, kind, steps)]
            squared = [(r["predicted"] ** -2 - 1, max(r["measured"], 1e-3) ** -2 - 1) for r in mine]
            axes.loglog(*zip(*squared, strict=True), marker, color=f"C{k}", ms=4, alpha=0.7, label=f"{tree}, {kind}")
        axes.axline((1e-6, 1e-6), (1, 1), color="0.3", lw=0.8)
        axes.set(xlabel="predicted E", ylabel="measured E = 1/cosine² − 1", title=f"{steps} steps")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def main() -> None:
    given = options(__doc__ or "")
    acts, depths = (["tanh"], (8,)) if given.quick else (list(ACTIVATIONS), (8, 16, 64))
    # 64 plain stages leave activations that float16 cannot hold.
    cases = [case for case in product(BANDS, acts, depths, DTYPES) if case[0] == "residual" or case[2] <= 16]
    rows = [row for case in cases for row in run(*case, given.seed)]
    shares = []
    for kind, name, steps in product(BANDS, DTYPES, ("chosen", "default")):
        mine = [r for r in rows if (r["kind"], r["dtype"], r["steps"]) == (kind, name, steps)]
        worst = max(mine, key=lambda r: abs(r["off"]))
        ratios = sorted(r["error_ratio"] for r in mine if r["error_ratio"])
        shares.append(
            {
                "kind": kind, "dtype": name, "steps": steps, "count": len(mine),
                "inside": sum(abs(r["off"]) <= BANDS[kind] for r in mine) / len(mine), "worst": worst["off"],
                "worst_at": " ".join(str(worst[k]) for k in ("act", "depth", "tree", "boundary")),
                "lowest_measured": min(r["measured"] for r in mine), "median_E_ratio": ratios[len(ratios) // 2],
            }
        )  # fmt: skip
    table(shares, list(shares[0]))
    write("low_precision", given, plot(rows), bands=BANDS, summary=shares, rows=rows)


if __name__ == "__main__":
    main()

"""Are the steps that a plan chooses near the best ones?

    python experiments/steps.py [--quick]

Residual chain of 16 stages. Each of a grid of steps (factor 2, from 1e-7 to 1 of the activation's root mean square) is
given to all nodes of a plan; the error at the input's boundary is set beside that of the steps that the plan chose,
one for each node. The reference is autograd in float64 through the same (rounded) weights, since float64 estimates
have errors near 1e-9, which no float32 reference would show.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf, log2
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import hzo
from common import ACTIVATIONS, data, exact_by_autograd, expected_error, network, options, relative_error, table, write
from hzo.errors import NonFiniteError, StepError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRID = [2.0**-k for k in range(24)]
WITHIN = 2.0


def errors(chain: hzo.Chain, plan: hzo.Plan, readout: float, x: Any, y: Any, exact: Any, draws: int) -> float:
    """Relative error at the first boundary, root mean square over draws; inf where the step is lost."""
    found = []
    for seed in range(draws if readout else 1):
        noisy = hzo.noisy(chain, readout, 0.0, seed=100 + seed) if readout else chain
        try:
            found.append(relative_error(hzo.cotangents(noisy, F.mse_loss, x, y, plan=plan)[0], exact) ** 2)
        except (StepError, NonFiniteError):
            return inf
    return mean(found) ** 0.5


def run(dtype: str, act: str, readout: float, quick: bool, seed: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    kind = DTYPES[dtype]
    model = network("residual", act, 16).to(kind)
    x, y = (t.to(kind) for t in data())
    exact = exact_by_autograd(model, x, y)[0]
    chain = hzo.trace(model, x)
    noisy = hzo.noisy(chain, readout, 0.0, seed=1) if readout else chain
    calibration = hzo.calibrate(noisy, x, F.mse_loss, y, assume="nothing", seconds=False)
    default = hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing", seconds=False)
    rows = []
    for tree in ("stagewise", "bisect"):
        for way, known in (("measured", calibration), *((("declared", default),) if readout else ())):
            given = {"noise": readout} if way == "declared" else {}
            plan = hzo.plan(noisy, tree=tree, assume="nothing", boundaries="all", calibration=known, **given)
            chosen = errors(chain, plan, readout, x, y, exact, 2)
            if way == "measured":
                swept = {}
                for step in GRID[:: 4 if quick else 1]:
                    fixed = replace(plan, nodes=tuple(replace(n, step=step if n.step else None) for n in plan.nodes))
                    swept[step] = errors(chain, fixed, readout, x, y, exact, 2)
                best = min(swept, key=lambda step: swept[step])
            steps = sorted(n.step for n in plan.nodes if n.step)
            rows.append(
                {
                    "dtype": dtype, "act": act, "readout": readout, "tree": tree, "noise": way,
                    "best_step": best, "best": swept[best],
                    "chosen_steps": [steps[0], steps[len(steps) // 2], steps[-1]],
                    "chosen": chosen, "ratio": chosen / swept[best],
                    "expected": expected_error(chain, plan, 0) ** 0.5,
                    "grid": {str(step): error if error < inf else None for step, error in swept.items()},
                }
            )  # fmt: skip
            print(
                f"{dtype} {act} {readout:g} {tree} {way}: best {swept[best]:.2e} at {best:.1e}, chosen {chosen:.2e} "
                f"({steps[0]:.1e} … {steps[-1]:.1e}), expected {rows[-1]['expected']:.2e}",
                flush=True,
            )
    return rows


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(14, 7), layout="constrained")
    panels = figure.subplots(2, len(DTYPES), sharex=True)
    for (k, readout), (j, dtype) in product(enumerate((0.0, 1e-3)), enumerate(DTYPES)):
        axes = panels[k][j]
        for (color, act), (line, tree) in product(enumerate(ACTIVATIONS), (("-", "stagewise"), ("--", "bisect"))):
            key = (dtype, act, readout, tree)
            mine = [r for r in rows if (r["dtype"], r["act"], r["readout"], r["tree"]) == key]
            for row in mine:
                if row["noise"] == "measured":
                    points = [(float(s), e) for s, e in row["grid"].items() if e]
                    axes.loglog(*zip(*points, strict=True), line, color=f"C{color}", lw=1, label=f"{act}, {tree}")
                marker = "o" if row["noise"] == "measured" else "s"
                axes.loglog(row["chosen_steps"][1], row["chosen"], marker, color=f"C{color}", ms=5, mfc="none")
        axes.set_title(f"{dtype}, {f'readout {readout:g}' if readout else 'no noise'}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.set(xlabel="step / rms", ylabel="relative error")
    panels[0][0].legend(fontsize=6)
    figure.suptitle("○ □ error of the plan's own steps, at their median: noise measured, declared", fontsize=10)
    return figure


def main() -> None:
    given = options(__doc__ or "")
    cases = product(
        ("float32", "bfloat16") if given.quick else DTYPES, ["tanh"] if given.quick else ACTIVATIONS, (0.0, 1e-3)
    )
    rows = [row for dtype, act, readout in cases for row in run(dtype, act, readout, given.quick, given.seed)]
    columns = ["dtype", "act", "readout", "tree", "noise", "best_step", "best", "chosen", "ratio", "expected"]
    table(rows, columns)
    inside = sum(r["ratio"] <= WITHIN for r in rows)
    worst = max(rows, key=lambda r: r["ratio"])
    print(f"{inside} of {len(rows)} within {WITHIN:g}× of the best; worst {worst['ratio']:.2f}×")
    off = max((r for r in rows if r["expected"] > 0), key=lambda r: abs(log2(r["expected"] / r["chosen"])))
    print(
        f"expectation furthest off: {off['expected'] / off['chosen']:.2f}× "
        f"({off['dtype']}, {off['act']}, {off['tree']}, readout {off['readout']:g})"
    )
    write("steps", given, plot(rows), within=WITHIN, inside=inside, rows=rows)


if __name__ == "__main__":
    main()

"""How errors compose away from the unitary limit: gains of 0.8 to 1.2 a stage.

    python experiments/lipschitz.py [--quick]

32 stages, readout noise 1e-3, step 0.1. A plain stage is an orthogonal matrix times the gain; a residual one is
αx + β·tanh(Wx) with β = 0.2 and α² + β² E[tanh'²] = gain². Lines are the error model on a calibration of the chain
without noise, points are measured (root mean square of draws), at the boundary of the input.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import hzo
from common import data, expected_error, options, relative_error, squared_gain, table, write
from hzo.reproduce.networks import of_gain

READOUT, STEP, DEPTH, WIDTH = 1e-3, 0.1, 32, 64
TREES = ("flat", "bisect", "stagewise")


def run(kind: str, gain: float, seed: int, draws: int = 4) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    model = of_gain(kind, gain, DEPTH, WIDTH)
    x, y = data(WIDTH)
    chain = hzo.trace(model, x)
    exact = hzo.cotangents(chain, F.mse_loss, x, y, boundaries="all")[0]
    calibration = hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing", seconds=False)
    rows = []
    for tree in TREES:
        plan = hzo.plan(
            chain, tree=tree, assume="nothing", boundaries="all", step=STEP, noise=READOUT, calibration=calibration
        )
        found = []
        for draw in range(draws):
            noisy = hzo.noisy(chain, READOUT, 0.0, seed=100 + draw)
            found.append(relative_error(hzo.cotangents(noisy, F.mse_loss, x, y, plan=plan)[0], exact) ** 2)
        rows.append(
            {
                "kind": kind,
                "gain": gain,
                "measured_gain": squared_gain(calibration, chain) ** 0.5,
                "tree": tree,
                "error": mean(found) ** 0.5,
                "predicted": expected_error(chain, plan, 0) ** 0.5,
                "draws": [e**0.5 for e in found],
            }
        )
        rows[-1]["ratio"] = rows[-1]["predicted"] / rows[-1]["error"]
    return rows


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("plain", "residual"), strict=True):
        for k, tree in enumerate(TREES):
            mine = [r for r in rows if (r["kind"], r["tree"]) == (kind, tree)]
            gains = [r["gain"] for r in mine]
            axes.semilogy(gains, [r["predicted"] for r in mine], color=f"C{k}", label=f"{tree}, model")
            axes.semilogy(gains, [r["error"] for r in mine], "o", color=f"C{k}", ms=4)
        axes.axvline(1.0, color="0.4", ls=":", lw=1)
        axes.text(1.0, 0.98, " unitary limit", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
        axes.set(xlabel="gain of a stage (root mean square of its Jacobian)", title=f"{kind}, {DEPTH} stages")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative error at the input")
    figure.axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    given = options(__doc__ or "")
    gains = (0.9, 1.0, 1.1) if given.quick else [round(0.8 + 0.04 * k, 2) for k in range(11)]
    rows = [row for kind in ("plain", "residual") for gain in gains for row in run(kind, gain, given.seed)]
    table(rows, ["kind", "gain", "measured_gain", "tree", "error", "predicted", "ratio"])
    write("lipschitz", given, plot(rows), readout=READOUT, step=STEP, depth=DEPTH, rows=rows)


if __name__ == "__main__":
    main()

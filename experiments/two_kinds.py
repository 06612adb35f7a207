"""Which trees win under which kind of noise: 64 residual stages, measured once each and at a target.

    python experiments/two_kinds.py            # writes results/planner/two_kinds.json and .png

Noise 1e-3, step 0.1, nothing assumed, all boundaries. First each tree with one measurement of every node: the cosine at
the input, expected and measured. Then what each pays for a cosine of 0.99 at every boundary, with its best repeats.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from matplotlib.figure import Figure

import hzo
from common import cosine, data, expected_error, network, options, table, write

DEPTH, LEVEL, STEP, TARGET = 64, 1e-3, 0.1, 0.99
KINDS = {"readout": (LEVEL, 0.0), "process": (0.0, LEVEL)}


def main() -> None:
    given = options(__doc__ or "")
    model = network("residual", "tanh", 8 if given.quick else DEPTH)
    x, y = data()
    chain = hzo.trace(model, x)
    known = hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing")
    exact = hzo.cotangents(chain, F.mse_loss, x, y, boundaries="all")
    rows: list[dict[str, Any]] = []
    for kind, (readout, process) in KINDS.items():
        noisy = hzo.noisy(chain, readout, process, seed=given.seed)
        common: dict[str, Any] = {
            "assume": "nothing",
            "boundaries": "all",
            "step": STEP,
            "noise": hzo.Noise(readout, process),
            "calibration": known,
        }
        for tree in ("flat", "bisect", 4, "stagewise", "planned"):
            plan = hzo.plan(chain, tree, **common)
            found = hzo.cotangents(noisy, F.mse_loss, x, y, plan=plan)
            priced = hzo.plan(chain, tree, target_cosine=TARGET, **common)
            rows.append(
                {
                    "noise": kind,
                    "tree": str(tree),
                    "once": plan.forward_equivalents,
                    "expected": (1 + expected_error(chain, plan, 0)) ** -0.5,
                    "measured": cosine(found[0], exact[0]),
                    "at_target": priced.forward_equivalents,
                }
            )
    table(rows, tuple(rows[0]))
    figure = Figure((9, 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        mine = [row for row in rows if row["noise"] == kind]
        bars = axes.bar([row["tree"] for row in mine], [row["at_target"] for row in mine], color="#4477aa")
        axes.bar_label(bars, [f"{row['measured']:.3f}" for row in mine], fontsize=8)
        axes.set(yscale="log", title=f"{kind} noise 1e-3")
    figure.axes[0].set_ylabel("forward equivalents for a cosine of 0.99")
    figure.suptitle("Above the bars: measured cosine at the input with one measurement of each node", fontsize=9)
    write("two_kinds", given, figure, rows=rows, target=TARGET)


if __name__ == "__main__":
    main()

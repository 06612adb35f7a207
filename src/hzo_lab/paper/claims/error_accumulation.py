"""How errors of composed estimates add up along the depth, beside what the library's own error model expects."""

from __future__ import annotations

import copy
from math import log2
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import hzo
from hzo.plans import Tree
from hzo_lab.paper.finding import Finding, Row, Setting, in_words, mean_spread, select, verdict
from hzo_lab.paper.measure import expected_error, relative_error
from hzo_lab.paper.networks import BATCH, WIDTH, data, network
from hzo_lab.paper.plotting import MARKERS, TREE_COLORS, new_figure, tree_name

CLAIM = "Errors accumulate boundedly over the depth (Theorem 3)."
COMPARED: tuple[Tree, ...] = ("bisect", "flat", "stagewise", 4)
READOUT, STEP = 1e-3, 0.1
# Of a model that claims to predict: root mean squares over seeds, draws and boundaries of about 16 × 64 numbers each.
WITHIN = 0.15
# Of squared errors over path length and the worst single estimate: at most 1 where errors are independent and do not
# grow on their way; the rest is scatter.
BOUND = 1.1


def error_accumulation(setting: Setting) -> Finding:
    depths = (4, 8, 16) if setting.smoke else (8, 16, 32, 64)
    seeds = setting.seeds(5)
    rows: list[Row] = []
    for seed in seeds:
        for depth in depths:
            rows += along_depth(seed, depth, setting.device, draws=2)
            setting.tell(f"error-accumulation: seed {seed}, L = {depth}")
    model, growth = of_model(rows, "tree", "L"), of_path(rows)
    parts = judge(model, growth)
    noisy = {tree: at_input(rows, tree, max(depths), "measured") for tree in growth}
    exact = {tree: at_input(rows, tree, max(depths), "rounding") for tree in growth}
    found = (
        f"Relative error at the input of {max(depths)} residual stages, readout noise {READOUT:g}: "
        + ", ".join(f"{tree} {error:.3f}" for tree, error in noisy.items())
        + f"; predicted over measured {min(model.values()):.2f} to {max(model.values()):.2f}. Squared errors stay "
        f"below {max(growth.values()):.2f} × path length × the worst single estimate's. "
        f"Without noise, float32 leaves {min(exact.values()):.0e} to {max(exact.values()):.0e}." + in_words(parts)
    )
    return Finding(
        claim=CLAIM, found=found, verdict=verdict(parts), rows=rows, plot=plot(rows, max(depths)), seeds=seeds,
        configuration={
            "stages": "x + tanh(Wx), W of standard deviation 0.1/√M", "L": list(depths), "M": WIDTH, "batch": BATCH,
            "readout_noise": READOUT, "step": STEP, "draws": 2, "assume": "nothing", "scheme": "central",
        },
        summary={"predicted_over_measured": model, "squared_error_over_path": growth, "error_at_input": noisy,
                 "float32_error_at_input": exact},
        notes=(
            "The theorem's constants are not known to us: bounded is read as squared errors that grow like the number "
            "of composed estimates (⌈log₂ L⌉ of bisect), as independent ones do.",
            "Lines of the plot are the error model's, on a calibration of the chain without noise.",
        ),
    )  # fmt: skip


def along_depth(seed: int, depth: int, device: torch.device, draws: int) -> list[Row]:
    """By tree and boundary: relative error of the cotangent with readout noise, predicted and measured (root mean
    square of the draws), and without noise in float32."""
    torch.manual_seed(seed)
    model = network("residual", "tanh", depth).to(device)
    x, y = (t.to(device) for t in data())
    chain = hzo.trace(model, x)
    wide = hzo.trace(copy.deepcopy(model).double(), x.double())
    exact = hzo.cotangents(wide, F.mse_loss, x.double(), y.double(), boundaries="all")
    calibration = hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing", seconds=False)
    rows = []
    for tree in COMPARED:
        options: dict[str, Any] = {"tree": tree, "assume": "nothing", "boundaries": "all"}
        plan = hzo.plan(chain, **options, step=STEP, noise=READOUT, calibration=calibration)
        quiet = errors(hzo.cotangents(chain, F.mse_loss, x, y, plan=hzo.plan(chain, **options)), exact)
        squared = torch.zeros(depth, dtype=torch.float64)
        for draw in range(draws):
            noisy = hzo.noisy(chain, READOUT, 0.0, seed=1000 * seed + draw)
            squared += errors(hzo.cotangents(noisy, F.mse_loss, x, y, plan=plan), exact) ** 2 / draws
        path = paths(chain, plan)
        rows += [
            {
                "seed": seed, "tree": tree_name(tree), "L": depth, "boundary": k, "path": path[k],
                "measured": float(squared[k]) ** 0.5, "predicted": expected_error(chain, plan, k) ** 0.5,
                "rounding": float(quiet[k]), "cosine": (1 + float(squared[k])) ** -0.5,
            }
            for k in range(depth)
        ]  # fmt: skip
    return rows


def errors(found: list[Any], exact: list[Any]) -> Tensor:
    """Relative error at every boundary but the last, which the loss gives."""
    pairs = zip(found[:-1], exact[:-1], strict=True)
    return torch.tensor([relative_error(ours, true) for ours, true in pairs], dtype=torch.float64)


def paths(chain: hzo.Chain, plan: hzo.Plan) -> list[int]:
    """How many estimates the cotangent of each stage boundary is composed of."""
    graph = chain.traced
    length: dict[int, int] = {}
    for edge in plan.edges:  # from the output to the input
        length[edge.target] = length.get(edge.source, 0) + 1
    return [length[position] for position in graph.boundaries[:-1]]


def rms(values: list[float]) -> float:
    return float(mean_spread([value**2 for value in values])[0] ** 0.5)


def at_input(rows: list[Row], tree: str, depth: int, what: str) -> float:
    return rms([row[what] for row in select(rows, tree=tree, L=depth, boundary=0)])


def of_model(rows: list[Row], *keys: str) -> dict[str, float]:
    """Predicted over measured error, by the values of these keys; root mean squares over all else."""
    places = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    found = {}
    for place in places:
        mine = select(rows, **dict(zip(keys, place, strict=True)))
        ratio = rms([row["predicted"] for row in mine]) / rms([row["measured"] for row in mine])
        found[", ".join(map(str, place))] = ratio
    return found


def of_path(rows: list[Row]) -> dict[str, float]:
    """By tree, the largest squared error (mean over seeds) over path length times the worst single estimate's at that
    depth: that of the boundary which the flat tree, which composes nothing, estimates worst."""

    def squared(tree: str, depth: int, boundary: int) -> float:
        return rms([row["measured"] for row in select(rows, tree=tree, L=depth, boundary=boundary)]) ** 2

    depths = dict.fromkeys(row["L"] for row in rows)
    single = {depth: max(squared("flat", depth, k) for k in range(depth)) for depth in depths}
    path = {(row["tree"], row["L"], row["boundary"]): row["path"] for row in rows}
    found: dict[str, float] = {}
    for (tree, depth, k), length in path.items():
        found[tree] = max(found.get(tree, 0.0), squared(tree, depth, k) / (length * single[depth]))
    return found


def judge(model: dict[str, float], growth: dict[str, float]) -> dict[str, bool]:
    return {
        f"errors within {WITHIN:.0%} of the error model's": all(abs(ratio - 1) <= WITHIN for ratio in model.values()),
        "squared errors that grow no faster than the number of composed estimates": max(growth.values()) <= BOUND,
    }


def plot(rows: list[Row], deepest: int) -> Figure:
    figure = new_figure(10, 4.4)
    along, against = figure.subplots(1, 2, sharey=True)
    depths = sorted({row["L"] for row in rows})
    for tree in dict.fromkeys(row["tree"] for row in rows):
        color, marker = TREE_COLORS[tree], MARKERS[tree]
        for what, style in (("predicted", {"lw": 1.2}), ("measured", {"ls": "", "marker": marker, "ms": 3.5})):
            line = [rms([r[what] for r in select(rows, tree=tree, L=deepest, boundary=k)]) for k in range(deepest)]
            label = tree if what == "measured" else None
            along.plot(range(deepest), line, color=color, label=label, **style)
            ends = [at_input(rows, tree, depth, what) for depth in depths]
            against.plot([log2(depth) for depth in depths], ends, color=color, **style)
    along.set(xlabel="boundary (0: input)", ylabel="relative error of the cotangent", ylim=(0, None))
    along.set_title(f"along {deepest} stages")
    along.legend()
    against.set_xticks([log2(depth) for depth in depths], [str(depth) for depth in depths])
    against.set(xlabel="depth L", title="at the input")
    against.text(0.03, 0.95, f"readout noise {READOUT:g}; lines: error model", transform=against.transAxes, va="top")
    return figure

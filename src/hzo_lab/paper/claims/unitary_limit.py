"""Errors against the gain of the stages: below, at and above the unitary limit, beside the error model."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import hzo
from hzo.plans import Tree
from hzo_lab.paper.claims.error_accumulation import of_model, rms
from hzo_lab.paper.finding import Finding, Row, Setting, in_words, select, verdict
from hzo_lab.paper.measure import expected_error, relative_error, squared_gain
from hzo_lab.paper.networks import WIDTH, data, of_gain
from hzo_lab.paper.plotting import TREE_COLORS, new_figure

CLAIM = "HZO is stable near the unitary limit, Lipschitz constant ≈ 1."
COMPARED: tuple[Tree, ...] = ("flat", "bisect", "stagewise")
READOUT, STEP = 1e-3, 0.1
WITHIN = 0.15  # of the error model, as for error-accumulation
NEAR, STABLE = 0.04, 2.0  # so far from a gain of one, bisect's error changes by less than this factor
FAR = 0.8  # a contraction at which it changes by more


def unitary_limit(setting: Setting) -> Finding:
    depth = 16 if setting.smoke else 32
    gains = (0.8, 1.0, 1.04) if setting.smoke else tuple(round(0.8 + 0.04 * k, 2) for k in range(11))
    seeds = setting.seeds(5, smoke=1)
    rows: list[Row] = []
    for seed in seeds:
        for kind in ("plain", "residual"):
            for gain in gains:
                rows += at_gain(kind, gain, seed, depth, setting.device)
        setting.tell(f"unitary-limit: seed {seed}")
    model, factors = (
        of_model(rows, "kind", "gain", "tree"),
        {kind: relative(rows, kind) for kind in ("plain", "residual")},
    )
    parts = judge(model, factors)
    found = (
        f"Bisect's error at the input of {depth} stages, relative to gain 1: "
        + "; ".join(
            f"{kind} " + ", ".join(f"{factor:.2f}× at {gain:g}" for gain, factor in by_gain.items() if gain != 1)
            for kind, by_gain in factors.items()
        )
        + f". Predicted over measured {min(model.values()):.2f} to {max(model.values()):.2f}"
        + "."
        + (" Contraction alone hurts: where stages expand, relative errors shrink." if shrinking(factors) else "")
        + in_words(parts)
    )
    return Finding(
        claim=CLAIM, found=found, verdict=verdict(parts), rows=rows, plot=plot(rows, depth), seeds=seeds,
        configuration={
            "plain": "orthogonal matrix times the gain", "residual": "αx + 0.2·tanh(Wx), α² + 0.04·E[tanh'²] = gain²",
            "gains": list(gains), "L": depth, "M": WIDTH, "readout_noise": READOUT, "step": STEP, "draws": 2,
        },
        summary={"predicted_over_measured": model, "error_relative_to_gain_one": factors},
    )  # fmt: skip


def at_gain(
    kind: str, gain: float, seed: int, depth: int, device: torch.device | None = None, draws: int = 2
) -> list[Row]:
    """By tree: relative error of the cotangent at the input, predicted and measured (root mean square of the draws)."""
    torch.manual_seed(seed)
    model = of_gain(kind, gain, depth).to(device)
    x, y = (t.to(device) for t in data())
    chain = hzo.trace(model, x)
    exact = hzo.cotangents(chain, F.mse_loss, x, y, boundaries="all")[0]
    assert isinstance(exact, torch.Tensor)
    calibration = hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing", seconds=False)
    rows = []
    for tree in COMPARED:
        plan = hzo.plan(
            chain, tree=tree, assume="nothing", boundaries="all", step=STEP, noise=READOUT, calibration=calibration
        )
        found = []
        for draw in range(draws):
            noisy = hzo.noisy(chain, READOUT, 0.0, seed=1000 * seed + draw)
            estimate = hzo.cotangents(noisy, F.mse_loss, x, y, plan=plan)[0]
            assert isinstance(estimate, torch.Tensor)
            found.append(relative_error(estimate, exact))
        rows.append(
            {
                "seed": seed, "kind": kind, "gain": gain, "measured_gain": squared_gain(calibration, chain) ** 0.5,
                "tree": tree, "measured": rms(found), "predicted": expected_error(chain, plan, 0) ** 0.5,
            }
        )  # fmt: skip
    return rows


def relative(rows: list[Row], kind: str) -> dict[float, float]:
    """Bisect's error by gain, over that at a gain of one."""
    mine = select(rows, kind=kind, tree="bisect")
    by_gain = {
        gain: rms([r["measured"] for r in select(mine, gain=gain)]) for gain in sorted({r["gain"] for r in mine})
    }
    return {gain: error / by_gain[1.0] for gain, error in by_gain.items()}


def shrinking(factors: dict[str, dict[float, float]]) -> bool:
    """Whether errors fall throughout as gains grow."""
    return all(a > b for by_gain in factors.values() for a, b in pairwise(by_gain[gain] for gain in sorted(by_gain)))


def judge(model: dict[str, float], factors: dict[str, dict[float, float]]) -> dict[str, bool]:
    near = [f for by_gain in factors.values() for gain, f in by_gain.items() if abs(gain - 1) <= NEAR + 1e-9]
    return {
        f"stable within {NEAR:g} of a gain of one": all(1 / STABLE <= factor <= STABLE for factor in near),
        f"unstable far from it (gain {FAR:g})": all(by_gain[FAR] > STABLE for by_gain in factors.values()),
        f"errors within {WITHIN:.0%} of the error model's": all(abs(ratio - 1) <= WITHIN for ratio in model.values()),
    }


def plot(rows: list[Row], depth: int) -> Figure:
    figure = new_figure(10, 4.2)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("plain", "residual"), strict=True):
        for tree in dict.fromkeys(row["tree"] for row in rows):
            mine = select(rows, kind=kind, tree=tree)
            gains = sorted({row["gain"] for row in mine})
            for what, style in (("predicted", {"lw": 1.2}), ("measured", {"ls": "", "marker": "o", "ms": 4})):
                line = [rms([row[what] for row in select(mine, gain=gain)]) for gain in gains]
                label = tree if what == "measured" else None
                axes.semilogy(gains, line, color=TREE_COLORS[tree], label=label, **style)
        axes.axvline(1.0, color="0.4", ls=":", lw=1)
        axes.text(1.0, 0.98, " unitary limit", transform=axes.get_xaxis_transform(), va="top", fontsize=9)
        axes.set(xlabel="gain of a stage", title=f"{kind}, {depth} stages")
    figure.axes[0].set_ylabel("relative error at the input")
    figure.axes[0].legend(title="lines: error model")
    return figure

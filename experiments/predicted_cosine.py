"""Predicted against measured cosine of cotangents, for noisy chains.

    python experiments/predicted_cosine.py [--quick]

Noise is known in two ways: ``measured`` by ``hzo.calibrate`` on the noisy chain, or ``declared`` to a plan whose
calibration saw the chain without noise. Steps are 0.1 throughout (``fixed``) or the plan's (``chosen``). A measured
cosine is the mean of a few draws of the noise. ``grid()`` says which points are left out at depth 64 and 128, where
they would take hours.

A prediction near 0 or 1 is easy; ``informative`` rows have a measured cosine between 0.2 and 0.98.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from statistics import mean
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import hzo
from common import cosine, data, expected_error, network, options, squared_gain, table, write
from hzo.errors import PlanError

BANDS = {"residual": 0.02, "plain": 0.05}
COMPARED: list[str | int] = ["flat", "bisect", "stagewise", 4]
TARGET = 0.95
DEARER = 5e3  # forward equivalents from which on a plan for a target is not run
DEEP = [(1e-3, 0.0), (1e-2, 0.0), (1e-3, 1e-3)]
NOISES = [(r, p) for p in (0.0, 1e-3) for r in (0.0, 1e-4, 1e-3, 1e-2)]


def grid(quick: bool) -> Iterator[tuple[str, str, int, float, float, bool]]:
    """Kind, activation, depth, readout, process noise, and whether the flat tree is run."""
    kinds, activations = ("residual", "plain"), ("tanh", "relu", "gelu")
    if quick:
        for kind, act in product(kinds, ("tanh", "relu")):
            yield kind, act, 8, 1e-3, 0.0, True
        return
    for kind, act, (readout, process) in product(kinds, activations, NOISES):
        yield kind, act, 8, readout, process, True
    for kind, act, (readout, process) in product(kinds, activations, DEEP):
        yield kind, act, 16, readout, process, True
    for kind, act, (readout, process) in product(kinds, ("tanh", "relu"), DEEP[::2]):
        yield kind, act, 64, readout, process, (readout, process, act) == (1e-3, 0.0, "tanh")
    for kind in kinds:
        yield kind, "tanh", 128, 1e-3, 0.0, kind == "residual"


def measured(
    chain: hzo.Chain, noise: tuple[float, float], plan: hzo.Plan, exact: list[Any], x: Tensor, y: Tensor, draws: int
) -> dict[int, float]:
    """Mean cosine by boundary."""
    depth = len(exact) - 1
    at = sorted({0, 1, depth // 2, depth - 1})
    found: dict[int, list[float]] = {k: [] for k in at}
    for seed in range(draws):
        noisy = hzo.noisy(chain, *noise, seed=100 + seed) if any(noise) else chain
        got = hzo.cotangents(noisy, F.mse_loss, x, y, plan=plan)
        for k in at:
            found[k].append(cosine(got[k], exact[k]))
    return {k: mean(values) for k, values in found.items()}


def parameters(
    chain: hzo.Chain, noise: tuple[float, float], plan: hzo.Plan, x: Tensor, y: Tensor
) -> list[dict[str, Any]]:
    """Predicted and measured cosine of every weight's gradient."""
    exact, _ = hzo.grad_and_value(chain, F.mse_loss, x, y)
    got, _ = hzo.grad_and_value(hzo.noisy(chain, *noise, seed=100), F.mse_loss, x, y, plan=plan)
    assert plan.expected is not None
    weights = [name for name in exact if name.endswith("weight")]
    return [
        {
            "weight": name,
            "weight_predicted": (1 + plan.expected.parameters[name]) ** -0.5,
            "weight_measured": cosine(got[name], exact[name]),
        }
        for name in weights
    ]


def run(kind: str, act: str, depth: int, readout: float, process: float, flat: bool, seed: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    noise, draws = (readout, process), 2 if depth <= 16 else 1
    model = network(kind, act, depth)
    x, y = data()
    chain = hzo.trace(model, x)
    exact = hzo.cotangents(chain, F.mse_loss, x, y, boundaries="all")
    noisy = hzo.noisy(chain, *noise, seed=1) if any(noise) else chain
    began = perf_counter()
    quiet = hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing", seconds=False)
    ways: dict[str, tuple[hzo.Calibration, hzo.Noise | None]] = {"declared": (quiet, hzo.Noise(*noise))}
    if any(noise) and not (depth == 64 and act != "tanh"):
        ways["measured"] = (hzo.calibrate(noisy, x, F.mse_loss, y, assume="nothing", seconds=False), None)
    calibrated, rows = perf_counter() - began, []
    about = {"kind": kind, "act": act, "depth": depth, "readout": readout, "process": process}
    for tree, step in product([t for t in COMPARED if flat or t != "flat"] + ["planned"], (0.1, None)):
        known: dict[tuple[Any, ...], dict[int, float]] = {}  # the same plan is not run twice
        for way, (calibration, declared) in ways.items():
            extra = {"target_cosine": TARGET} if tree == "planned" else {}
            if tree == "planned" and (step is not None or (way == "measured" and depth > 16)):
                continue
            try:
                plan = hzo.plan(
                    noisy, tree=tree, assume="nothing", boundaries="all", step=step, noise=declared,
                    calibration=calibration, **extra,
                )  # fmt: skip
            except PlanError as error:
                rows.append({**about, "tree": tree, "way": way, "step": "chosen", "unreachable": str(error)})
                continue
            if plan.forward_equivalents > DEARER and tree == "planned":
                rows.append({**about, "tree": tree, "way": way, "step": "chosen", "too_dear": plan.forward_equivalents})
                continue
            key = tuple((n.target, n.source, n.step, n.repeats) for n in plan.nodes)
            if key not in known:
                known[key] = measured(chain, noise, plan, exact, x, y, draws)
            if depth == 8 and way == "declared" and readout == 1e-3:
                rows += [
                    {**about, "tree": tree, "way": way, "step": "fixed" if step else "chosen", **row}
                    for row in parameters(chain, noise, plan, x, y)
                ]
            for k, value in known[key].items():
                error = expected_error(chain, plan, k)
                predicted = (1 + error) ** -0.5
                rows.append(
                    {
                        **about,
                        "tree": tree,
                        "way": way,
                        "step": "fixed" if step else "chosen",
                        "boundary": k,
                        "predicted": predicted,
                        "measured": value,
                        "off": predicted - value,
                        "error_ratio": (value**-2 - 1) / error if value > 0 and error > 0 else None,
                        "forward_equivalents": plan.forward_equivalents,
                        "squared_gain": squared_gain(quiet, chain),
                    }
                )
    worst = max((r for r in rows if "off" in r), key=lambda r: abs(r["off"]))
    print(
        f"{kind} {act} {depth} {readout:g} {process:g}: worst {worst['off']:+.3f} at {worst['boundary']} "
        f"({worst['tree']}, {worst['way']}, {worst['step']}); calibrated {calibrated:.1f} s, "
        f"all {perf_counter() - began:.1f} s",
        flush=True,
    )
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The share of rows inside the band, by kind, way and step."""
    found = []
    for kind, way, step in product(BANDS, ("declared", "measured"), ("fixed", "chosen")):
        mine = [r for r in rows if "off" in r and (r["kind"], r["way"], r["step"]) == (kind, way, step)]
        hard = [r for r in mine if 0.2 < r["measured"] < 0.98]
        for name, some in (("all", mine), ("informative", hard)):
            if some:
                inside = sum(abs(r["off"]) <= BANDS[kind] for r in some)
                found.append(
                    {
                        "kind": kind,
                        "noise": way,
                        "step": step,
                        "rows": name,
                        "count": len(some),
                        "inside": inside / len(some),
                        "worst": max(some, key=lambda r: abs(r["off"]))["off"],
                        "mean_off": mean(r["off"] for r in some),
                    }
                )
    return found


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for axes, step in zip(figure.subplots(1, 2), ("fixed", "chosen"), strict=True):
        for shade, (kind, band) in enumerate(reversed(BANDS.items())):
            axes.fill_between([0, 1], [-band, 1 - band], [band, 1 + band], color="0.5", alpha=0.15 + 0.15 * shade, lw=0)
            for k, tree in enumerate([*COMPARED, "planned"]):
                mine = [r for r in rows if "off" in r and (r["kind"], r["tree"], r["step"]) == (kind, tree, step)]
                if mine:
                    axes.scatter(
                        [r["predicted"] for r in mine], [r["measured"] for r in mine], s=14, color=f"C{k}", alpha=0.6,
                        marker="o" if kind == "residual" else "x", label=f"{tree}, {kind}", linewidths=0.8,
                    )  # fmt: skip
        axes.plot([0, 1], [0, 1], color="0.3", lw=0.8)
        axes.set(xlabel="predicted cosine", ylabel="measured cosine", xlim=(0, 1.02), ylim=(-0.1, 1.02))
        axes.set_title(
            f"step 0.1; bands ±{BANDS['residual']} and ±{BANDS['plain']}" if step == "fixed" else "steps of the plan"
        )
        axes.legend(fontsize=7)
    return figure


def main() -> None:
    given = options(__doc__ or "")
    rows = [row for point in grid(given.quick) for row in run(*point, given.seed)]
    shares = summary(rows)
    table(shares, list(shares[0]))
    worst = sorted((r for r in rows if "off" in r), key=lambda r: -abs(r["off"]))[:20]
    columns = ["kind", "act", "depth", "readout", "process", "tree", "way", "step", "boundary", "predicted", "measured"]
    table(worst, columns)
    weights = [{**r, "off": r["weight_predicted"] - r["weight_measured"]} for r in rows if "weight" in r]
    for kind, band in BANDS.items():
        mine = [r for r in weights if r["kind"] == kind]
        worst_weight = max(mine, key=lambda r: abs(r["off"]))
        print(f"gradients of {kind} weights: {sum(abs(r['off']) <= band for r in mine)} of {len(mine)} inside")
        table([worst_weight], ["act", "process", "tree", "step", "weight", "weight_predicted", "weight_measured"])
    write("predicted_cosine", given, plot(rows), bands=BANDS, target=TARGET, summary=shares, rows=rows)


if __name__ == "__main__":
    main()

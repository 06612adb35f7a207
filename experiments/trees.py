"""What the queries of one epoch by bisection buy with other trees: CIFAR-10, pure queries, no structure but locality.

    python experiments/trees.py --data-dir DATA        # writes results/planner/trees.json and .png

The network and the recipe are those of the paper's arm at scale "long" (``hzo_lab.paper.recipes``): inverted residuals
without normalization, spatial parallel perturbation, forward differences. Bisection makes one epoch of it; every other
tree may spend as many forward equivalents, and makes the more steps the less a gradient costs. Backprop makes
bisection's steps. Runs are kept in ``--runs`` and gone on with; with ``--no-train`` those that are not done are left
out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from common import table, write
from hzo_lab.data import Dataset
from hzo_lab.paper.finding import Setting
from hzo_lab.paper.recipes import training
from hzo_lab.paper.trained import Trained, trained
from hzo_lab.records import commit
from hzo_lab.training import replace

TREES = ("bisect", "stagewise", "planned")
SEEDS = 3


def runs_of(setting: Setting, seeds: Sequence[int]) -> dict[str, list[Trained]]:
    """The runs by tree, and backprop's of equal steps; bisection's comes first, for its cost is the budget."""
    datasets: dict[str, Dataset] = {}
    found: dict[str, list[Trained]] = {name: [] for name in (*TREES, "backprop")}
    for seed in seeds:
        reference = trained(training(setting, "cifar10", "paper", "hzo", seed), setting, datasets)
        if reference is None:
            continue
        found["bisect"].append(reference)
        budget = float(reference.summary["forward_equivalents"])
        for tree in TREES[1:]:
            run = trained(replace(reference.config, tree=tree, budget=budget), setting, datasets)
            found[tree] += [] if run is None else [run]
        twin = trained(training(setting, "cifar10", "paper", "backprop", seed), setting, datasets)
        found["backprop"] += [] if twin is None else [twin]
    return found


def summary(found: Mapping[str, Sequence[Trained]]) -> list[dict[str, Any]]:
    rows = []
    for name, runs in found.items():
        if runs:
            reached = [run.accuracy for run in runs]
            rows.append(
                {
                    "tree": name,
                    "seeds": [run.config.seed for run in runs],
                    "accuracy": statistics.fmean(reached),
                    "deviation": statistics.stdev(reached) if len(reached) > 1 else None,
                    "steps": runs[0].summary["step"],
                    "forward_equivalents": runs[0].summary["forward_equivalents"],
                    "lowest_cosine": min((run.lowest_cosine for run in runs if run.lowest_cosine), default=None),
                    "runs": [run.where() for run in runs],
                }
            )
    return rows


def draw(found: Mapping[str, Sequence[Trained]]) -> Figure:
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for color, (name, runs) in enumerate(found.items()):
        for k, run in enumerate(runs):
            read = [(r["cost"], 100 * r["test_accuracy"]) for r in run.records if r.get("test_accuracy") is not None]
            label = {"label": name} if k == 0 else {}
            axes.plot(*zip(*read, strict=True), marker=".", color=f"C{color}", **label)
    axes.set(xlabel="forward passes of a batch", ylabel="test accuracy, %", xscale="log")
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with cifar-10-batches-py")
    parser.add_argument("--runs", type=Path, default=Path("runs/trees"), help="where runs are kept")
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "planner")
    given = parser.parse_args()
    torch.set_num_threads(1)
    commit()
    setting = Setting(
        scale="long", out=given.runs, data_dir=given.data_dir, runs=(given.runs,), train=given.train, tell=print
    )
    found = runs_of(setting, range(given.seed, given.seed + given.seeds))
    if not any(found.values()):
        raise SystemExit(f"expected finished runs in {given.runs}: let them be made, without --no-train")
    rows = [row for name, runs in found.items() for run in runs for row in run.rows(tree=name)]
    table(summary(found), ["tree", "accuracy", "deviation", "steps", "forward_equivalents", "lowest_cosine"])
    write("trees", given, draw(found), summary=summary(found), rows=rows)


if __name__ == "__main__":
    main()

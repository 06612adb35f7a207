"""Which tree trains a deep analog chain best at equal cost: 32 tiles in a row, noisy readings, handwritten digits.

    python experiments/deep_chain.py              # writes results/planner/deep_chain.json and .png

Residual tiles, x + tanh(W x) / 4, of which nothing is assumed: coordinate differences, and every number that a query
returns carries readout noise. For each tree the planner chooses steps and repeats for the same forward equivalents a
step, from one calibration of the noisy chip; all train the same network from the same seed on the same batches.
Accuracy is read without noise, so that it shows the gradients alone. Beside them the twin by backprop, and SPSA and
node perturbation, whose losses are read with the same noise, by as many forward equivalents.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hzo
from common import cosine, options, table, write
from hzo_lab.data import batch_indices, batches_per_epoch, digits, make_batch

TILES, WIDTH, BATCH, RATE, EPOCHS, SEEDS = 32, 16, 32, 2e-3, 2, 3
NOISES = (0.1, 0.3)  # of every number that is read; activations are of size one
BUDGET = 120.0  # forward equivalents a step
COMPARED = ("flat", "stagewise", "bisect", 4, "planned")
WHERE: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
Gradient = Callable[[nn.Module, Tensor, Tensor, int], Any]
"""Adds the gradient of one step to ``.grad``; the last argument numbers the step."""


class Tile(nn.Module):
    """A tile and the digital sum behind it, which hardly stretches or shrinks what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x)) / 4


def chip(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, WIDTH), *(Tile() for _ in range(TILES)), nn.Linear(WIDTH, 10))


def batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
    data = digits()
    steps = batches_per_epoch(len(data.train), BATCH)
    chosen = batch_indices(len(data.train), BATCH, seed, step // steps, step % steps)
    return make_batch(data, data.train, chosen, **WHERE)


def by_tree(tree: str | int, noise: float, seed: int) -> tuple[Gradient, hzo.Plan]:
    """Planned once, before the first step, on its batch."""
    model = chip(seed)
    x, y = batch(seed, 0)
    noisy = hzo.noisy(hzo.trace(model, x), readout=noise, seed=seed)
    known = hzo.calibrate(noisy, x, cross_entropy, y, assume="nothing", seconds=False)
    plan = hzo.plan(noisy, tree, assume="nothing", noise=noise, calibration=known, budget=BUDGET)

    def gradient(model: nn.Module, x: Tensor, y: Tensor, step: int) -> None:
        chain = hzo.noisy(hzo.trace(model, x), readout=noise, seed=1000 * seed + step)
        hzo.backward(chain, cross_entropy, x, y, plan=plan)

    return gradient, plan


def by_losses(method: Callable[..., Any], noise: float) -> Gradient:
    """Estimators that read the loss alone, off outputs with the same noise."""

    def read(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output + noise * torch.randn_like(output), target, reduction="none")

    def gradient(model: nn.Module, x: Tensor, y: Tensor, _: int) -> None:
        method(model, read, x, y, samples=max(1, round(BUDGET / 2)), mu=0.1)

    return gradient


def backprop(model: nn.Module, x: Tensor, y: Tensor, _: int) -> None:
    hzo.baselines.backprop(model, cross_entropy, x, y)


def train(gradient: Gradient, seed: int, epochs: int) -> dict[str, float]:
    """Test accuracy in percent, the first gradient's cosine with backprop's, and processor seconds of a step."""
    model, data = chip(seed), digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = batches_per_epoch(len(data.train), BATCH) * epochs
    first, began = 0.0, process_time()
    for step in range(steps):
        x, y = batch(seed, step)
        optimizer.zero_grad()
        gradient(model, x, y, step)
        if step == 0:
            found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            exact = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
            first = cosine(found, torch.cat([g.flatten() for g in exact]))
        optimizer.step()
    seconds = (process_time() - began) / steps
    x, y = make_batch(data, data.test, torch.arange(len(data.test)), **WHERE)
    with torch.no_grad():
        accuracy = 100 * float((model(x).argmax(1) == y).float().mean())
    return {"accuracy": accuracy, "cosine": first, "seconds": seconds}


def rows_of(noise: float, seed: int, epochs: int) -> list[dict[str, Any]]:
    found = []
    for tree in COMPARED:
        try:
            gradient, plan = by_tree(tree, noise, seed)
        except hzo.errors.PlanError:
            continue  # the budget does not pay for one measurement of every boundary
        spent = {"forward_equivalents": plan.forward_equivalents, "queries": plan.queries}
        found.append({"method": str(tree), **spent, **train(gradient, seed, epochs)})
    for name in ("spsa", "node_perturbation"):
        gradient = by_losses(getattr(hzo.baselines, name), noise)
        found.append({"method": name, "forward_equivalents": BUDGET, **train(gradient, seed, epochs)})
    return [{"noise": noise, "seed": seed, **row} for row in found]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for noise, method in dict.fromkeys((row["noise"], row["method"]) for row in rows):
        own = [row for row in rows if (row["noise"], row["method"]) == (noise, method)]
        means: dict[str, Any] = {
            key: statistics.mean(row[key] for row in own)
            for key in ("forward_equivalents", "cosine", "accuracy", "seconds")
        }
        scatter = statistics.stdev(row["accuracy"] for row in own) if len(own) > 1 else 0.0
        found.append({"noise": noise, "method": method, **means, "deviation": scatter})
    return found


def draw(found: list[dict[str, Any]], twin: float) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(row["method"] for row in found):
        own = [row for row in found if row["method"] == method]
        noises = [row["noise"] for row in own]
        axes.errorbar(
            noises,
            [row["accuracy"] for row in own],
            [row["deviation"] for row in own],
            marker="o",
            capsize=3,
            label=method,
        )
    axes.axhline(twin, color="gray", linestyle="--", label="backprop")
    axes.set(xscale="log", xlabel="readout noise, in units of the activations", ylabel="test accuracy, %")
    axes.set_title(f"{TILES} tiles, {BUDGET:g} forward equivalents a step, {EPOCHS} epochs of digits")
    axes.legend()
    return figure


def main() -> None:
    given = options(__doc__ or "")
    epochs, seeds, noises = (1, 1, NOISES[:1]) if given.quick else (EPOCHS, SEEDS, NOISES)
    seeds = range(given.seed, given.seed + seeds)
    twin = [train(backprop, seed, epochs)["accuracy"] for seed in seeds]
    rows: list[dict[str, Any]] = []
    for noise in noises:
        for seed in seeds:
            rows += rows_of(noise, seed, epochs)
        table(summary(rows), ["noise", "method", "forward_equivalents", "cosine", "accuracy", "deviation", "seconds"])
    found = summary(rows)
    print(f"backprop: {statistics.mean(twin):.2f} %")
    write("deep_chain", given, draw(found, statistics.mean(twin)), budget=BUDGET, twin=twin, summary=found, rows=rows)


if __name__ == "__main__":
    main()

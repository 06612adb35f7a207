"""What a budget of seconds buys with each forward-only method: one network, CIFAR-10, accuracy against time and passes.

    python experiments/peers.py --data-dir DATA        # writes results/planner/peers.json and .png

A residual CNN without normalization (4 blocks of 8 channels on an 8 × 8 map, 2,818 weights), batches of 128, SGD with
momentum. All methods see the same batches in the same order until their processor seconds are spent. Each method's
learning rate is the best of three, after a quarter of the seconds of a training from another seed. Beside the library's
methods, three recipes of others, written for this network from their papers:

- *DeepZero* (Chen et al., ICLR 2024, arXiv 2310.02025): differences over a tenth of the weights, drawn anew each step,
  and feature reuse: a query starts at the stage whose weight it moves. Its pruning ratios (ZO-GraSP) are left out:
  every layer keeps a tenth.
- *local forward gradients* (Ren et al., ICLR 2023, arXiv 2210.03310): each stage has a loss of its own, and moves its
  output along random directions.
- *direct feedback alignment* (Nøkland, NeurIPS 2016, arXiv 1609.01596): fixed random matrices carry the error to each
  stage.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import hzo
from common import table, write
from hzo.baselines import BASELINES
from hzo_lab.data import DATA_SETS, Dataset, batch_indices, batches_per_epoch, make_batch
from hzo_lab.records import commit
from hzo_lab.training.models import MODELS

BATCH, RATE, MOMENTUM, DEPTH, WIDTH = 128, 0.1, 0.9, 4, 8
SECONDS, SEEDS, READINGS, KEPT, TESTED = 20.0, 3, 8, 0.1, 2000
SHARES, TUNING_SEED = (1.0, 0.1, 0.01), 1000
WHERE: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
Step = Callable[[Tensor, Tensor], float]
"""Adds the gradient of a batch to ``.grad``; returns the forward passes of the batch that it took."""


def counted(gradient: Callable[[Tensor, Tensor], Any]) -> Step:
    def step(x: Tensor, y: Tensor) -> float:
        with hzo.count_queries() as count:
            gradient(x, y)
        return 1 + count.forward_equivalents

    return step


def planned(model: nn.Module, x: Tensor, **options: Any) -> Step:
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, **options)
    return counted(lambda x, y: hzo.backward(chain, cross_entropy, x, y, plan=plan))


def estimator(model: nn.Module, name: str, samples: int) -> Step:
    known = BASELINES[name]

    def step(x: Tensor, y: Tensor) -> float:
        known.estimate(model, cross_entropy, x, y, samples=samples)
        return float(samples * (known.passes or 1))

    return step


def backprop(model: nn.Module) -> Step:
    def step(x: Tensor, y: Tensor) -> float:
        hzo.baselines.backprop(model, cross_entropy, x, y)
        return 3.0  # a reverse sweep is worth two passes, by custom

    return step


@torch.no_grad()
def activations_of(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    found = [x]
    for stage in model:
        found.append(stage(found[-1]))
    return found


def deepzero(model: nn.Sequential, mu: float = 5e-3) -> Step:
    weights = [(k, p) for k, stage in enumerate(model) for p in stage.parameters()]

    @torch.no_grad()
    def step(x: Tensor, y: Tensor) -> float:
        before = activations_of(model, x)
        base, passes = float(cross_entropy(before[-1], y)), 1.0
        for k, weight in weights:
            weight.grad = torch.zeros_like(weight)
            chosen = torch.randperm(weight.numel())[: max(1, round(KEPT * weight.numel()))].tolist()
            flat, grads = weight.view(-1), weight.grad.view(-1)
            for element in chosen:
                kept = flat[element].clone()
                flat[element] += mu
                grads[element] = (float(cross_entropy(model[k:](before[k]), y)) - base) / mu
                flat[element] = kept
            passes += len(chosen) * (len(model) - k) / len(model)
        return passes

    return step


def local_forward_gradients(model: nn.Sequential, classes: int, shapes: list[torch.Size], samples: int = 4) -> Step:
    """Each stage's head reads means over its map; heads and weights take exact products, activations random ones."""
    heads = [nn.Linear(shape[1], classes) for shape in shapes]

    def step(x: Tensor, y: Tensor) -> float:
        given = x
        for k, (stage, head) in enumerate(zip(model, heads, strict=True)):
            out = stage(given)
            weights = list(stage.parameters())
            if weights:

                def local(z: Tensor, head: nn.Module = head, last: bool = k == len(heads) - 1) -> Tensor:
                    return cross_entropy(z if last else head(z.flatten(2).mean(2) if z.dim() > 2 else z), y)

                point, g = out.detach(), torch.zeros_like(out)
                for _ in range(samples):
                    u = torch.randn_like(point)
                    g += torch.func.jvp(local, (point,), (u,))[1] * u / samples
                for weight, found in zip(weights, torch.autograd.grad(out, weights, g), strict=True):
                    weight.grad = found
                if k < len(heads) - 1:
                    own = list(head.parameters())
                    for weight, found in zip(own, torch.autograd.grad(local(point), own), strict=True):
                        weight.data -= RATE * found
            given = out.detach()
        return 1.0 + samples  # a local loss and its derivative cost little beside a stage

    return step


def feedback_alignment(model: nn.Sequential, classes: int, shapes: list[torch.Size]) -> Step:
    # As small as the gradient of a mean over the map, which a network's head takes.
    fixed = [torch.randn(classes, shape[1:].numel()) / shape[1:].numel() for shape in shapes]

    def step(x: Tensor, y: Tensor) -> float:
        outputs, given = [], x
        for stage in model:
            outputs.append(stage(given))
            given = outputs[-1].detach()
        error = (outputs[-1].detach().softmax(1) - one_hot(y, classes)) / len(y)
        for k, stage in enumerate(model):
            weights = list(stage.parameters())
            if weights:
                g = error if k == len(model) - 1 else (error @ fixed[k]).view_as(outputs[k])
                for weight, found in zip(weights, torch.autograd.grad(outputs[k], weights, g), strict=True):
                    weight.grad = found
        return 2.0  # no reverse sweep, but each stage's own products

    return step


def methods(model: nn.Sequential, x: Tensor, classes: int) -> Iterator[tuple[str, Step, float]]:
    """Name, step and the largest learning rate to try."""
    shapes = [t.shape for t in activations_of(model, x)[1:]]
    yield "backprop", backprop(model), RATE
    yield "hzo, structure", planned(model, x), RATE
    yield "hzo, the paper's", planned(model, x, **hzo.presets.paper), RATE
    yield "DeepZero's recipe", deepzero(model), RATE
    for name in ("spsa", "mezo", "forward-gradient", "node-perturbation"):
        yield name, estimator(model, name, samples=1), RATE * BASELINES[name].rate
    yield "local forward gradients", local_forward_gradients(model, classes, shapes), RATE
    yield "feedback alignment", feedback_alignment(model, classes, shapes), RATE


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    right = 0
    for start in range(0, TESTED, 500):
        x, y = make_batch(data, data.test, torch.arange(start, start + 500), **WHERE)
        right += int((model(x).argmax(1) == y).sum())
    return 100 * right / TESTED


def train(name: str, data: Dataset, seed: int, seconds: float, share: float) -> list[dict[str, Any]]:
    """Accuracy at even shares of the seconds; stops where the weights diverge."""
    torch.manual_seed(seed)
    model = MODELS["cnn"].make(data.shape, len(data.classes), depth=DEPTH, width=WIDTH)
    assert isinstance(model, nn.Sequential)
    x, _ = make_batch(data, data.train, torch.arange(BATCH), **WHERE)
    step, rate = next((s, r) for n, s, r in methods(model, x, len(data.classes)) if n == name)
    optimizer = torch.optim.SGD(model.parameters(), lr=share * rate, momentum=MOMENTUM)
    spent = passes = 0.0
    steps, per_epoch, rows = 0, batches_per_epoch(len(data.train), BATCH), []
    while spent < seconds:
        chosen = batch_indices(len(data.train), BATCH, seed, steps // per_epoch, steps % per_epoch)
        x, y = make_batch(data, data.train, chosen, **WHERE)
        began = process_time()
        optimizer.zero_grad()
        try:
            passes += step(x, y)
        except (hzo.errors.StepError, hzo.errors.NonFiniteError, hzo.errors.PrecisionError):
            break  # the weights have diverged
        optimizer.step()
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            break
        spent += process_time() - began
        steps += 1
        due = int(READINGS * spent / seconds) - len(rows)
        if due > 0:
            about = {"method": name, "seed": seed, "seconds": spent, "steps": steps, "passes": passes}
            rows += due * [{**about, "accuracy": accuracy(model, data)}]
    return rows[:READINGS]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        last = list({row["seed"]: row for row in rows if row["method"] == name}.values())
        scatter = statistics.stdev(row["accuracy"] for row in last) if len(last) > 1 else 0.0
        means = {key: statistics.mean(row[key] for row in last) for key in ("steps", "passes", "accuracy")}
        found.append({"method": name, **means, "deviation": scatter})
    return found


def draw(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_time, by_passes = figure.subplots(1, 2, sharey=True)
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        curves = [[row for row in own if row["seed"] == seed] for seed in sorted({row["seed"] for row in own})]
        points = [list(same) for same in zip(*curves, strict=False)]
        for axes, key in ((by_time, "seconds"), (by_passes, "passes")):
            across, up = ([statistics.mean(row[k] for row in same) for same in points] for k in (key, "accuracy"))
            axes.plot(across, up, marker=".", label=name)
    by_time.set(xlabel="processor seconds", ylabel="test accuracy, %")
    by_passes.set(xlabel="forward passes of a batch", xscale="log")
    by_passes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with cifar-10-batches-py")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor seconds of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "planner")
    given = parser.parse_args()
    torch.set_num_threads(1)
    commit()
    data = DATA_SETS["cifar10"].read(given.data_dir, 32)
    model = MODELS["cnn"].make(data.shape, len(data.classes), depth=DEPTH, width=WIDTH)
    x, _ = make_batch(data, data.train, torch.arange(2), **WHERE)
    names = [name for name, _, _ in methods(model, x, len(data.classes))]
    shares, rows = {}, []
    for name in names:
        trials = {share: train(name, data, TUNING_SEED, given.seconds / 4, share) for share in SHARES}
        reached = {share: trial[-1]["accuracy"] if len(trial) == READINGS else 0.0 for share, trial in trials.items()}
        shares[name] = max(reached, key=lambda share: reached[share])
        print(f"{name}: {reached}", flush=True)
    for seed in range(given.seed, given.seed + SEEDS):
        for name in names:
            own = train(name, data, seed, given.seconds, shares[name])
            print(f"seed {seed}  {name}: " + (f"{own[-1]['accuracy']:.1f} %" if own else "diverged"), flush=True)
            rows += own
    found = summary(rows)
    table(found, ["method", "steps", "passes", "accuracy", "deviation"])
    write("peers", given, draw(rows), seconds=given.seconds, tested=TESTED, shares=shares, summary=found, rows=rows)


if __name__ == "__main__":
    main()

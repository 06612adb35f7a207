"""Memory and time of a gradient against depth: activations stored all or on a path, beside backprop with checkpoints.

    python benchmarks/memory_depth.py     # prints a table, writes results/benchmarks/memory_depth.json and .png

The network is a plain chain of L stages, each a linear layer and a tanh, with the default plan of ``hzo.plan``. Beside
it stand backprop, ``torch.utils.checkpoint.checkpoint_sequential`` with √L segments, and checkpoints nested in halves,
whose recursion is that of a path.

Memory is the peak of all that is allocated during a gradient, above what is there before it, by the profiler's count.
Parameter gradients are not activations: allocations of exactly the size of a weight or a bias are left out (the batch
is chosen so that no activation has that size), which leaves out the weight that hzo measures at each layer as well.
What a step of the sweep works with counts. Methods take turns, and each round's times are divided by backprop's.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import hzo
from hzo_lab.records import peak_of
from record import write

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "memory_depth.json"
# Nothing is drawn here; saved states of 5 KB each would otherwise outweigh what nested checkpoints save.
WITHOUT_STATES: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
LABELS = {
    "hzo": "hzo, all stored",
    "hzo path": "hzo, path stored",
    "backprop": "backprop",
    "checkpoints": "backprop, √L checkpoints",
    "nested checkpoints": "backprop, nested checkpoints",
}


def network(depth: int, width: int) -> nn.Sequential:
    """Orthogonal weights, so that neither activations nor cotangents vanish at the greatest depth."""
    layers = [nn.Linear(width, width) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers))


def nested(stages: nn.Sequential, x: Tensor) -> Tensor:
    """The left half keeps its input alone, the right half goes on likewise."""
    if len(stages) == 1:
        return stages[0](x)  # type: ignore[no-any-return]
    half = len(stages) // 2
    return nested(stages[half:], checkpoint(nested, stages[:half], x, **WITHOUT_STATES))


def gradients(model: nn.Sequential, x: Tensor, y: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, hzo.Plan]]:
    """By method a function that adds to every ``.grad``; and the plans."""
    chain = hzo.trace(model, x)
    everything = hzo.plan(chain)
    plans = {"hzo": everything, "hzo path": hzo.plan(chain, memory=everything.activation_bytes - 1)}
    segments = round(math.sqrt(len(model)))

    def by(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: F.mse_loss(forward(), y).backward()

    return {
        "hzo": lambda: hzo.backward(chain, F.mse_loss, x, y, plan=plans["hzo"]),
        "hzo path": lambda: hzo.backward(chain, F.mse_loss, x, y, plan=plans["hzo path"]),
        "backprop": by(lambda: model(x)),
        "checkpoints": by(lambda: checkpoint_sequential(model, segments, x, **WITHOUT_STATES)),
        "nested checkpoints": by(lambda: nested(model, x)),
    }, plans


def cosine(model: nn.Sequential, run: Callable[[], Any], reference: dict[str, Tensor]) -> float:
    """The least over all parameters."""
    model.zero_grad()
    run()
    return min(
        float(F.cosine_similarity(p.grad.flatten(), reference[n], dim=0, eps=1e-30))
        for n, p in model.named_parameters()
    )  # type: ignore[union-attr]


def measure(depth: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    model = network(depth, options.width)
    x, y = torch.randn(options.batch, options.width), torch.randn(options.batch, options.width)
    run, plans = gradients(model, x, y)
    run["backprop"]()
    reference = {n: p.grad.flatten().clone() for n, p in model.named_parameters() if p.grad is not None}
    cosines = {name: cosine(model, run[name], reference) for name in plans}
    ignored = {p.numel() * p.element_size() for p in model.parameters()}
    activation = options.batch * options.width * 4
    if activation in ignored:
        raise SystemExit("an activation is as large as a weight; choose another --batch")
    peaks = {name: peak_of(function, ignored) for name, function in run.items()}
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(options.rounds):
        for name, function in run.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    ratios = {name: median(a / b for a, b in zip(t, seconds["backprop"], strict=True)) for name, t in seconds.items()}
    return {
        "depth": depth,
        "boundary_bytes": activation,
        "peak_bytes": peaks,
        "predicted_bytes": {name: plan.activation_bytes for name, plan in plans.items()},
        "stages_run_again": plans["hzo path"].recomputed // options.batch,
        "seconds": {name: median(taken) for name, taken in seconds.items()},
        "time_over_backprop": ratios,
        "min_cosine": cosines,
        "all_seconds": seconds,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    memory, spent = figure.subplots(1, 2)
    depths = [row["depth"] for row in rows]
    for k, (name, label) in enumerate(LABELS.items()):
        style = {"color": f"C{k}", "marker": "o", "markersize": 4, "label": label}
        memory.loglog(depths, [row["peak_bytes"][name] / 2**20 for row in rows], base=2, **style)
        spent.semilogx(depths, [row["time_over_backprop"][name] for row in rows], base=2, **style)
        if name in rows[0]["predicted_bytes"]:
            predicted = [row["predicted_bytes"][name] / 2**20 for row in rows]
            memory.loglog(depths, predicted, base=2, color=f"C{k}", linestyle=":", label=f"{label}, predicted")
    memory.set(xlabel="stages", ylabel="peak of activations (MiB)")
    spent.set(xlabel="stages", ylabel="time over backprop's", ylim=(0, None))
    for axes in (memory, spent):
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.grid(alpha=0.3)
    memory.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    memory.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for depth in options.depths:
        row = measure(depth, options)
        rows.append(row)
        print(
            f"{depth} stages ({row['stages_run_again']} run again), least cosine {min(row['min_cosine'].values()):.7f}"
        )
        for name in LABELS:
            predicted = row["predicted_bytes"].get(name)
            print(
                f"  {name:18} {row['peak_bytes'][name] / 2**20:8.2f} MiB  {row['seconds'][name] * 1000:8.1f} ms  "
                f"{row['time_over_backprop'][name]:5.2f} × backprop"
                + (f"  (predicted {predicted / 2**20:.2f} MiB)" if predicted else ""),
                flush=True,
            )
    write(options.out, options={name: value for name, value in vars(options).items() if name != "out"}, rows=rows)
    plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Real parts without a usable derivative: what can be learned in front of them, by which gradient, at which price.

    python experiments/real_parts.py            # writes results/blackbox/real_parts.json and .png

The networks are those of examples/: spiking neurons (snnTorch), 3-bit rounding (PyTorch), analog tiles (aihwkit), a
frozen ONNX model (onnxruntime), an interferometer in a process of its own. Each is trained on scikit-learn's digits
with the gradient of the black box; with the one that is made up for such parts (surrogate, straight-through) or that a
simulated part happens to have; by SPSA, which is given as many forward passes a step as the black box makes of its
part, rounded up; and with nothing but the last layer trained, the floor.

Every method gets the learning rate (SPSA also the step) that is best on a fifth of the training digits held out, with a
seed of its own, for the length of training that is reported. The test digits are seen once, at the end of a run.

The cosine is that of a step's gradient to the reference's, over all parameters before the last layer, after two epochs:
the reference is exact for the ONNX model and the interferometer, and noise-free for the tiles. SPSA needs about
d c² / (1 − c²) samples of two passes for a cosine c with d parameters.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from aihwkit.optim import AnalogAdam
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hzo
from common import RESULTS, cosine, options, table, write

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import analog
import digits
import interferometer
import onnx_middle
import quantized
import spiking
import subprocess_simulator

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS = (1e-3, 1e-2, 1e-1)  # of SPSA, in its parameters
TUNING_SEED, SEEDS = 100, range(5)
HIGHEST = 0.99  # cosine that SPSA is asked for where the box's is higher: its price grows without bound


class OwnBackward(nn.Module):
    """An analog tile with the backward pass that aihwkit gives its simulation: ideal converters, no noise."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.tile = analog.Tile(layer).tile

    def forward(self, x: Tensor) -> Tensor:
        return self.tile(x)


class Interferometer(nn.Module):
    """examples/interferometer.py in PyTorch."""

    def forward(self, phases: Tensor) -> Tensor:
        modes = interferometer.MODES
        coupler = torch.tensor([[1, 1j], [1j, 1]], dtype=torch.complex64) / 2**0.5
        fields = torch.full((len(phases), modes), modes**-0.5, dtype=torch.complex64)
        used = 0
        for layer in range(interferometer.LAYERS):
            first = layer % 2
            count = (modes - first) // 2
            pairs = fields[:, first : first + 2 * count].unflatten(1, (count, 2)) @ coupler
            shift = torch.stack([torch.exp(1j * phases[:, used : used + count]), torch.ones(len(phases), count)], 2)
            moved = ((pairs * shift) @ coupler).flatten(1)
            fields = torch.cat([fields[:, :first], moved, fields[:, first + 2 * count :]], 1)
            used += count
        return fields.abs() ** 2


def on_tiles(how: str, seed: int) -> nn.Module:
    """The same chip for every method: programmed with the same errors."""
    model = analog.digital(seed)
    torch.manual_seed(seed)
    return analog.on_chip(model, analog.Tile if how == "hzo" else OwnBackward)


def optics(how: str, seed: int) -> nn.Module:
    model = subprocess_simulator.network(seed)
    if how != "hzo":
        model[1] = Interferometer()
    return model


@dataclass(frozen=True)
class Part:
    """One of the examples.

    Attributes:
        network: from "hzo" or the reference's name, and a seed.
        reference: the other gradient; exact where the part has a derivative that we know.
    """

    network: Callable[[str, int], nn.Module]
    reference: str
    epochs: int
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    reads: int = 1


PARTS = {
    "spiking": Part(spiking.network, "atan", 20),
    "quantized": Part(quantized.network, "straight-through", 30),
    "analog": Part(on_tiles, "aihwkit", 10, AnalogAdam, reads=10),
    "onnx": Part(onnx_middle.network, "autograd", 30),
    "simulator": Part(optics, "autograd", 20),
}


def passes(model: nn.Module) -> float:
    """Queries of a step over what one forward pass asks of the part."""
    calls = 0

    def counted(*_: Any) -> None:
        nonlocal calls
        calls += 1

    boxes = [m for m in model.modules() if type(m).__name__ in ("BlackBox", "Box")]
    hooks = [box.register_forward_hook(counted) for box in boxes]
    x, y = digits.examples("train")
    with hzo.count_queries() as count:
        digits.autograd(model, cross_entropy, x[:64], y[:64])
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return count.queries / (64 * calls)


def run(
    part: Part, method: str, seed: int, rate: float, *, samples: int, mu: float | None = None, tuning: bool = False
) -> float:
    model = part.network(part.reference if method == "reference" else "hzo", seed)
    how: dict[str, Any] = {}
    if method == "frozen":
        digits.last_layer_only(model)
    if method == "spsa":
        noise = torch.Generator().manual_seed(seed)
        how["gradient"] = partial(hzo.baselines.spsa, samples=samples, mu=mu, generator=noise)
    split, judged = ("fit", "held out") if tuning else ("train", "test")
    digits.train(model, part.epochs, rate, seed=seed, optimizer=part.optimizer, split=split, **how)
    return digits.accuracy(model, judged, reads=part.reads)


def tuned(part: Part, method: str, samples: int) -> dict[str, Any]:
    grid = [{"rate": rate, "mu": mu} for rate in RATES for mu in (STEPS if method == "spsa" else (None,))]
    found = [run(part, method, TUNING_SEED, **point, samples=samples, tuning=True) for point in grid]
    return grid[found.index(max(found))]


def gradient_cosine(part: Part, rate: float, seed: int) -> tuple[float, int]:
    """Of the box's gradient to the reference's, at the same parameters; and how many those are."""
    mine, theirs = (part.network(how, seed) for how in ("hzo", part.reference))
    digits.train(mine, 2, rate, seed=seed, optimizer=part.optimizer)
    theirs.load_state_dict(mine.state_dict(), strict=False)  # the reference may know weights that the box hides
    names = [name for name, p in mine.named_parameters() if p.requires_grad]
    last = list(dict(mine.named_children()))[-1]
    x, y = digits.examples("train")
    found = []
    for model in (mine, theirs):
        model.zero_grad()
        digits.autograd(model, cross_entropy, x[:64], y[:64])
        gradients = {name: p.grad for name, p in model.named_parameters()}
        own = [gradients[name] for name in names if not name.startswith(f"{last}.")]
        found.append(torch.cat([g.flatten() for g in own if g is not None]))
    return cosine(*found), sum(p.numel() for p in mine.parameters() if p.requires_grad)


def chip_before(name: str, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """The digital network, and what it does on the chip that the others are trained on."""
    found: dict[str, list[float]] = {"digital": [], "as programmed": []}
    for seed in seeds:
        found["digital"].append(digits.accuracy(analog.digital(seed)))
        found["as programmed"].append(digits.accuracy(on_tiles("hzo", seed), reads=10))
    return [
        {"part": name, "method": method, "accuracy": statistics.mean(runs), "deviation": statistics.stdev(runs)}
        for method, runs in found.items()
    ]


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure((11, 3.5), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(PARTS), sharey=True), PARTS, strict=True):
        mine = [row for row in rows if row["part"] == part]
        found = [row["accuracy"] for row in mine]
        axes.bar([row["method"] for row in mine], found, yerr=[row["deviation"] for row in mine], color="#4477aa")
        axes.set(title=part, ylim=(0, 100))
        axes.tick_params(axis="x", rotation=60)
    figure.axes[0].set_ylabel("test accuracy, %")
    return figure


def main() -> None:
    given = options(__doc__ or "", out=RESULTS.parent / "blackbox")
    seeds = range(3) if given.quick else SEEDS
    rows: list[dict[str, Any]] = []
    for name, part in PARTS.items():
        price = passes(part.network("hzo", 0))
        samples = math.ceil(price / 2)
        for method in ("hzo", "reference", "spsa", "frozen"):
            started = time.perf_counter()
            point = {"rate": 1e-2, "mu": 1e-2} if given.quick else tuned(part, method, samples)
            found = [run(part, method, seed, **point, samples=samples) for seed in seeds]
            row = {"part": name, "method": part.reference if method == "reference" else method, **point}
            row |= {"accuracy": statistics.mean(found), "deviation": statistics.stdev(found), "runs": found}
            row |= {"passes": {"hzo": price, "spsa": 2 * samples}.get(method, 0)}
            if method == "hzo":
                similarity, parameters = gradient_cosine(part, point["rate"], 0)
                row |= {"cosine": similarity, "parameters": parameters}
                aim = min(similarity, HIGHEST)
                row["spsa_passes"] = 2 * (parameters - 1) * aim**2 / (1 - aim**2)
            row["seconds"] = time.perf_counter() - started
            rows.append(row)
            print(row, flush=True)
        if name == "analog":
            rows += chip_before(name, seeds)
    table(rows, ("part", "method", "accuracy", "deviation", "passes", "rate", "mu", "cosine", "spsa_passes", "seconds"))
    write("real_parts", given, plot(rows), seeds=list(seeds), tuning_seed=TUNING_SEED, rows=rows)


if __name__ == "__main__":
    main()

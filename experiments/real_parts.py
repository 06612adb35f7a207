"""Real parts without a usable derivative: what can be learned in front of them, by which gradient, at which price.

    PYTHONPATH=examples python experiments/real_parts.py    # writes results/blackbox/real_parts.json and .png
    PYTHONPATH=examples python experiments/real_parts.py analog    # this part alone: real_parts_analog.json and .png

The networks are those of examples/: spiking neurons (snnTorch), 3-bit rounding (PyTorch), analog tiles (aihwkit), a
frozen ONNX model (onnxruntime), an interferometer in a process of its own. Each is trained on scikit-learn's digits
with the gradient of the black box; with the one that is made up for such parts (surrogate, straight-through) or that a
simulated part happens to have; by SPSA, which is given as many forward passes a step as the black box makes of its
part, rounded up to whole pairs; and with nothing but the last layer trained, the floor.

Every method gets the learning rate, and then the step (of SPSA, and of the box where no quantum gives it), that is best
on a fifth of the training digits held out, with a seed of its own and half the epochs. The test digits are seen once,
at the end of a run.

``cosine`` is that of the box's gradient to the reference's, the mean over batches and seeds, of all parameters before
the last layer after two epochs. The reference is exact for the ONNX model and the interferometer; a surrogate or
straight-through is not the truth, only another opinion; of the tiles it is the mean of many reads, and
``reference_cosine`` is that of one read to it: what is lost to the noise of the forward pass alone. SPSA needs about
(d − 1) c² / (1 − c²) samples of two passes for a cosine c with d trained parameters, without noise. SPSA's two passes
read the tiles with the same draws of noise, which no chip can do; the box's queries do not.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from aihwkit.optim import AnalogAdam
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import analog
import analog_chain
import digits
import hzo
import interferometer
import onnx_middle
import quantized
import spiking
import subprocess_simulator
from common import RESULTS, cosine, options, table, write
from hzo.errors import NonFiniteError

RATES = (3e-3, 1e-2, 3e-2)
SPSA_STEPS = (1e-3, 1e-2, 1e-1)  # in its parameters
TUNING_SEED, SEEDS = 100, range(3)
BATCHES, READS = 4, 30  # for a cosine
HIGHEST = 0.99  # cosine that SPSA is asked for where the box's is higher: its price grows without bound
TARGETS = (0.9, 0.97)


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
        modes, kind = interferometer.MODES, torch.promote_types(phases.dtype, torch.complex64)
        coupler = torch.tensor([[1, 1j], [1j, 1]], dtype=kind) / 2**0.5
        fields = torch.full((len(phases), modes), modes**-0.5, dtype=kind)
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


def on_tiles(how: str, seed: int, split: str = "train") -> nn.Module:
    """The same chip for every method: programmed with the same errors."""
    model = analog.digital(seed, split)
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
        network: from "hzo" or a reference's name, and a seed.
        references: other gradients, the first to compare the box's with.
        example, steps: the module whose STEP is to be chosen from these.
        pretrained: the network was trained before, on digits of the split that it is given.
        reads: a noisy network's accuracy is the mean over so many.
    """

    network: Callable[..., nn.Module]
    references: tuple[str, ...]
    epochs: int
    example: ModuleType | None = None
    steps: tuple[float, ...] = ()
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    pretrained: bool = False
    reads: int = 1


PARTS = {
    "quantized": Part(quantized.network, ("straight-through",), 30),
    "spiking": Part(spiking.network, ("atan", "fast sigmoid"), 20, spiking, (0.5, 1.0, 2.0)),
    "analog": Part(on_tiles, ("aihwkit",), 10, analog, (1.0, 2.0, 4.0), AnalogAdam, True, reads=10),
    "onnx": Part(onnx_middle.network, ("autograd",), 30, pretrained=True),
    "simulator": Part(optics, ("autograd",), 20),
}


def passes(model: nn.Module) -> float:
    """Queries of a step over what one forward pass asks of the parts."""
    boxes = [m for m in model.modules() if isinstance(m, hzo.BlackBox)]
    calls: list[Any] = []
    hooks = [box.register_forward_hook(lambda *call: calls.append(call[0])) for box in boxes]
    x, y = digits.examples("train")
    digits.autograd(model, cross_entropy, x[:64], y[:64])  # calibrates
    calls.clear()
    with hzo.count_queries() as count:
        digits.autograd(model, cross_entropy, x[:64], y[:64])
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return sum(count.boxes.values()) / (64 * len(calls))


def run(part: Part, method: str, seed: int, point: dict[str, Any], samples: int, tuning: bool, epochs: int) -> float:
    if part.example is not None and "step" in point and method == "hzo":
        part.example.STEP = point["step"]
    split, judged = ("fit", "held out") if tuning else ("train", "test")
    before = {"split": split} if part.pretrained else {}
    model = part.network(method if method in part.references else "hzo", seed, **before)
    how: dict[str, Any] = {}
    if method == "frozen":
        digits.last_layer_only(model)
    if method == "spsa":
        noise = torch.Generator().manual_seed(seed)
        how["gradient"] = partial(hzo.baselines.spsa, samples=samples, mu=point["step"], generator=noise)
    digits.train(model, epochs, point["rate"], seed=seed, optimizer=part.optimizer, split=split, **how)
    return digits.accuracy(model, judged, reads=part.reads)


def tuned(part: Part, method: str, samples: int, quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best rate at the middle step, then the best step at that rate; and all that was tried."""
    steps: tuple[float | None, ...] = {"hzo": part.steps, "spsa": SPSA_STEPS}.get(method, ()) or (None,)
    epochs = 1 if quick else part.epochs // 2
    middle = steps[len(steps) // 2]
    tried: list[dict[str, Any]] = []

    def best() -> dict[str, Any]:
        first = max(tried, key=lambda trial: trial["held out"])
        return {key: value for key, value in first.items() if key != "held out"}

    def trial(rate: float, step: float | None) -> None:
        point = {"rate": rate} | ({} if step is None else {"step": step})
        try:
            found = run(part, method, TUNING_SEED, point, samples, tuning=True, epochs=epochs)
        except NonFiniteError:  # it diverged
            found = 0.0
        tried.append(point | {"held out": found})

    for rate in RATES[1:2] if quick else RATES:
        trial(rate, middle)
    rate = best()["rate"]
    for step in () if quick else steps:
        if step != middle:
            trial(rate, step)
    return best(), tried


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor], names: list[str]) -> Tensor:
    model.zero_grad()
    digits.autograd(model, cross_entropy, *batch)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return torch.cat([torch.zeros(0) if (g := gradients[name]) is None else g.flatten() for name in names])


def gradient_cosines(part: Part, rate: float, seed: int) -> tuple[float, float]:
    """Of the box's gradient, and of one read of the reference, to the reference's, at the same parameters."""
    mine, theirs = (part.network(how, seed) for how in ("hzo", part.references[0]))
    digits.train(mine, 2, rate, seed=seed, optimizer=part.optimizer)
    theirs.load_state_dict(mine.state_dict(), strict=False)  # the reference may know weights that the box hides
    last = list(dict(mine.named_children()))[-1]
    names = [name for name, p in mine.named_parameters() if p.requires_grad and not name.startswith(f"{last}.")]
    x, y = digits.examples("train")
    found = []
    for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(64)[:BATCHES]:
        batch = x[rows], y[rows]
        reads = READS if part.reads > 1 else 1
        reference = sum((gradient(theirs, batch, names) for _ in range(reads)), start=torch.zeros(())) / reads
        found.append([cosine(gradient(model, batch, names), reference) for model in (mine, theirs)])
    own, other = zip(*found, strict=True)
    return statistics.mean(own), statistics.mean(other)


def summary(part: str, method: str, runs: list[float], **more: Any) -> dict[str, Any]:
    row = {"part": part, "method": method, **more, "accuracy": statistics.mean(runs)}
    return row | {"deviation": statistics.stdev(runs), "runs": runs}


def chip_before(name: str, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """The digital network, and what it does on the chip that the others are trained on."""
    found: dict[str, list[float]] = {"digital": [], "as programmed": []}
    for seed in seeds:
        found["digital"].append(digits.accuracy(analog.digital(seed)))
        found["as programmed"].append(digits.accuracy(on_tiles("hzo", seed), reads=10))
    return [summary(name, method, runs) for method, runs in found.items()]


def rows_of(name: str, part: Part, seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = chip_before(name, seeds) if name == "analog" else []
    network = part.network("hzo", 0)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    price = passes(network)
    samples = math.ceil(price / 2)
    for method in ("hzo", *part.references, "spsa", "frozen"):
        started = time.perf_counter()
        point, tried = tuned(part, method, samples, quick)
        epochs = max(1, part.epochs // 10) if quick else part.epochs
        runs = [run(part, method, seed, point, samples, tuning=False, epochs=epochs) for seed in seeds]
        row = summary(name, method, runs, **point, parameters=trained, tried=tried)
        row |= {"passes": {"hzo": price, "spsa": 2.0 * samples}.get(method, 0.0)}
        if method == "hzo":
            found = [gradient_cosines(part, point["rate"], seed) for seed in seeds]
            row |= {"reference": part.references[0], "cosines": [own for own, _ in found]}
            row |= {"cosine": statistics.mean(row["cosines"]), "reference_cosine": statistics.mean(b for _, b in found)}
            aim = min(row["cosine"], HIGHEST)
            row |= {"spsa_aim": aim, "spsa_passes": 2 * (trained - 1) * aim**2 / (1 - aim**2)}
        row["seconds"] = time.perf_counter() - started
        rows.append(row)
        print(row, flush=True)
    return rows


def recovered(rows: list[dict[str, Any]]) -> None:
    """The share of the accuracy lost on the chip that each method wins back, of the means over seeds."""
    mean = {row["method"]: row["accuracy"] for row in rows if row["part"] == "analog"}
    for row in rows:
        if row["part"] == "analog" and row["method"] not in ("digital", "as programmed"):
            lost = mean["digital"] - mean["as programmed"]
            row["recovered"] = (row["accuracy"] - mean["as programmed"]) / lost


def plot(rows: list[dict[str, Any]]) -> Figure:
    parts = list(dict.fromkeys(row["part"] for row in rows))
    figure = Figure((2.4 * len(parts), 3.2), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        mine = [row for row in reversed(rows) if row["part"] == part]  # the first one on top
        found = [row["accuracy"] for row in mine]
        colors = ["#0072b2" if row["method"] == "hzo" else "#b0b0b0" for row in mine]
        bars = axes.barh(
            [row["method"] for row in mine], found, xerr=[row["deviation"] for row in mine], color=colors, capsize=2
        )
        axes.bar_label(bars, [f"{accuracy:.1f}" for accuracy in found], label_type="center", fontsize=8)
        axes.set(title=part, xlim=(0, 100), xlabel="test accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    given = options(__doc__ or "", out=RESULTS.parent / "blackbox", parts=tuple(PARTS))
    started = time.perf_counter()
    seeds = list(range(2) if given.quick else SEEDS)
    chain = [] if given.parts else [analog_chain.reached(target, seed) for target in TARGETS for seed in seeds]
    rows: list[dict[str, Any]] = []
    for name in given.parts or PARTS:
        rows += rows_of(name, PARTS[name], seeds, given.quick)
    recovered(rows)
    columns = ("part", "method", "accuracy", "deviation", "passes", "rate", "step", "cosine", "spsa_passes", "seconds")
    table(rows, columns)
    table(chain, ("target", "seed", "expected", "measured", "forward_equivalents", "tree"))
    write(
        "_".join(["real_parts", *given.parts]),
        given,
        plot(rows),
        seeds=seeds,
        tuning={"seed": TUNING_SEED, "rates": RATES, "spsa_steps": SPSA_STEPS, "epochs": "half of the training"},
        versions={name: version(name) for name in ("snntorch", "aihwkit", "onnx", "onnxruntime", "scikit-learn")},
        spsa_passes="2 (d − 1) c² / (1 − c²), d = parameters, c = spsa_aim: the cosine, or 0.99 where it is higher",
        seconds=time.perf_counter() - started,
        analog_chain=chain,
        rows=rows,
    )


if __name__ == "__main__":
    main()

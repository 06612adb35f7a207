"""Real parts without a usable derivative: what can be learned in front of them, by which gradient, at which price.

    PYTHONPATH=examples python experiments/real_parts.py    # writes results/blackbox/real_parts.json and .png
    PYTHONPATH=examples python experiments/real_parts.py analog    # this part anew, the others as they are
    PYTHONPATH=examples python experiments/real_parts.py --missing    # only rows that the record does not have

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
(d − 1) c² / (1 − c²) samples of two passes for a cosine c with d trained parameters, without noise. SPSA's passes read
the tiles with new noise each, as the box's queries and a chip do; those of "spsa, same noise" with that of the forward
pass, which no chip can do. Both ask the tiles directly: no box is needed for a loss, and it would look for state in
each pass.

``plan`` is what each box asks in a step of 64 samples, before training; ``seconds_a_step``, the shortest of some, is
forward and backward pass of the whole network, of which the optimizer is no part. ``priced``: the commit of both, where
it is another one than the row's.
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
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
from hzo_lab.records import commit

RATES = (3e-3, 1e-2, 3e-2)
SPSA_STEPS = (1e-3, 1e-2, 1e-1)  # in its parameters
TUNING_SEED, SEEDS = 100, range(3)
BATCHES, READS = 4, 30  # for a cosine
SAME = "spsa, same noise"
STEPS = 10  # that are timed
OUT = RESULTS.parent / "blackbox"
Rows = dict[tuple[str, str], dict[str, Any]]  # by part and method
HIGHEST = 0.99  # cosine that SPSA is asked for where the box's is higher: its price grows without bound
TARGETS = (0.9, 0.97)


class OwnBackward(nn.Module):
    """An analog tile with the backward pass that aihwkit gives its simulation: ideal converters, no noise."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.tile = analog.Tile(layer).tile

    def forward(self, x: Tensor) -> Tensor:
        return self.tile(x)


class NewReads(OwnBackward):
    """A tile that is read with other noise each time, whoever puts random numbers back: a chip."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        with torch.random.fork_rng(devices=[]):  # the next tile is programmed as if nothing had been drawn here
            self.read = itertools.count(int(torch.randint(2**62, ())))

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(next(self.read))  # that of the module notes who called it, each time
            return super().forward(x)


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
    return analog.on_chip(model, {"hzo": analog.Tile, "spsa": NewReads}.get(how, OwnBackward))


def optics(how: str, seed: int) -> nn.Module:
    model = subprocess_simulator.network(seed)
    if how != "hzo":
        model[1] = Interferometer()
    return model


@dataclass(frozen=True)
class Part:
    """One of the examples.

    Attributes:
        network: from "hzo", a reference's name or one of ``direct``, and a seed.
        references: other gradients, the first to compare the box's with.
        example, steps: the module whose STEP is to be chosen from these.
        pretrained: the network was trained before, on digits of the split that it is given.
        reads: a noisy network's accuracy is the mean over so many.
        direct: methods that ask the part itself, as they need no box.
    """

    network: Callable[..., nn.Module]
    references: tuple[str, ...]
    epochs: int
    example: ModuleType | None = None
    steps: tuple[float, ...] = ()
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    pretrained: bool = False
    reads: int = 1
    direct: tuple[str, ...] = ()

    def methods(self, name: str) -> tuple[str, ...]:
        """In the order of the record."""
        before = ("digital", "as programmed") if name == "analog" else ()
        spsa = ("spsa", SAME) if SAME in self.direct else ("spsa",)
        return (*before, "hzo", *self.references, *spsa, "frozen")


PARTS = {
    "quantized": Part(quantized.network, ("straight-through",), 30),
    "spiking": Part(spiking.network, ("atan", "fast sigmoid"), 20, spiking, (0.5, 1.0, 2.0)),
    "analog": Part(
        on_tiles, ("aihwkit",), 10, analog, (1.0, 2.0, 4.0), AnalogAdam, True, reads=10, direct=("spsa", SAME)
    ),
    "onnx": Part(onnx_middle.network, ("autograd",), 30, pretrained=True),
    "simulator": Part(optics, ("autograd",), 20),
}


def price(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The plans of the boxes in a model, what a step asks of them and how long it takes. ``passes``: queries of a step
    over what one forward pass asks of the parts."""
    boxes = {name: m for name, m in model.named_modules() if isinstance(m, hzo.BlackBox)}
    calls: dict[str, list[Any]] = {name: [] for name in boxes}
    hooks = [
        box.register_forward_pre_hook(lambda _, inputs, name=name: calls[name].append(inputs))
        for name, box in boxes.items()
    ]
    digits.autograd(model, cross_entropy, *batch)  # calibrates
    for inputs in calls.values():
        inputs.clear()
    with hzo.count_queries() as count:
        digits.autograd(model, cross_entropy, *batch)
    for hook in hooks:
        hook.remove()
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        digits.autograd(model, cross_entropy, *batch)
        times.append(time.perf_counter() - began)
    model.zero_grad()
    queries, forward = sum(count.boxes.values()), sum(len(inputs) for inputs in calls.values())
    plans = [
        f"{name}, × {len(calls[name])}: {box.plan_for(*(x.detach() for x in calls[name][-1]))}"
        for name, box in boxes.items()
        if any(x.requires_grad for x in calls[name][-1])  # of the network's input nobody asks for a gradient
    ]
    return {"plan": "\n".join(plans), "passes": queries / (64 * forward), "queries": queries} | {
        "seconds_a_step": min(times)
    }


def run(part: Part, method: str, seed: int, point: dict[str, Any], samples: int, tuning: bool, epochs: int) -> float:
    if part.example is not None and "step" in point and method == "hzo":
        part.example.STEP = point["step"]
    split, judged = ("fit", "held out") if tuning else ("train", "test")
    before = {"split": split} if part.pretrained else {}
    model = part.network(method if method in (*part.references, *part.direct) else "hzo", seed, **before)
    how: dict[str, Any] = {}
    if method == "frozen":
        digits.last_layer_only(model)
    if method in ("spsa", SAME):
        noise = torch.Generator().manual_seed(seed)
        how["gradient"] = partial(hzo.baselines.spsa, samples=samples, mu=point["step"], generator=noise)
    digits.train(model, epochs, point["rate"], seed=seed, optimizer=part.optimizer, split=split, **how)
    return digits.accuracy(model, judged, reads=part.reads)


def tuned(part: Part, method: str, samples: int, quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best rate at the middle step, then the best step at that rate; and all that was tried."""
    chosen = {"hzo": part.steps, "spsa": SPSA_STEPS, SAME: SPSA_STEPS}.get(method, ())
    steps: tuple[float | None, ...] = chosen or (None,)
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


def before_training(name: str, method: str, seeds: Iterable[int]) -> dict[str, Any]:
    """The digital network, or what it does on the chip that the others are trained on."""
    digital = method == "digital"
    accuracies = [
        digits.accuracy(analog.digital(s)) if digital else digits.accuracy(on_tiles("aihwkit", s), reads=10)
        for s in seeds
    ]
    return summary(name, method, accuracies)


def rows_of(name: str, part: Part, seeds: list[int], quick: bool, kept: Rows) -> Iterator[dict[str, Any]]:
    x, y = digits.examples("train")
    network = part.network("hzo", 0)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    cost = price(network, (x[:64], y[:64]))
    samples = math.ceil(cost["passes"] / 2)
    for method in part.methods(name):
        if (row := kept.get((name, method))) is not None:
            if method == "hzo" and "plan" not in row:
                yield {**row, **cost, "priced": commit()}
            continue
        if method in ("digital", "as programmed"):
            yield before_training(name, method, seeds)
            continue
        started = time.perf_counter()
        point, tried = tuned(part, method, samples, quick)
        epochs = max(1, part.epochs // 10) if quick else part.epochs
        runs = [run(part, method, seed, point, samples, tuning=False, epochs=epochs) for seed in seeds]
        row = summary(name, method, runs, **point, parameters=trained, tried=tried)
        row |= {"passes": 2.0 * samples if method in ("spsa", SAME) else 0.0}
        if method == "hzo":
            found = [gradient_cosines(part, point["rate"], seed) for seed in seeds]
            row |= cost | {"reference": part.references[0], "cosines": [own for own, _ in found]}
            row |= {"cosine": statistics.mean(row["cosines"]), "reference_cosine": statistics.mean(b for _, b in found)}
            aim = min(row["cosine"], HIGHEST)
            row |= {"spsa_aim": aim, "spsa_passes": 2 * (trained - 1) * aim**2 / (1 - aim**2)}
        row["seconds"] = time.perf_counter() - started
        yield row


def recovered(rows: list[dict[str, Any]]) -> None:
    """The share of the accuracy lost on the chip that each method wins back, of the means over seeds."""
    mean = {row["method"]: row["accuracy"] for row in rows if row["part"] == "analog"}
    if not {"digital", "as programmed"} <= mean.keys():
        return
    lost = mean["digital"] - mean["as programmed"]
    for row in rows:
        if row["part"] == "analog" and row["method"] not in ("digital", "as programmed"):
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


def recorded(given: Any) -> dict[str, Any]:
    path = given.out / "real_parts.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": [], "analog_chain": []}
    return found


def keep(given: Any, rows: Iterable[dict[str, Any]], chain: list[dict[str, Any]]) -> None:
    """Put rows in place of those that were there, as soon as they are known."""
    order = [(name, method) for name, part in PARTS.items() for method in part.methods(name)]
    known: Rows = {(row["part"], row["method"]): row for row in (*recorded(given)["rows"], *rows)}
    content = sorted(known.values(), key=lambda row: order.index((row["part"], row["method"])))
    recovered(content)
    write(
        "real_parts",
        given,
        plot(content),
        seeds=list(SEEDS),
        tuning={"seed": TUNING_SEED, "rates": RATES, "spsa_steps": SPSA_STEPS, "epochs": "half of the training"},
        versions={name: version(name) for name in ("snntorch", "aihwkit", "onnx", "onnxruntime", "scikit-learn")},
        spsa_passes="2 (d − 1) c² / (1 − c²), d = parameters, c = spsa_aim: the cosine, or 0.99 where it is higher",
        analog_chain=chain,
        rows=content,
    )


def main() -> None:
    given = options(__doc__ or "", out=OUT, parts=tuple(PARTS), missing=True)
    seeds = list(range(2) if given.quick else SEEDS)
    before = recorded(given)
    rows: Rows = {(row["part"], row["method"]): row for row in before["rows"]} if given.missing else {}
    chain = before["analog_chain"]
    if not given.parts and not (given.missing and chain):
        chain = [analog_chain.reached(target, seed) for target in TARGETS for seed in seeds]
    for name in given.parts or PARTS:
        for row in rows_of(name, PARTS[name], seeds, given.quick, dict(rows)):
            row.setdefault("commit", commit())
            print(row, flush=True)
            rows[name, row["method"]] = row
            if not given.quick:
                keep(given, [row], chain)
    columns = ("part", "method", "accuracy", "deviation", "passes", "seconds_a_step", "rate", "step", "cosine")
    table(list(rows.values()), (*columns, "spsa_passes", "seconds"))
    table(chain, ("target", "seed", "expected", "measured", "forward_equivalents", "tree"))


if __name__ == "__main__":
    main()

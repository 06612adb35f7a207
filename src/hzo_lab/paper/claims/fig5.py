"""Activations × precisions: cosine of one gradient, and the accuracy that training in that precision reaches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import hzo
from hzo import presets
from hzo.errors import HzoError, HzoWarning
from hzo_lab.data import Dataset
from hzo_lab.paper.finding import Finding, Row, Setting, in_words, mean_spread, select, verdict
from hzo_lab.paper.images import ImageSet, first_batch, images
from hzo_lab.paper.measure import GradientsByName, by_backprop, cosine, flattened
from hzo_lab.paper.plotting import new_figure
from hzo_lab.paper.trained import trained
from hzo_lab.training import models, recipe

CLAIM = "HZO works for different activation functions and numerical precisions (Fig. 5)."
ACTIVATIONS = ("relu", "tanh", "sigmoid", "gelu", "leaky-relu", "silu")
DTYPES = ("float64", "float32", "bfloat16", "float16")
ENOUGH = {"float64": 0.99, "float32": 0.99, "bfloat16": 0.9, "float16": 0.9}
POINTS = 1.0  # of accuracy behind backprop in the same precision


def fig5(setting: Setting) -> Finding:
    activations = ("relu", "tanh") if setting.smoke else ACTIVATIONS
    size = {"depth": 4, "width": 16} if setting.smoke else {"depth": 16, "width": 32}
    trainings = {"depth": 2, "width": 16, "epochs": 1} if setting.smoke else {"depth": 8, "width": 32, "epochs": 10}
    seeds, source = setting.seeds(5), images(setting, flat=True)
    rows: list[Row] = []
    with warnings.catch_warnings():  # how far differences in half precision can be trusted is what is measured here
        warnings.filterwarnings("ignore", "this plan takes differences of results in", HzoWarning)
        for activation, dtype in product(activations, DTYPES):
            for seed in seeds:
                rows += of_gradient(setting, source, activation, dtype, seed, **size)
            setting.tell(f"fig5: cosine, {activation}, {dtype}")
        rows += of_training(setting, activations, DTYPES[1:3] if setting.smoke else DTYPES, seeds[:2], trainings)
    parts = judge(rows)
    return Finding(
        claim=CLAIM,
        found=sentence(rows) + in_words(parts),
        verdict=verdict(parts),
        rows=rows,
        plot=plot(rows, activations),
        seeds=seeds,
        configuration={
            "data": source.name, "cosine": {"model": "residual MLP", "batch": 16, **size, **presets.paper},
            "training": {"model": "residual MLP", **trainings, **presets.paper}, "training_seeds": list(seeds[:2]),
        },
        summary=summary(rows),
        notes=(
            "The cosine is of all parameters' gradients, against backprop in float64 through the same (rounded) "
            "weights and inputs. calibrated: the steps that the plan chooses from a calibration; else those that "
            "follow from dtype and scale. backprop: its own gradient in that precision.",
            "Weights, activations, gradients and updates of a training are all of the dtype named; no loss scaling, no "
            "master weights. Accuracies are on 360 digits: one digit is 0.28 points.",
        ),
    )  # fmt: skip


def of_gradient(
    setting: Setting, source: ImageSet, activation: str, dtype: str, seed: int, *, depth: int, width: int
) -> Iterator[Row]:
    kind = getattr(torch, dtype)
    x, y = first_batch(source, 16, seed, setting.device, kind)
    model = models.build("mlp", source.shape, 10, depth=depth, width=width, activation=activation, seed=seed)
    model = model.to(setting.device, kind)
    exact = flattened(by_backprop(copy.deepcopy(model).double(), F.cross_entropy, x.double(), y))
    about = {"what": "cosine", "activation": activation, "dtype": dtype, "seed": seed}
    yield {**about, "method": "backprop", **compared(by_backprop(model, F.cross_entropy, x, y), exact)}
    chain = hzo.trace(model, x)
    known = hzo.calibrate(chain, x, F.cross_entropy, y, assume="locality", seconds=False)
    plans: dict[str, dict[str, Any]] = {
        "bisect": {**presets.paper},
        "bisect, calibrated": {**presets.paper, "calibration": known},
        "stagewise": {**presets.paper, "tree": "stagewise"},
    }
    for method, options in plans.items():
        found, _ = hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=hzo.plan(chain, **options))
        yield {**about, "method": method, **compared(found, exact)}


def compared(found: GradientsByName, exact: Tensor) -> Row:
    """Also what is missing to 1, which a file of eight digits would not tell."""
    cos = cosine(flattened(found), exact)
    return {"cosine": cos, "one_minus_cosine": 1 - cos}


def of_training(
    setting: Setting,
    activations: tuple[str, ...],
    dtypes: tuple[str, ...],
    seeds: tuple[int, ...],
    size: dict[str, int],
) -> list[Row]:
    """Test accuracy after training on digits, by HZO and by backprop; a training that fails says how."""
    rows, datasets = [], dict[str, Dataset]()
    for activation, dtype, method, seed in product(activations, dtypes, ("hzo", "backprop"), seeds):
        config = recipe(
            activation=activation,
            dtype=dtype,
            method=method,
            seed=seed,
            device=str(setting.device),
            cosine_every=0,
            **size,
        )
        about = {"what": "training", "activation": activation, "dtype": dtype, "seed": seed, "method": method}
        try:
            run = trained(config, setting, datasets)
        except HzoError as error:
            rows.append({**about, "accuracy": 0.0, "failed": str(error)})
            continue
        if run is not None:
            rows.append({**about, "accuracy": run.accuracy, "seconds": run.summary["seconds"]})
    return rows


def middle(rows: list[Row], key: str, **where: Any) -> float:
    return mean_spread([row[key] for row in select(rows, **where)])[0]


def judge(rows: list[Row]) -> dict[str, bool]:
    """By dtype: every activation's mean cosine; every activation's accuracy beside backprop's in the same dtype."""
    parts = {}
    for dtype in DTYPES:
        mine = select(rows, what="cosine", method="bisect", dtype=dtype)
        means = [middle(mine, "cosine", activation=a) for a in dict.fromkeys(row["activation"] for row in mine)]
        parts[f"{dtype}: cosine ≥ {ENOUGH[dtype]:g}"] = min(means) >= ENOUGH[dtype]
        behind = behind_backprop(rows, dtype)
        if behind:
            parts[f"{dtype}: within {POINTS:g} point of backprop"] = max(behind.values()) <= POINTS
    return parts


def behind_backprop(rows: list[Row], dtype: str) -> dict[str, float]:
    """Points of accuracy, by activation; mean over seeds."""
    mine = select(rows, what="training", dtype=dtype)
    return {
        activation: middle(mine, "accuracy", method="backprop", activation=activation)
        - middle(mine, "accuracy", method="hzo", activation=activation)
        for activation in dict.fromkeys(row["activation"] for row in mine)
    }


def summary(rows: list[Row]) -> dict[str, Any]:
    kinds = dict.fromkeys((row["what"], row["method"], row["dtype"], row["activation"]) for row in rows)
    found: dict[str, Any] = {}
    for what, method, dtype, activation in kinds:
        mine = select(rows, what=what, method=method, dtype=dtype, activation=activation)
        mean, sd = mean_spread([row["cosine" if what == "cosine" else "accuracy"] for row in mine])
        found.setdefault(what, {}).setdefault(method, {}).setdefault(dtype, {})[activation] = {"mean": mean, "sd": sd}
    return found


def sentence(rows: list[Row]) -> str:
    parts = []
    for dtype in DTYPES:
        mine = select(rows, what="cosine", dtype=dtype)
        lowest = {m: min(r["cosine"] for r in select(mine, method=m)) for m in dict.fromkeys(r["method"] for r in mine)}
        words = ", ".join(f"{method} {value:.4f}" for method, value in lowest.items())
        behind = behind_backprop(rows, dtype)
        trained_words = f"; at most {max(behind.values()):.2f} points behind backprop" if behind else ""
        parts.append(f"{dtype}: lowest cosine {words}{trained_words}")
    return ". ".join(parts) + "."


def plot(rows: list[Row], activations: tuple[str, ...]) -> Figure:
    figure = new_figure(12, 4.6)
    left, right = figure.subplots(1, 2)
    looks = {"backprop": ("#222222", "x"), "bisect": ("#0072B2", "o"), "bisect, calibrated": ("#56B4E9", "s"),
             "stagewise": ("#009E73", "^")}  # fmt: skip
    places = [f"{a}\n{d}" for d, a in product(DTYPES, activations)]
    for k, (method, (color, marker)) in enumerate(looks.items()):
        at, values = [], []
        for n, (dtype, activation) in enumerate(product(DTYPES, activations)):
            mine = select(rows, what="cosine", method=method, dtype=dtype, activation=activation)
            at.append(n + 0.15 * (k - 1.5))
            values.append(max(1e-16, middle(mine, "one_minus_cosine")))
        left.semilogy(at, values, marker, color=color, ms=4, label=method)
    left.invert_yaxis()
    left.set(ylabel="1 − cosine (up: better)", title="one gradient\n")
    for k, (method, color) in enumerate((("hzo", "#0072B2"), ("backprop", "#222222"))):
        for n, (dtype, activation) in enumerate(product(DTYPES, activations)):
            mine = select(rows, what="training", method=method, dtype=dtype, activation=activation)
            if mine:
                mean, sd = mean_spread([row["accuracy"] for row in mine])
                label = method if n == len(places) - 1 or (dtype, activation) == (DTYPES[1], activations[0]) else None
                right.errorbar(n + 0.2 * (k - 0.5), mean, sd, color=color, marker="ox"[k], ms=5, capsize=2, label=label)
    right.set(ylabel="test accuracy, %", title="trained on digits\n")
    for axes in (left, right):
        axes.set_xticks(range(len(places)), [name.split("\n")[0] for name in places], rotation=90, fontsize=8)
        for n, dtype in enumerate(DTYPES):
            axes.text(
                (n + 0.5) / len(DTYPES), 1.0, dtype, transform=axes.transAxes, ha="center", va="bottom", fontsize=8
            )
            axes.axvline(n * len(activations) - 0.5, color="#cccccc", lw=0.8)
    left.legend(fontsize=8, loc="lower left")
    labelled = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    low, high = right.get_ylim()
    right.set_ylim(low - 0.12 * (high - low), high)  # room for the legend below all bars
    right.legend(labelled.values(), labelled.keys(), loc="lower left", ncols=2)
    return figure

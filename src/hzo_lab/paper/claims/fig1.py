"""Cosine with backprop against the depth: residual and plain CNNs, all trees, and standard zeroth-order estimates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import hzo
from hzo import baselines, presets
from hzo_lab.paper.finding import Finding, Row, Setting, in_words, mean_spread, select, verdict
from hzo_lab.paper.images import ImageSet, first_batch, images
from hzo_lab.paper.measure import GradientsByName, by_backprop, by_method, cosine, flattened
from hzo_lab.paper.plotting import MARKERS, STANDARD_COLORS, TREE_COLORS, new_figure
from hzo_lab.training import models

CLAIM = (
    "Cosine similarity to backprop against depth: HZO with a ResNet ≈ 1.0 even at L = 64; plain CNNs stay low; "
    "standard ZO compared (Fig. 1)."
)
COMPARED = ("bisect", "flat", "stagewise", "planned")
STANDARD = ("coordinate", "spsa", "node-perturbation")
ENOUGH, LOW = 0.99, 0.9
LAST = 64  # the depth that the claim is about


@dataclass(frozen=True)
class Network:
    """A kind of CNN: which model, how initialised, in what precision."""

    model: str
    initialisation: str
    dtype: str = "float32"

    @property
    def name(self) -> str:
        if self.model == "cnn":
            return "residual"
        precise = ", float64" if self.dtype == "float64" else ""
        return f"plain, {self.initialisation}{precise}"


RESIDUAL = Network("cnn", "uniform")
PLAIN = Network("plain-cnn", "uniform")
# What makes plain networks low: the initialisation that lets signals fade, and what float32 can tell apart.
NETWORKS = (RESIDUAL, PLAIN, Network("plain-cnn", "He"), Network("plain-cnn", "uniform", "float64"))


@dataclass(frozen=True)
class Size:
    depths: tuple[int, ...]
    width: int
    batch: int


def fig1(setting: Setting) -> Finding:
    size = Size((4, 8), 4, 2) if setting.smoke else Size((16, 32, 64, 128), 4, 4)
    seeds = setting.seeds(5)
    source = images(setting)
    rows: list[Row] = []
    for seed in seeds:
        for network in NETWORKS:
            for depth in size.depths:
                rows += of_network(setting, source, size, network, depth, seed)
            setting.tell(f"fig1: seed {seed}, {network.name}")
    claimed = max(depth for depth in size.depths if depth <= LAST)
    parts = judge(rows, claimed)
    return Finding(
        claim=CLAIM,
        found=sentence(rows, claimed) + in_words(parts),
        verdict=verdict(parts),
        rows=rows,
        plot=plot(rows),
        seeds=seeds,
        configuration={
            "data": source.name, "L": list(size.depths), "width": size.width, "batch": size.batch, "activation": "relu",
            "map": "8 × 8", "plans": {**presets.paper, "tree": list(COMPARED)},
            "networks": [network.name for network in NETWORKS],
        },
        summary=summary(rows, claimed),
        notes=(
            "Networks without normalization: patches to an 8 × 8 map, L blocks of one 3 × 3 convolution and a ReLU, "
            "with skips (x + s·f(x), s = min(1/2, 8/L)) or without, average pooling, a linear head. uniform: PyTorch's "
            "own initialisation; He: normal, gain √2, no bias. The paper's architectures are not known to us.",
            "Two cosines: of the gradient of all parameters, which the largest gradients decide, and the mean over "
            "the weights of all layers that have any gradient, which sees vanishing ones. The reference is "
            "backprop in float64.",
            "Standard ZO: SPSA (random directions in the weights) and node perturbation at the forward equivalents of "
            "bisect; coordinate-wise differences of the parameters, compared on the first, middle and last "
            "convolution only: its cost is 2 forward passes for each of all parameters.",
            f"Flat trees and standard ZO up to L = {LAST} only: beyond, they take longer than all else together. "
            "Standard ZO on the networks residual and plain, uniform, only.",
            *source.notes,
        ),
    )  # fmt: skip


def build(network: Network, source: ImageSet, size: Size, depth: int, seed: int) -> nn.Module:
    model = models.build(network.model, source.shape, 10, depth=depth, width=size.width, activation="relu", seed=seed)
    if network.initialisation == "He":
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    return model


def of_network(
    setting: Setting, source: ImageSet, size: Size, network: Network, depth: int, seed: int
) -> Iterator[Row]:
    """All estimates of one gradient of one network."""
    dtype = getattr(torch, network.dtype)
    x, y = first_batch(source, size.batch, seed, setting.device, dtype)
    model = build(network, source, size, depth, seed).to(setting.device, dtype)
    exact = by_backprop(copy.deepcopy(model).double(), F.cross_entropy, x.double(), y)
    chain = hzo.trace(model, x)

    def row(method: str, cost: float, found: GradientsByName) -> Row:
        # A layer behind units that are all dead has no gradient, and no direction to compare.
        weights = [name for name in found if name.endswith("weight") and bool(exact[name].any())]
        layers = [cosine(found[name], exact[name]) for name in weights]
        return {
            "seed": seed, "network": network.name, "L": depth, "method": method, "forward_equivalents": cost,
            "cosine": cosine(flattened(found), flattened({name: exact[name] for name in found})),
            "layer_mean": mean_spread(layers)[0], "layer_lowest": min(layers),
            "gradient_first_over_last": float(exact["0.weight"].norm() / list(exact.values())[-2].norm()),
        }  # fmt: skip

    budget = 0.0
    for tree in COMPARED:
        if tree == "flat" and depth > LAST:
            continue
        plan = hzo.plan(chain, **{**presets.paper, "tree": tree})
        budget = plan.forward_equivalents if tree == "bisect" else budget
        found, _ = hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=plan)
        yield row(tree, plan.forward_equivalents, {name: g.double() for name, g in found.items()})
    if network in (RESIDUAL, PLAIN) and depth <= LAST:
        for method, cost, found in standard(model, x, y, round(budget / 2), seed):
            yield row(method, cost, found)


def standard(
    model: nn.Module, x: Tensor, y: Tensor, directions: int, seed: int
) -> Iterator[tuple[str, float, GradientsByName]]:
    """Standard zeroth-order estimates: name, forward equivalents, gradients."""

    def by(estimate: Callable[..., Any], **options: Any) -> GradientsByName:
        return by_method(model, lambda: estimate(model, F.cross_entropy, x, y, **options))

    for method, estimate in (("spsa", baselines.spsa), ("node-perturbation", baselines.node_perturbation)):
        generator = torch.Generator().manual_seed(seed)
        yield method, 2.0 * directions, by(estimate, samples=directions, generator=generator)
    count = sum(p.numel() for p in model.parameters())
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)][1:]
    kept = {p for k in (0, len(convolutions) // 2, -1) for p in convolutions[k].parameters()}
    frozen = [p for p in model.parameters() if p not in kept]
    try:
        for p in frozen:
            p.requires_grad_(False)
        yield "coordinate", 2.0 * count, by(baselines.coordinate_wise)
    finally:
        for p in frozen:
            p.requires_grad_(True)


def of(rows: list[Row], network: Network, method: str, depth: int, what: str) -> list[float]:
    return [row[what] for row in select(rows, network=network.name, method=method, L=depth)]


def judge(rows: list[Row], depth: int) -> dict[str, bool]:
    plain = [network for network in NETWORKS if network.model != "cnn" and network.dtype == "float32"]
    lowest = min(of(rows, RESIDUAL, "bisect", depth, "cosine") + of(rows, RESIDUAL, "bisect", depth, "layer_mean"))
    random = [c for method in ("spsa", "node-perturbation") for c in of(rows, RESIDUAL, method, depth, "cosine")]
    return {
        f"HZO on residual networks ≥ {ENOUGH} at L = {depth}": lowest >= ENOUGH,
        "plain networks low, mean over layers": mean_spread(of(rows, PLAIN, "bisect", depth, "layer_mean"))[0] < LOW,
        "plain networks low whatever the initialisation": all(
            mean_spread(of(rows, network, "bisect", depth, "layer_mean"))[0] < LOW for network in plain
        ),
        "random directions far below at equal cost": max(random) < LOW,
    }


def summary(rows: list[Row], depth: int) -> dict[str, Any]:
    """Mean and standard deviation over seeds, at the depth of the claim."""
    found: dict[str, Any] = {}
    for row in select(rows, L=depth):
        mine = select(rows, L=depth, network=row["network"], method=row["method"])
        found.setdefault(row["network"], {})[row["method"]] = {
            what: dict(zip(("mean", "sd"), mean_spread([r[what] for r in mine]), strict=True))
            for what in ("cosine", "layer_mean")
        } | {"forward_equivalents": mine[0]["forward_equivalents"]}
    return {"L": depth, "networks": found}


def sentence(rows: list[Row], depth: int) -> str:
    def middle(network: Network, method: str, what: str = "layer_mean") -> float:
        return mean_spread(of(rows, network, method, depth, what))[0]

    plain = ", ".join(
        f"{network.name.removeprefix('plain, ')} {middle(network, 'bisect'):.2f} (stagewise "
        f"{middle(network, 'stagewise'):.2f})"
        for network in NETWORKS[1:]
    )
    return (
        f"At L = {depth}, bisect: residual {middle(RESIDUAL, 'bisect', 'cosine'):.6f} (lowest seed "
        f"{min(of(rows, RESIDUAL, 'bisect', depth, 'cosine')):.6f}); plain, mean over layers: {plain}, while the "
        f"cosine of all parameters together is {middle(PLAIN, 'bisect', 'cosine'):.4f}. At equal cost on the residual "
        f"network SPSA {middle(RESIDUAL, 'spsa', 'cosine'):.3f}, node perturbation "
        f"{middle(RESIDUAL, 'node-perturbation', 'cosine'):.3f}."
    )


def plot(rows: list[Row]) -> Figure:
    figure = new_figure(15, 4.6)
    panels = figure.subplots(1, 4, sharey=True)
    trees = [(method, TREE_COLORS[method], MARKERS[method], "-") for method in COMPARED]
    lines = trees + [(method, STANDARD_COLORS[method], ".", "--") for method in STANDARD]
    shown = (
        (RESIDUAL, "cosine", "residual: all parameters"),
        (PLAIN, "cosine", "plain: all parameters"),
        (PLAIN, "layer_mean", "plain: mean over layers"),
    )
    for axes, (network, what, title) in zip(panels[:3], shown, strict=True):
        for k, (method, color, marker, style) in enumerate(lines):
            mine = select(rows, network=network.name, method=method)
            draw(axes, mine, what, method, (color, marker, style), k - len(lines) / 2)
        axes.set_title(title)
    for k, (network, style) in enumerate(zip(NETWORKS[1:], ("-", ":", "-."), strict=True)):
        look = (TREE_COLORS["bisect"], MARKERS["bisect"], style)
        mine = select(rows, network=network.name, method="bisect")
        draw(panels[3], mine, "layer_mean", network.name.removeprefix("plain, "), look, k - 1)
    panels[3].set_title("plain, bisect: by initialisation")
    panels[3].legend(loc="lower left")
    depths = sorted({row["L"] for row in rows})
    for axes in panels:
        axes.set(xlabel="depth L", ylim=(-0.05, 1.05))
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
    panels[0].set_ylabel("cosine with backprop")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines))
    return figure


def draw(axes: Axes, rows: list[Row], what: str, label: str, look: tuple[str, str, str], shift: float) -> None:
    """Mean and standard deviation over seeds, no higher than a cosine gets; lines that coincide stand side by side."""
    color, marker, style = look
    depths = sorted({row["L"] for row in rows})
    found = [mean_spread([row[what] for row in select(rows, L=depth)]) for depth in depths]
    means = [mean for mean, _ in found]
    bars = [[sd for _, sd in found], [min(sd, 1 - mean) for mean, sd in found]]
    at = [depth * 1.03**shift for depth in depths]
    axes.errorbar(
        at, means, bars, color=color, marker=marker, ls=style, ms=5, mfc="none", elinewidth=0.8, capsize=2, lw=1.3,
        label=label,
    )  # fmt: skip

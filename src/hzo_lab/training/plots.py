"""Plots of a run, and of several beside each other."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from hzo._files import replace_file
from hzo_lab.records import disk_errors

Record = Mapping[str, Any]
Series = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]

# One color a method in every plot; after Okabe and Ito, told apart by colorblind readers too.
COLORS = {
    "hzo": "#0072B2",
    "backprop": "#222222",
    "coordinate": "#009E73",
    "spsa": "#E69F00",
    "mezo": "#D55E00",
    "forward-gradient": "#CC79A7",
    "node-perturbation": "#56B4E9",
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def series(records: Sequence[Record], name: str, against: str = "step") -> Series:
    """The values of one field where it was measured."""
    pairs = [(r[against], r[name]) for r in records if r.get(name) is not None and r.get(against) is not None]
    x, y = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(x, dtype=float), np.asarray(y, dtype=float)


def moving_average(values: np.ndarray[Any, Any], window: int) -> np.ndarray[Any, Any]:
    """Running mean over ``window`` neighbours; narrower towards the ends, where there are fewer."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    at = np.arange(len(values))
    half = np.minimum(np.minimum(at, len(values) - 1 - at), window // 2)
    mean: np.ndarray[Any, Any] = (total[at + half + 1] - total[at - half]) / (2 * half + 1)
    return mean


def run_curves(records: Sequence[Record], path: Path, *, title: str, method: str) -> None:
    """Loss, accuracy and cosine of one run over its steps."""
    with mpl.rc_context(STYLE):
        measured = len(series(records, "cosine")[0]) > 0
        figure = Figure(figsize=(7.2, 7.2 if measured else 5.6), layout="constrained")
        loss, accuracy, *rest = figure.subplots(2 + measured, 1, sharex=True, height_ratios=(2, 2, 1.3)[: 2 + measured])
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        color = COLORS.get(method, "#0072B2")

        _noisy(loss, series(records, "loss"), color, "training batch")
        x, y = series(records, "test_loss")
        loss.plot(x, y, color="#D55E00", marker="o", markersize=4, label="test")
        loss.set(title="loss", ylim=(0, None))
        loss.legend()

        _noisy(accuracy, series(records, "train_accuracy"), color, "training batch")
        x, y = series(records, "test_accuracy")
        accuracy.plot(x, y, color="#D55E00", marker="o", markersize=4, label="test")
        accuracy.set_title("accuracy")
        accuracy_axis(accuracy)
        if len(y):
            _note_last(accuracy, x[-1], y[-1], f"{100 * y[-1]:.1f} %")
        accuracy.legend(loc="lower right")

        for cosine in rest:
            cosine_panel(cosine, [(series(records, "cosine"), color, method)])
        (accuracy, *rest)[-1].set_xlabel("step")
        save(figure, path)


def comparison(runs: Mapping[str, Sequence[Sequence[Record]]], path: Path, *, title: str) -> None:
    """Several methods beside each other: one line a method, the mean over its seeds, their range shaded."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 7), layout="constrained")
        ((by_step, by_cost), (loss, cosine)) = figure.subplots(2, 2)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        for method, seeds in runs.items():
            color = COLORS.get(method, "#777777")
            spread_band(by_step, [series(r, "test_accuracy") for r in seeds], color, method)
            spread_band(by_cost, [series(r, "test_accuracy", "cost") for r in seeds], color, method)
            spread_band(loss, [running(series(r, "loss")) for r in seeds], color, method)
        by_step.set(title="test accuracy", xlabel="step")
        by_cost.set(title="test accuracy by cost", xlabel="cost, in forward passes", xscale="log")
        accuracy_axis(by_step)
        accuracy_axis(by_cost)
        loss.set(title="training loss", xlabel="step", ylim=(0, None))
        lines = [(series(r, "cosine"), COLORS.get(m, "#777777"), m) for m, seeds in runs.items() for r in seeds]
        cosine_panel(cosine, lines)
        cosine.set_xlabel("step")
        handles, labels = by_step.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))
        save(figure, path)


def _noisy(axes: Axes, values: Series, color: str, label: str) -> None:
    x, y = values
    axes.plot(x, y, color=color, alpha=0.22, linewidth=0.8)
    axes.plot(*running(values), color=color, label=label)


def running(values: Series) -> Series:
    x, y = values
    return x, moving_average(y, max(3, len(y) // 30))


def spread_band(axes: Axes, lines: Sequence[Series], color: str, label: str) -> None:
    length = min(len(x) for x, _ in lines)
    if length == 0:
        return
    x = lines[0][0][:length]
    y = np.stack([values[:length] for _, values in lines])
    marker = "o" if length <= 20 else None
    # Backprop is what the others are held against: dashed and on top, so that what equals it shows through.
    exact = label == "backprop"
    axes.plot(
        x,
        y.mean(axis=0),
        color=color,
        label=label,
        marker=None if exact else marker,
        markersize=3.5,
        linestyle=(0, (4, 3)) if exact else "-",
        linewidth=1.4 if exact else 2.2,
        zorder=3 if exact else 2,
    )
    if len(lines) > 1:
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, linewidth=0)


def accuracy_axis(axes: Axes) -> None:
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _note_last(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), textcoords="offset points", xytext=(0, -14), ha="right", va="top", color="#D55E00")


def cosine_panel(axes: Axes, lines: Sequence[tuple[Series, str, str]]) -> None:
    axes.set_title("cosine with backprop")
    drawn = [(x, y, color) for (x, y), color, _ in lines if len(y)]
    if not drawn:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#888888")
        axes.set_yticks([])
        return
    lowest = min(float(y.min()) for _, y, _ in drawn)
    for x, y, color in drawn:
        axes.plot(x, y, color=color, marker="o", markersize=3)
    # From the next round number below (0.99, 0.9, 0) to just over one: a cosine near one must look like it.
    floor = next((limit for limit in (0.99, 0.9, 0.0) if lowest > limit), min(-0.05, lowest * 1.1))
    axes.set_ylim(floor, 1 + 0.06 * (1 - floor))
    axes.set_yticks([max(floor, 0.0), (max(floor, 0.0) + 1) / 2, 1.0])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set_title(f"lowest {lowest:.6f}" if lowest > 0.9 else f"lowest {lowest:.3f}", loc="right", fontsize=9)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as what its path ends with, svg or else png: equal figures as equal bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    if path.suffix == ".svg":
        with mpl.rc_context({"svg.hashsalt": "hzo"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
    else:
        figure.savefig(buffer, format="png", metadata={"Software": None})
    with disk_errors(f"writing the plot {path}", "try again"):
        replace_file(path, buffer.getvalue())

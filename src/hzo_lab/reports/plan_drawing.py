"""A plan as a picture: boundaries in a row, an arc for every edge of its tree, its repeats as its color."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

import hzo
from hzo.errors import InputError
from hzo.plans import PlannedEdge
from hzo_lab.training import STYLE, save

SUFFIXES = (".svg", ".png")
COLORS = mpl.colors.LinearSegmentedColormap.from_list("repeats", ["#56B4E9", "#0072B2", "#7B3294", "#D55E00"])
# Half-ellipses over segments of a nested tree do not cross if they rise with more than the root of their length.
RISE = 0.62
_CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}


def check_picture(path: Path) -> Path:
    """A path that a picture can be written to, known before anything is computed."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"expected --draw to name an .svg or .png file, got {path}.")
    if not path.parent.is_dir():
        raise InputError(f"expected --draw to name a file in a directory that exists, got {path}: make it first.")
    return path


def draw(chain: hzo.Chain, plan: hzo.Plan, path: Path) -> None:
    """Draw the tree, and below it, where something is expected, the cosine at every position that is estimated."""
    places = _places(chain)
    last = places[-1]
    expected = plan.expected is not None and bool(plan.expected.errors)
    with mpl.rc_context(STYLE):
        width = float(np.clip(4.5 + 0.16 * last, 7.2, 14.0))
        figure = Figure(figsize=(width, 5.4 if expected else 4.0), layout="constrained")
        ratios = (2.6, 1)[: 1 + expected]
        tree, *rest = figure.subplots(1 + expected, 1, sharex=True, squeeze=False, height_ratios=ratios).flat
        figure.suptitle(_title(plan), x=0.01, ha="left", fontsize=12, fontweight="bold")
        _draw_tree(figure, tree, plan, places)
        for axes in rest:
            _draw_cosines(axes, plan, places)
        (tree, *rest)[-1].set_xlabel("boundary (0: input)")
        tree.set_xlim(-0.02 * last - 0.3, 1.02 * last + 0.3)
        tree.xaxis.set_major_locator(MaxNLocator(min(17, int(last) + 1), integer=True))
        save(figure, path)


def _places(chain: hzo.Chain) -> list[float]:
    """Where every position lies on an axis on which stage boundaries have their numbers."""
    found: list[float] = []
    for k, stage in enumerate(chain.traced.stages):
        found += [k + (p - stage.start) / (stage.stop - stage.start) for p in range(stage.start, stage.stop)]
    return [*found, float(len(chain.traced.stages))]


def _title(plan: hzo.Plan) -> str:
    name = f"{plan.tree}-ary tree" if isinstance(plan.tree, int) else f"tree {plan.tree}"
    cost = plan.forward_equivalents
    text = f"{name}: {cost:,.0f} forward equivalents" if cost >= 100 else f"{name}: {cost:.3g} forward equivalents"
    return text if plan.expected is None else f"{text}, lowest cosine {plan.expected.cosine:.4f}"


def _draw_tree(figure: Figure, axes: Axes, plan: hzo.Plan, places: Sequence[float]) -> None:
    asked = {node.target: node.repeats for node in plan.nodes if node.operations}
    edges = sorted(plan.edges, key=lambda edge: edge.source - edge.target)
    repeats = [asked.get(edge.target, 1) for edge in edges]
    low, high = min(repeats, default=1), max(repeats, default=1)
    scale = LogNorm(low, high) if high > 8 * low else Normalize(low, max(high, low + 1))
    angle = np.linspace(0, np.pi, 90)
    many = len(edges) > 40
    highest = 0.4 * places[-1] ** RISE  # a row of small arcs is not blown up
    for edge, count in zip(edges, repeats, strict=True):
        left, right = places[edge.target], places[edge.source]
        height = (right - left) ** RISE
        highest = max(highest, height)
        axes.plot(
            (left + right) / 2 + (right - left) / 2 * np.cos(angle),
            height * np.sin(angle),
            color=COLORS(scale(count)),
            linewidth=1.3 if many else 2.0,
            solid_capstyle="round",
        )
    inner = [place for place in places if place != int(place)]
    targets = {edge.target for edge in edges}
    axes.plot(inner, [0] * len(inner), "|", color="#999999", markersize=4, zorder=3)
    size = 3.5 if len(places) > 150 else 6
    for k in range(int(places[-1]) + 1):
        known = places.index(k) in targets or k == places[-1]
        axes.plot(
            k, 0, "o", color="#222222" if known else "white", markeredgecolor="#222222", markersize=size, zorder=4
        )
    axes.set(ylim=(-0.07 * highest, 1.16 * highest), yticks=[])
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0)
    if high > low or any(edge.relative_step is not None for edge in edges):
        _label(axes, list(zip(edges, repeats, strict=True))[::-1], places, highest)
    if high > low:
        bar = figure.colorbar(ScalarMappable(scale, COLORS), ax=axes, fraction=0.03, pad=0.01, label="repeats")
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
        if isinstance(scale, LogNorm):
            bar.ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 200 * low else (1,)))
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        axes.set_title(f"{low:,} repeat{'s' if low > 1 else ''} of every node", loc="right", fontsize=9)


def _label(axes: Axes, edges: Sequence[tuple[PlannedEdge, int]], places: Sequence[float], highest: float) -> None:
    """Repeats and step at the top of an arc, the longest first, where there is room; in a fan of the longest alone."""
    across, up = 0.115 * places[-1] * 7.2 / np.clip(4.5 + 0.16 * places[-1], 7.2, 14.0), 0.085 * highest
    taken: list[tuple[float, float]] = []
    for edge, count in edges:
        left, right = places[edge.target], places[edge.source]
        x, y = (left + right) / 2, (right - left) ** RISE
        crowded = any(abs(x - a) < across and abs(y - b) < up for a, b in taken)
        taken.append((x, y))
        if crowded or right - left < 0.9 * across:
            continue
        text = f"{count:,}×" if edge.relative_step is None else f"{count:,}×, h {edge.relative_step:.2g}"
        axes.text(x, y + 0.012 * highest, text, ha="center", va="bottom", fontsize=8, color="#333333", bbox=_CLEAR)


def _draw_cosines(axes: Axes, plan: hzo.Plan, places: Sequence[float]) -> None:
    assert plan.expected is not None
    lowest: dict[int, float] = {}
    for estimate in plan.expected.errors:
        cosine = plan.expected.cosine_of(estimate)
        lowest[estimate[0]] = min(cosine, lowest.get(estimate[0], 1.0))
    for whole, color, size in ((False, "#BBBBBB", 2.5), (True, "#0072B2", 4)):
        at = [p for p in sorted(lowest) if (places[p] == int(places[p])) == whole]
        axes.plot([places[p] for p in at], [lowest[p] for p in at], "o", color=color, markersize=size)
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set_title("expected cosine with the true cotangent")
    floor = min(lowest.values())
    axes.set_ylim(floor - 0.15 * (1 - floor) - 1e-6, 1 + 0.1 * (1 - floor) + 1e-6)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))

"""How the figures look: large enough for a talk, one color a tree or method throughout."""

from __future__ import annotations

from matplotlib.figure import Figure

from hzo.train.plots import COLORS

# After Okabe and Ito, as the methods' are. Trees are never drawn beside trained methods.
TREE_COLORS = {
    "bisect": "#0072B2",
    "flat": "#E69F00",
    "stagewise": "#009E73",
    "4-ary": "#CC79A7",
    "planned": "#D55E00",
}
MARKERS = {"bisect": "o", "flat": "s", "stagewise": "^", "4-ary": "D", "planned": "x"}
ALL_COLORS = {**COLORS, **TREE_COLORS}


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def tree_name(tree: str | int) -> str:
    return f"{tree}-ary" if isinstance(tree, int) else tree

"""How the figures look: large enough for a talk, one color a tree or method throughout."""

from __future__ import annotations

from matplotlib.figure import Figure

# After Okabe and Ito, as the methods' are.
TREE_COLORS = {
    "bisect": "#0072B2",
    "flat": "#E69F00",
    "stagewise": "#009E73",
    "4-ary": "#CC79A7",
    "planned": "#D55E00",
}
MARKERS = {"bisect": "o", "flat": "s", "stagewise": "^", "4-ary": "D", "planned": "x"}
# Methods that stand beside trees: in colors that no tree has.
STANDARD_COLORS = {"coordinate": "#222222", "spsa": "#888888", "node-perturbation": "#56B4E9"}


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def tree_name(tree: str | int) -> str:
    return f"{tree}-ary" if isinstance(tree, int) else tree

"""Trees over n segments in a row: which boundary's cotangent is estimated from which.

A tree is a list of edges ``(target, source)`` over the boundaries 0..n, ``source > target``; boundary n has its
cotangent from the loss, boundary 0 is left out (nobody needs it, unless asked). Edges come in an order in which every
source is known before it is used. Names and recurrences: paper (bisection) and ours.
"""

from __future__ import annotations

from collections.abc import Callable

from hzo.errors import PlanError

Edge = tuple[int, int]
Tree = str | int
"""A name of ``TREES``, or into how many parts to split."""


def flat(n: int) -> list[Edge]:
    """Every boundary straight from the end: L(L−1)/2 segments, paths of one estimate."""
    return [(target, n) for target in range(n - 1, 0, -1)]


def stagewise(n: int) -> list[Edge]:
    """Every boundary from the next: L−1 segments, paths of up to L−1 estimates."""
    return [(target, target + 1) for target in range(n - 1, 0, -1)]


def b_ary(n: int, b: int) -> list[Edge]:
    """Split into b parts, each boundary between them straight from the right end, and again in every part.

    For b = 2 this is HZO's bisection: T(n) = ⌈n/2⌉ + T(⌊n/2⌋) + T(⌈n/2⌉), the left part ⌊n/2⌋.
    """
    edges: list[Edge] = []
    b = min(b, max(n, 2))  # more parts than boundaries are as many

    def split(start: int, stop: int) -> None:
        cuts = sorted({start + q * (stop - start) // b for q in range(1, b)} - {start})
        edges.extend((cut, stop) for cut in reversed(cuts))
        for left, right in zip([start, *cuts], [*cuts, stop], strict=True):
            if right - left > 1:
                split(left, right)

    if n > 1:
        split(0, n)
    return sorted(edges, key=lambda edge: -edge[0])


def bisect(n: int) -> list[Edge]:
    """HZO's tree: halves, and halves of them."""
    return b_ary(n, 2)


FIXED: dict[str, Callable[[int], list[Edge]]] = {"flat": flat, "stagewise": stagewise, "bisect": bisect}
"""Trees that do not depend on costs, by name: what lists trees, tries them or takes their names reads this."""

TREES = ("planned", *FIXED)
"""Names of trees; a whole number b ≥ 2 stands for ``b_ary``."""


def check_tree(tree: Tree) -> Tree:
    """The tree, or an error that lists what there is."""
    if isinstance(tree, str) and tree in TREES:
        return tree
    if isinstance(tree, int) and not isinstance(tree, bool) and tree >= 2:
        return tree
    raise PlanError(f"expected tree {', '.join(map(repr, TREES))} or a whole number ≥ 2, got {tree!r}")


def fixed_tree(tree: Tree, n: int) -> list[Edge]:
    """The edges of a tree that does not depend on costs."""
    return FIXED[tree](n) if isinstance(tree, str) else b_ary(n, tree)


def total_length(edges: list[Edge]) -> int:
    """Segments that one query of every edge runs; times the width, the stage evaluations of a uniform chain."""
    return sum(source - target for target, source in edges)


def longest_path(edges: list[Edge]) -> int:
    """The largest number of estimates that compose."""
    depth: dict[int, int] = {}
    for target, source in edges:
        depth[target] = depth.get(source, 0) + 1
    return max(depth.values(), default=0)

"""Trees: what every one must do, and the lengths that the design's table states."""

from functools import cache

import pytest

from hzo.errors import PlanError
from hzo.plans.trees import FIXED, TREES, b_ary, check_tree, fixed_tree, flat, longest_path, stagewise, total_length
from support.oracles import bisection

SIZES = range(0, 70)
ALL = [*FIXED, 2, 3, 4, 5, 7, 100]


@pytest.mark.parametrize("tree", ALL)
def test_every_inner_boundary_once_and_sources_known_before_use(tree):
    for n in SIZES:
        edges = fixed_tree(tree, n)
        assert sorted(target for target, _ in edges) == list(range(1, n))
        known = {n}
        for target, source in edges:
            assert target < source
            assert source in known
            known.add(target)


@cache
def test_lengths_are_those_of_the_table():
    for n in SIZES:
        assert total_length(flat(n)) == n * (n - 1) // 2
        assert total_length(stagewise(n)) == max(0, n - 1)
        assert total_length(b_ary(n, 2)) == bisection(n)
    for k in range(7):
        assert 2 * total_length(b_ary(2**k, 2)) == 2**k * k  # (L/2) log₂ L


@pytest.mark.parametrize("b", [2, 3, 4, 5])
def test_length_of_powers_of_b(b):
    """(L (b − 1) / 2) log_b L."""
    for k in range(1, 5):
        if b**k <= 256:
            assert 2 * total_length(b_ary(b**k, b)) == b**k * (b - 1) * k
            assert longest_path(b_ary(b**k, b)) == k


def test_longest_paths():
    for n in SIZES[2:]:
        assert longest_path(flat(n)) == 1
        assert longest_path(stagewise(n)) == n - 1
        # The left part is the shorter one, and only descents to the left add an estimate: ⌊log₂ n⌋, not ⌈log₂ n⌉.
        assert longest_path(b_ary(n, 2)) == n.bit_length() - 1
        for b in (3, 5):
            assert longest_path(b_ary(n, b)) <= next(k for k in range(n) if b**k >= n)  # ⌈log_b n⌉
        assert longest_path(b_ary(n, n)) == 1
    assert longest_path([]) == 0


def test_many_parts_are_the_flat_tree():
    for n in SIZES:
        assert sorted(b_ary(n, max(n, 2))) == sorted(flat(n))


@pytest.mark.parametrize("tree", ["fla", "", None, 1, 0, -2, True, 2.0, [2]])
def test_unknown_trees(tree):
    with pytest.raises(PlanError, match=f"expected tree {', '.join(map(repr, TREES))} or a whole number"):
        check_tree(tree)

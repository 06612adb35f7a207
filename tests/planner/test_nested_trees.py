"""The planner's mathematics against brute force over trees and repeats, and against the figures of the design."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hzo.planner.edge_table import EdgeTable, errors_of, keeps, price_of
from hzo.planner.integer_program import whole_tree
from hzo.planner.nested_trees import CANDIDATES, best_tree, cheapest, optimum, over_wanted, steadiest
from hzo.planner.repeats import repeats_optimal, repeats_uniform


def uniform(n, noise=1.0, fixed=0.0):
    """Price = length, noise per query, all points but 0 wanted."""
    place = torch.arange(n + 1, dtype=torch.float64)
    length = (place - place[:, None]).clamp(min=0)
    ones = torch.ones_like(length)
    return EdgeTable((False, *[True] * (n - 1), False), length, length, noise * ones, fixed * ones)


def drawn(seed, n, *, holes=0.0, wanted=0.7, fixed=0.0, noiseless=0.0, whole=False):
    """Nothing adds up over table here, and longer ones may be cheaper."""
    make = torch.Generator().manual_seed(seed)

    def draw(low, high):
        values = low + (high - low) * torch.rand(n + 1, n + 1, dtype=torch.float64, generator=make)
        return values.round().clamp(min=1) if whole else values

    def chance(p):
        return torch.rand(n + 1, n + 1, generator=make) < p

    cost = draw(0.5, 5)
    relay = cost * (1 + chance(0.5) * draw(0, 2))
    cost, relay = cost.masked_fill(chance(holes), math.inf), relay.masked_fill(chance(holes), math.inf)
    noise = draw(0.1, 1).masked_fill(chance(noiseless), 0).masked_fill(chance(holes / 3), math.inf)
    points = (torch.rand(n + 1, generator=make) < wanted).tolist()
    return EdgeTable(tuple(points), cost, torch.maximum(cost, relay), noise, fixed * draw(0, 1))


def trees(table, *, nested=True):
    """All source assignments to all supersets of the wanted points, without points that serve nothing."""
    n = table.n
    options = [[*range(k + 1, n + 1), *([] if table.wanted[k] else [None])] for k in range(n)]
    for sources in itertools.product(*options):
        edges = [(k, j) for k, j in enumerate(sources) if j is not None]
        estimated = {k for k, _ in edges}
        used = {j for _, j in edges}
        if not used <= estimated | {n} or any(not table.wanted[k] and k not in used for k in estimated):
            continue
        if nested and any(a < b < c < d for a, c in edges for b, d in edges):
            continue
        yield edges[::-1]


def once(table, edges):
    return price_of(table, edges, [1] * len(edges))


def terms(table, edges):
    """{source: [(target, price, noise, fixed)]}, entry by entry."""
    used, found = {j for _, j in edges}, {}
    for k, j in edges:
        price = (table.relay if k in used else table.cost)[k, j].item()
        found.setdefault(j, []).append((k, price, table.noise[k, j].item(), table.fixed[k, j].item()))
    return found


def real(children, point):
    """S below a point: the least price of real repeats there, times the budget."""
    if point not in children:
        return 0.0
    parts = [(p * e, real(children, k)) for k, p, e, _ in children[point]]
    return sum((math.sqrt(w) + math.sqrt(s)) ** 2 for w, s in parts)


def best_whole(table, children, point, budget, limit):
    """The least price of whole repeats below a point, by trying all that stay below the limit; inf beyond it."""
    total = 0.0
    for k, price, noise, fixed in children.get(point, ()):
        best = math.inf
        for r in itertools.count(1):
            if not r * price < min(best, limit - total + 1e-9) or r > 1000:
                break
            rest = budget - fixed - noise / r
            if rest >= -1e-9:
                below = best_whole(table, children, k, rest, min(best, limit - total) - r * price)
                best = min(best, r * price + below)
            if k not in children and math.isfinite(best):
                break
        total += best
        if not total <= limit + 1e-9:
            return math.inf
    return total


seeds = st.integers(0, 2**32)
few = settings(max_examples=30, deadline=None)


@few
@given(seed=seeds, n=st.integers(1, 5), holes=st.sampled_from([0.0, 0.3]))
def test_without_noise_the_cheapest_nested_tree(seed, n, holes):
    table = drawn(seed, n, holes=holes)
    least = min((once(table, edges) for edges in trees(table)), default=math.inf)
    found = cheapest(table)
    if math.isinf(least):
        assert found is None
        assert optimum(table, None) is None
    else:
        assert once(table, found) == pytest.approx(least, rel=1e-12)
        assert {k for k, _ in found} >= set(table.points)
        assert optimum(table, None) == (found, [1] * len(found))


@few
@given(seed=seeds, n=st.integers(1, 6))
def test_crossing_edges_do_not_pay_where_longer_is_dearer(seed, n):
    table = drawn(seed, n)
    table = replace(table, cost=table.cost.cumsum(1), relay=table.relay.cumsum(1))
    least = min(once(table, edges) for edges in trees(table, nested=False))
    assert once(table, cheapest(table)) == pytest.approx(least, rel=1e-12)


@few
@given(seed=seeds, n=st.integers(1, 6), holes=st.sampled_from([0.0, 0.3]), error=st.floats(0.1, 10))
def test_real_repeats_the_best_nested_tree(seed, n, holes, error):
    table = drawn(seed, n, holes=holes)
    least = min((real(terms(table, edges), n) / error for edges in trees(table)), default=math.inf)
    found = best_tree(table, error)
    if not math.isfinite(least):
        assert found is None
        return
    repeats = repeats_optimal(table, found, error, whole=False)
    assert price_of(table, found, repeats) == pytest.approx(least, rel=1e-9)
    assert keeps(table, found, repeats, error)


@pytest.mark.parametrize("n", [1, 2, 9, 33])
def test_real_repeats_cannot_be_shifted(n):
    """A little of one edge's share of the budget, given to the edges just below or taken from them, saves nothing."""
    table = drawn(n, n, wanted=1.0)
    edges = best_tree(table, 1.0)
    repeats = repeats_optimal(table, edges, 1.0, whole=False)
    least, noise = price_of(table, edges, repeats), [table.noise[edge].item() for edge in edges]
    for at, (target, _) in enumerate(edges):
        below = [other for other, (_, source) in enumerate(edges) if source == target]
        for shift in (1e-4, -1e-4) if below else ():
            moved = list(repeats)
            for place, sign in [(at, 1), *((place, -1) for place in below)]:
                moved[place] = noise[place] / (noise[place] / repeats[place] + sign * shift * noise[at] / repeats[at])
            assert keeps(table, edges, moved, 1.0)
            assert price_of(table, edges, moved) >= least


@few
@given(
    seed=seeds,
    n=st.integers(1, 6),
    holes=st.sampled_from([0.0, 0.3]),
    fixed=st.sampled_from([0.0, 0.13]),
    noiseless=st.sampled_from([0.0, 0.3]),
    whole=st.booleans(),
    error=st.sampled_from([0.25, 0.4, 0.7, 1.0, 2.0, 3.0]),
)
def test_whole_repeats_the_optimum(seed, n, holes, fixed, noiseless, whole, error):
    table = drawn(seed, n, holes=holes, fixed=fixed, noiseless=noiseless, whole=whole)
    found = optimum(table, error)
    limit = math.inf if found is None else price_of(table, *found)
    if found is None:  # then no number of repeats helps
        assert all(
            any(p + e == math.inf for below in terms(table, edges).values() for _, p, e, _ in below)
            or not keeps(table, edges, [1e9] * len(edges), error)
            for edges in trees(table, nested=False)
        )
        return
    assert keeps(table, *found, error)
    least = min(best_whole(table, terms(table, edges), n, error, limit) for edges in trees(table))
    assert limit <= least * (1 + 1e-9)
    programme = whole_tree(table, error, limit * 1.05)  # a looser limit changes nothing
    assert programme is None or price_of(table, *programme) == pytest.approx(least, rel=1e-9)
    assert (programme is None) == math.isinf(least)


@pytest.mark.parametrize(("k", "least"), [(1, 26), (2, 14), (3, 11), (6.3, 8)])
def test_eight_segments_exactly(k, least):
    """All budgets and repeats give what the bounded search gives."""
    table = uniform(8)
    assert price_of(table, *whole_tree(table, k, 30.0)) == least
    assert price_of(table, *optimum(table, k)) == least


def test_figures_of_the_design_for_real_repeats():
    table = uniform(64)
    edges = best_tree(table, 1.0)
    assert price_of(table, edges, repeats_optimal(table, edges, 1.0, whole=False)) == pytest.approx(746, abs=0.5)
    v = [0.0, 0.0]
    for n in range(2, 65):
        v.append(min((math.sqrt(m) + math.sqrt(v[n - m])) ** 2 + v[m] for m in range(1, n)))
    assert real(terms(table, edges), 64) == pytest.approx(v[64], rel=1e-12)
    for tree, price in (("bisect", 786), ("flat", 2016), ("stagewise", 3969)):
        edges = over_wanted(table, tree)
        repeats = repeats_optimal(table, edges, 1.0, whole=False)
        assert price_of(table, edges, repeats) == pytest.approx(price, abs=0.5 if tree == "bisect" else 3969)


@pytest.mark.parametrize(("k", "planned", "bisect"), [(1, 755, 1152), (2, 379, 576), (3, 257, 384), (6.3, 156, 192)])
def test_figures_of_the_design_for_whole_repeats(k, planned, bisect):
    table = uniform(64, noise=1 / k)
    edges = over_wanted(table, "bisect")
    assert price_of(table, edges, repeats_uniform(table, edges, 1.0)) == bisect
    found = optimum(table, 1.0)
    assert price_of(table, *found) <= planned
    assert keeps(table, *found, 1.0)


def test_without_noise_stagewise_is_cheapest_and_unwanted_points_are_left_out():
    table = uniform(10, noise=0.0)
    assert optimum(table, 1.0) == ([(k, k + 1) for k in range(9, 0, -1)], [1] * 9)
    table = replace(table, wanted=(False, False, True, *[False] * 8))
    edges, repeats = optimum(table, 1.0)
    assert price_of(table, edges, repeats) == 8
    assert optimum(replace(table, wanted=(False,) * 11), 1.0) == ([], [])
    assert optimum(replace(table, wanted=(False,) * 11), None) == ([], [])


@few
@given(seed=seeds, n=st.integers(8, 40), error=st.floats(0.2, 8), fixed=st.sampled_from([0.0, 0.02]))
def test_never_above_a_fixed_tree(seed, n, error, fixed):
    check_against_fixed_trees(seed, n, error, fixed)


def check_against_fixed_trees(seed, n, error, fixed):
    """With prices and errors that grow along the chain, by stages that differ."""
    make = torch.Generator().manual_seed(seed)
    place = torch.cat((torch.zeros(1), torch.rand(n, generator=make) * 4 + 0.2)).double().cumsum(0)
    length = (place - place[:, None]).clamp(min=0)
    width = torch.rand(n + 1, 1, generator=make).double() + 0.5
    wanted = tuple((torch.rand(n + 1, generator=make) < 0.8).tolist())
    noise = (width * (1 + 0.1 * length)).expand(n + 1, n + 1)
    table = EdgeTable(wanted, width * length, 1.5 * width * length, noise, fixed * length)
    found = optimum(table, error)
    price = math.inf
    if found is not None:
        assert keeps(table, *found, error)
        price = price_of(table, *found)
    for edges in [*(over_wanted(table, tree) for tree in CANDIDATES), best_tree(table, error)]:
        if edges is None:
            continue
        for repeats in (repeats_optimal(table, edges, error), repeats_uniform(table, edges, error)):
            if repeats is not None:
                assert keeps(table, edges, repeats, error)
                assert all(isinstance(r, int) and r >= 1 for r in repeats)
                assert price <= price_of(table, edges, repeats) * (1 + 1e-12)


@few
@given(seed=seeds, n=st.integers(1, 7))
def test_more_error_allowed_never_costs_more(seed, n):
    table = drawn(seed, n)
    found = [optimum(table, error) for error in (0.5, 0.8, 1.3, 2.1, 100.0)]
    costs = [price_of(table, *one) for one in found]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(once(table, cheapest(table)))


@few
@given(seed=seeds, n=st.integers(1, 30), error=st.floats(0.01, 3), whole=st.booleans())
def test_fixed_errors_the_bound_is_kept_or_cannot_be(seed, n, error, whole):
    table = drawn(seed, n, fixed=0.3, noiseless=0.2)
    for edges in (over_wanted(table, "bisect"), over_wanted(table, "stagewise"), steadiest(table)):
        possible = keeps(table, edges, [1e9] * len(edges), error)
        uniform_ones = repeats_uniform(table, edges, error)
        repeats = repeats_optimal(table, edges, error, whole=whole)
        assert (uniform_ones is not None) == (repeats is not None) == possible
        if possible:
            assert keeps(table, edges, repeats, error)
            assert keeps(table, edges, uniform_ones, error)
            most = max(uniform_ones, default=1)
            fewer = [min(r, most - 1) for r in uniform_ones]
            assert most == 1 or not keeps(table, edges, fewer, error)
    found = optimum(table, error)
    assert (found is None) == (not possible)


@few
@given(seed=seeds, n=st.integers(2, 40), error=st.floats(0.2, 3))
def test_where_paths_have_equal_fixed_errors_they_come_off_the_budget(seed, n, error):
    """A flat tree: every edge has its own budget."""
    table = drawn(seed, n, fixed=0.1)
    edges = over_wanted(table, "flat")
    repeats = repeats_optimal(table, edges, error, whole=False)
    expected = [(table.noise[edge] / (error - table.fixed[edge])).item() for edge in edges]
    assert repeats == pytest.approx(expected, rel=1e-9)


def test_no_tree():
    table = uniform(6)
    never = table.cost * math.inf
    rows = torch.tensor([3])
    for impossible in (
        replace(table, cost=never, relay=never),
        replace(table, noise=table.noise * math.inf),
        uniform(6, fixed=1.5),
        replace(
            table,
            cost=table.cost.index_fill(0, rows, math.inf),
            relay=table.relay.index_fill(0, rows, math.inf),
        ),
    ):
        assert optimum(impossible, 1.0) is None
    assert optimum(table, 0.0) is None
    assert optimum(uniform(6, fixed=0.5), 0.5) is None  # nothing left for noise
    assert optimum(uniform(6, noise=0.0, fixed=0.5), 0.5) == ([(k, 6) for k in range(5, 0, -1)], [1] * 5)
    assert cheapest(replace(table, cost=never, relay=never)) is None


def test_errors_and_price_by_hand():
    table = replace(uniform(4, fixed=0.1), relay=10 * uniform(4).cost)
    edges, repeats = [(3, 4), (2, 4), (1, 2)], [1, 2, 4]
    assert errors_of(table, edges, repeats) == pytest.approx({3: 1.1, 2: 0.6, 1: 0.95})
    assert price_of(table, edges, repeats) == 1 + 2 * 20 + 4
    assert repeats_uniform(table, edges, 1.2) == [2, 2, 2]
    assert repeats_uniform(replace(table, noise=table.noise * 0), edges, 1.2) == [1, 1, 1]

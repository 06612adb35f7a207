"""Verdicts on made-up rows: what is right holds, what is not does not."""

import pytest

from hzo.errors import InputError, StepError
from hzo_lab.paper.claims import (
    complexity,
    curves,
    error_accumulation,
    fig1,
    fig5,
    spatial,
    table1,
    theorem1,
    unitary_limit,
)
from hzo_lab.paper.finding import Setting, verdict
from hzo_lab.paper.trained import Trained
from hzo_lab.training.config import TrainConfig


def test_a_verdict_counts_what_was_seen():
    assert verdict({"a": True, "b": True}) == "holds"
    assert verdict({"a": True, "b": False}) == "holds in part"
    assert verdict({"a": False}) == "does not hold"


def rows_of_theorem1(power=None, cosine=1.0):
    return [
        {"dtype": "float64", "scheme": s, "tree": "bisect", "step": h, "error": h ** (power or order), "cosine": 1.0}
        for s, order in theorem1.ORDERS.items()
        for h in theorem1.STEPS
    ] + [
        {"dtype": dtype, "scheme": "central", "tree": "bisect", "step": None, "error": 0.0, "cosine": cosine}
        for dtype in ("float64", "float32")
    ]


def test_theorem1_needs_order_and_cosine():
    def judged(**given):
        rows = rows_of_theorem1(**given)
        return list(theorem1.judge(rows, theorem1.fitted_orders(rows)).values())

    assert judged() == [True, True]
    assert judged(power=1.5) == [False, True]
    assert judged(cosine=0.999) == [True, False]


@pytest.mark.parametrize(
    ("tree", "depth", "cost"),
    # Design: T(n) = ⌈n/2⌉ + T(⌊n/2⌋) + T(⌈n/2⌉); (L/2)·log₂ L; L(L−1)/2; L − 1; (L·(b−1)/2)·log_b L.
    [("bisect", 64, 192), ("bisect", 5, 3 + 1 + (2 + 1)), ("flat", 64, 2016), ("stagewise", 9, 8), (4, 16, 48)],
)
def test_recurrences(tree, depth, cost):
    assert complexity.segments(tree, depth) == cost


def made_up_counts(power=2.0, extra=0):
    rows = []
    for tree, e in {**complexity.EXPONENTS, "flat": power}.items():
        log = tree in complexity.LOGARITHMIC
        for L, M in [(16, 4), (64, 4), (256, 4), (16, 8), (16, 16)]:
            cost = M * L**e * (L.bit_length() - 1 if log else 1)
            rows.append(
                {"tree": tree, "L": L, "M": M, "formula": cost, "counted": cost + extra, "predicted": cost,
                 "queries": M * (L - 1)}
            )  # fmt: skip
    return rows


def test_fig4_needs_equal_counts_and_exponents():
    def judged(**given):
        rows = made_up_counts(**given)
        exponents = complexity.judge(complexity.exponents(rows, width=4, depth=16))
        return list({**complexity.equal(rows), **exponents}.values())

    assert judged() == [True, True, True, True, True]
    assert judged(extra=1)[:2] == [False, False]
    assert judged(power=1.9)[3:] == [False, True]


def test_spatial_needs_colors_and_exactness():
    def judged(**changes):
        local = {"assume": "locality", "directions": 36, "formula": 36, "queries": 72, "error": 1e-10, **changes}
        whole = {"assume": "nothing", "directions": 576, "formula": 576, "queries": 1152, "error": 1e-10}
        return list(spatial.judge([local, whole]).values())

    assert judged() == [True, True, True, True]
    assert judged(directions=37) == [False, False, True, True]
    assert judged(error=0.01) == [True, True, False, True]
    assert judged(directions=600, formula=600, queries=1200) == [True, True, True, False]


def accumulated(power, off=1.0):
    """Errors of paths of 1 (flat) and of 1 to 8 (stagewise) estimates: E = path^power."""
    paths = {"flat": [1] * 8, "stagewise": list(range(8, 0, -1))}
    return [
        {"tree": tree, "L": 8, "boundary": k, "path": p, "measured": 0.01 * p ** (power / 2),
         "predicted": off * 0.01 * p ** (power / 2)}
        for tree, lengths in paths.items()
        for k, p in enumerate(lengths)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("power", "off", "expected"), [(1, 1.0, [True, True]), (2, 1.0, [True, False]), (1, 1.3, [False, True])]
)
def test_accumulation_needs_the_model_and_the_bound(power, off, expected):
    rows = accumulated(power, off)
    judged = error_accumulation.judge(error_accumulation.of_model(rows, "tree", "L"), error_accumulation.of_path(rows))
    assert list(judged.values()) == expected


def test_the_unitary_limit_needs_stability_there_and_only_there():
    def judged(far=5.0, near=1.1, model=1.0):
        return list(unitary_limit.judge({"bisect": model}, {"plain": {0.8: far, 0.96: near, 1.0: 1.0}}).values())

    assert judged() == [True, True, True]
    assert judged(near=3.0) == [False, True, True]
    assert judged(far=1.5) == [True, False, True]
    assert judged(model=0.7) == [True, True, False]
    assert unitary_limit.shrinking({"plain": {0.8: 2.0, 1.0: 1.0, 1.2: 0.5}})
    assert not unitary_limit.shrinking({"plain": {0.8: 2.0, 1.0: 1.0, 1.2: 1.5}})


def cosines(residual=1.0, fading=0.2, he=0.5, random=0.3):
    networks = dict(zip(fig1.NETWORKS, (residual, fading, he, 1.0), strict=True))
    return [
        {"network": network.name, "L": 64, "method": method, "seed": seed, "cosine": value, "layer_mean": value}
        for network, of_trees in networks.items()
        for method, value in (("bisect", of_trees), ("spsa", random), ("node-perturbation", random))
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (cosines(), [True, True, True, True]),
        (cosines(residual=0.98), [False, True, True, True]),
        (cosines(he=1.0), [True, True, False, True]),
        (cosines(fading=1.0), [True, False, False, True]),
        (cosines(random=0.95), [True, True, True, False]),
    ],
)
def test_fig1_needs_high_residual_and_low_plain_networks(rows, expected):
    assert list(fig1.judge(rows, 64).values()) == expected


def finished(method, accuracy, cosine=0.9999, seed=0):
    summary = {"test_accuracy": accuracy / 100, "seconds": 60.0, "cost": 1.0, "environment": {}}
    records = [{"step": 1, "cosine": cosine if method == "hzo" else None}]
    return Trained(TrainConfig(method=method, seed=seed), records, summary)


def arms(ours=90.0, exact=90.3, cosine=0.9999, seeds=(0, 1)):
    both = {
        "hzo": [finished("hzo", ours, cosine, seed) for seed in seeds],
        "backprop": [finished("backprop", exact, seed=seed) for seed in seeds],
    }
    return {"full": both, "paper": both}


@pytest.mark.parametrize(
    ("runs", "missing"),
    [
        (arms(), []),
        (arms(ours=89.0), ["within 0.5 points"]),
        (arms(ours=86.0, exact=86.0), ["above 86.94"]),
        (arms(cosine=0.98), ["cosine"]),
        (arms(cosine=None), ["cosine"]),
        (arms(ours=10.0, exact=10.0), ["learns", "above 86.94"]),
        (arms(seeds=(0,)), ["2 of 4 runs"]),
    ],
)
def test_curves_need_accuracy_cosine_and_all_runs(runs, missing):
    judged = curves.judge(runs, 2, points=0.5, above=curves.DEEPZERO)
    for text in missing:
        assert any(text in part for part, seen in judged.items() if not seen)
    assert all(any(text in part for text in missing) for part, seen in judged.items() if not seen)


def test_curves_need_something_to_compare():
    with pytest.raises(InputError, match="--runs"):
        curves.require_a_pair({"full": {"hzo": [], "backprop": [finished("backprop", 90)]}})
    curves.require_a_pair(arms())


def test_table1_needs_hzo_ahead_at_equal_budget():
    def judged(theirs, **gone):
        budget = {method: [finished(method, theirs)] for method in table1.PASSES}
        budget |= {"hzo": [finished("hzo", 50)], "backprop": [finished("backprop", 50)], **gone}
        return list(table1.judge({}, budget, 1).values())

    assert judged(40.0) == [True] * 4
    assert judged(60.0) == [False] * 4
    assert judged(40.0, spsa=[]) == [method != "spsa" for method in table1.PASSES]


def test_a_rate_at_which_a_seed_diverges_gives_way_to_the_next_best(monkeypatch, tmp_path):
    def trained(config, setting, datasets):
        if config.lr > 0.1 and config.seed == 1:
            raise StepError("a step vanishes")
        return finished(config.method, 100 * config.lr)

    monkeypatch.setattr(table1, "trained", trained)
    told = []
    setting = Setting(scale="smoke", out=tmp_path, tell=told.append)

    def accuracies(shares):
        changes = {"lr": 0.4, "directions": 3}
        return [run.accuracy for run in table1.at_first_share(setting, "spsa", changes, shares, (0, 1), {})]

    assert accuracies([1.0, 0.5, 0.2, 0.1]) == pytest.approx([8, 8])
    assert ["diverges at 1 " in line or "diverges at 0.5 " in line for line in told] == [True, True]
    assert accuracies([]) == []
    with pytest.raises(StepError):
        accuracies([1.0, 0.5])


def test_without_training_the_share_that_has_most_runs_counts(monkeypatch, tmp_path):
    there = {(0.4, 0), (0.2, 0), (0.2, 1), (0.1, 1)}

    def trained(config, setting, datasets):
        return finished("spsa", 100 * config.lr) if (config.lr, config.seed) in there else None

    monkeypatch.setattr(table1, "trained", trained)
    setting = Setting(scale="smoke", out=tmp_path, train=False)
    for shares, found in (([1.0, 0.5, 0.25], [20, 20]), ([1.0, 0.25], [40]), ([0.01], [])):
        runs = table1.at_first_share(setting, "spsa", {"lr": 0.4, "directions": 3}, shares, (0, 1), {})
        assert [run.accuracy for run in runs] == pytest.approx(found)


def precisions(cosine=1.0, behind=0.0):
    rows = []
    for dtype in fig5.DTYPES:
        rows.append({"what": "cosine", "method": "bisect", "dtype": dtype, "activation": "relu", "cosine": cosine})
        for method, accuracy in (("hzo", 95 - behind), ("backprop", 95)):
            rows.append(
                {"what": "training", "method": method, "dtype": dtype, "activation": "relu", "accuracy": accuracy}
            )
    return rows


def test_fig5_needs_cosine_and_accuracy_in_every_precision():
    assert all(fig5.judge(precisions()).values())
    assert list(fig5.judge(precisions(cosine=0.95)).values()) == [False, True, False, True, True, True, True, True]
    assert list(fig5.judge(precisions(behind=2.0)).values()) == [True, False] * 4

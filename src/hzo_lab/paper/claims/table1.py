"""Accuracies in one table: HZO and backprop in both arms, and standard estimates at HZO's budget."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hzo.baselines import BASELINES
from hzo.errors import NonFiniteError, StepError
from hzo_lab.data import Dataset, batches_per_epoch
from hzo_lab.errors import DataError
from hzo_lab.paper.claims import curves
from hzo_lab.paper.finding import Finding, Row, Setting, in_words, mean_spread, verdict
from hzo_lab.paper.images import imagenet_folder
from hzo_lab.paper.plotting import new_figure
from hzo_lab.paper.recipes import training
from hzo_lab.paper.trained import Trained, dataset_of, run_key, trained
from hzo_lab.reports import planned_network
from hzo_lab.training import COLORS, TrainConfig, make_plan, replace

CLAIM = "Accuracy competitive with backprop (the paper's table)."
PASSES = {name: known.passes for name, known in BASELINES.items() if known.passes is not None}  # of one direction
METHODS = ("hzo", "backprop", *PASSES)
POINTS = {"cifar10": 0.5, "imagenet": 1.0}
# Of the recipe's rate; the best of them in a short run with a seed of its own, for each method that draws directions.
RATES = (1.0, 0.3, 0.1, 0.03)
PILOT_SHARE, PILOT_SEED = 0.05, 1000
# How a training at too high a rate ends: losses that are not finite, or weights beside which a step vanishes.
DIVERGED = (NonFiniteError, StepError)


def table1(setting: Setting) -> Finding:
    seeds = setting.seeds(2, smoke=1)
    arms, notes = {}, []
    data_sets = ("cifar10",) if setting.smoke else ("cifar10", "imagenet")
    for data in data_sets:
        if data == "imagenet" and not has_imagenet(setting):
            notes.append("Without ten ImageNet classes, which --data-dir does not hold.")
            continue
        arms[data] = curves.trained_runs(setting, data, seeds)
        notes += curves.data_notes(setting, data)
    budget, spent = at_equal_budget(setting, seeds)
    parts = judge(arms, budget, len(seeds))
    rows = [
        row_of(run, data=data, arm=arm)
        for data, runs in arms.items()
        for arm, by_method in runs.items()
        for found in by_method.values()
        for run in found
    ] + [row_of(run, data="cifar10", arm="budget") for found in budget.values() for run in found]
    return Finding(
        claim=CLAIM,
        found=sentence(arms, budget, spent) + in_words(parts),
        verdict=verdict(parts),
        rows=rows,
        plot=plot(arms, budget),
        seeds=seeds,
        configuration={
            "budget": {
                method: run_key(found[0].config) for method, found in budget.items() if found
            },
            "rates_tried": list(RATES), "pilot_share": PILOT_SHARE, "pilot_seed": PILOT_SEED,
        },
        summary={
            "arms": {data: curves.summary(runs) for data, runs in arms.items()},
            "at_equal_budget": {method: curves.of_method(found) for method, found in budget.items() if found},
            "budget_in_forward_equivalents": spent,
        },
        notes=(
            "Equal budget: every method makes as many steps, with as many random directions in each as cost HZO's "
            "forward equivalents (paper's preset); backprop makes the same steps at its own, far lower price. Learning "
            "rates of the random methods: the best of a few shares of HZO's, by training loss in a short run with "
            "another seed; where a seed diverges at it, the next best. Cost counts a sweep by adjoints or backprop as "
            "two forward passes.",
            "What the paper's table holds beyond 'competitive' is not known to us.",
            *notes,
        ),
    )  # fmt: skip


def has_imagenet(setting: Setting) -> bool:
    try:
        return setting.data_dir is not None and imagenet_folder(setting.data_dir) is not None
    except DataError:
        return False


def at_equal_budget(setting: Setting, seeds: Sequence[int]) -> tuple[dict[str, list[Trained]], float]:
    """By method, the runs of the budget arm; and what one of HZO's costs."""
    reference = training(setting, "cifar10", "budget", "hzo", seeds[0])
    datasets: dict[str, Dataset] = {}
    price = problem_price(reference)
    steps = reference.epochs * batches_per_epoch(len(dataset_of(reference, datasets).train), reference.batch_size)
    found: dict[str, list[Trained]] = {}
    for method in METHODS:
        changes: dict[str, Any] = {"lr": reference.lr}
        shares = [1.0]
        if method in PASSES:
            changes["directions"] = max(1, round(price / PASSES[method]))
            shares = best_shares(setting, method, changes, price * steps, datasets)
        found[method] = at_first_share(setting, method, changes, shares, seeds, datasets)
    return found, price * steps


def at_first_share(
    setting: Setting,
    method: str,
    changes: dict[str, Any],
    shares: Sequence[float],
    seeds: Sequence[int],
    datasets: dict[str, Dataset],
) -> list[Trained]:
    """The runs of all seeds at the first of these shares of the rate at which none diverges; a short run may end well
    where a long one does not. Where no run may be made, those of the share that has most.

    Raises:
        NonFiniteError, StepError: some run diverges at each of them.
    """
    most: list[Trained] = []
    for share in shares:
        rate = {**changes, "lr": changes["lr"] * share}
        configs = [training(setting, "cifar10", "budget", method, seed, **rate) for seed in seeds]
        try:
            runs = [trained(config, setting, datasets) for config in configs]
        except DIVERGED as error:
            if share == shares[-1]:
                raise
            setting.tell(f"{method} diverges at {share:g} of the rate ({error}): the next best")
            continue
        most = max(most, [run for run in runs if run is not None], key=len)
        if len(most) == len(seeds):
            break
    return most


def problem_price(config: TrainConfig) -> float:
    """Forward equivalents of one gradient, by the plan."""
    return make_plan(config, planned_network(config).chain).forward_equivalents


def best_shares(
    setting: Setting, method: str, changes: dict[str, Any], budget: float, datasets: dict[str, Dataset]
) -> list[float]:
    """The shares of the recipe's rate, in the order of the training loss with which a short run ends; none where no
    run may be made. Rates at which the short run diverges are out."""
    losses = {}
    shares = RATES[1:2] if setting.smoke else RATES
    for share in shares:
        pilot = training(setting, "cifar10", "budget", method, PILOT_SEED, **changes)
        cost = changes["directions"] * PASSES[method]
        # One step at least, and a cosine is not what this run is for.
        pilot = replace(pilot, lr=pilot.lr * share, budget=max(PILOT_SHARE * budget, 1.01 * cost), cosine_every=0)
        try:
            run = trained(pilot, setting, datasets)
        except DIVERGED:
            continue
        if run is None:
            return []
        losses[share] = statistics.fmean(record["loss"] for record in run.records[-5:])
    return sorted(losses, key=lambda share: losses[share])


def judge(arms: dict[str, curves.Runs], budget: dict[str, list[Trained]], seeds: int) -> dict[str, bool]:
    parts = {}
    for data, runs in arms.items():
        for part, seen in curves.judge(runs, seeds, points=POINTS[data], above=None).items():
            parts[f"{data}, {part}"] = seen
    ours = [run.accuracy for run in budget["hzo"]]
    for method in PASSES:
        theirs = [run.accuracy for run in budget[method]]
        if not (ours and theirs):
            parts[f"equal budget, {method}: not run yet"] = False
        else:
            parts[f"ahead of {method} at equal budget"] = statistics.fmean(ours) > statistics.fmean(theirs)
    return parts


def row_of(run: Trained, **about: Any) -> Row:
    config = run.config
    return {
        **about, "model": config.model, "method": config.method, "seed": config.seed, "lr": config.lr,
        "directions": config.directions, "test_accuracy": run.accuracy, "lowest_cosine": run.lowest_cosine,
        "steps": run.summary["step"], "cost": run.summary["cost"], **run.where(),
    }  # fmt: skip


def sentence(arms: dict[str, curves.Runs], budget: dict[str, list[Trained]], spent: float) -> str:
    words = " ".join(f"{data}: {curves.sentence(runs)}" for data, runs in arms.items())
    figures = []
    for method, found in budget.items():
        words = f"{curves.accuracy_words(found)} ({curves.seeds_words(found)})" if found else "not run yet"
        figures.append(f"{method} {words}")
    return f"{words} At a budget of {spent:,.0f} forward equivalents: {', '.join(figures)}."


def plot(arms: dict[str, curves.Runs], budget: dict[str, list[Trained]]) -> Figure:
    figure = new_figure(12, 4.4)
    left, right = figure.subplots(1, 2)
    groups = [
        (f"{data}\n{arm} arm", by_method)
        for data, runs in arms.items()
        for arm, by_method in runs.items()
        if any(by_method.values())
    ]
    for offset, method in ((-0.2, "hzo"), (0.2, "backprop")):
        there = [(k, by_method[method]) for k, (_, by_method) in enumerate(groups) if by_method[method]]
        bars(
            left,
            [k + offset for k, _ in there],
            [found for _, found in there],
            COLORS.get(method, "#777777"),
            0.38,
            method,
        )
    left.set_xticks(range(len(groups)), [name for name, _ in groups])
    left.legend(loc="upper right")
    shown = [(method, found) for method, found in budget.items() if found]
    for k, (method, found) in enumerate(shown):
        bars(right, [k], [found], COLORS.get(method, "#777777"), 0.7)
    right.set_xticks(range(len(shown)), [method for method, _ in shown], rotation=20)
    for axes, title in ((left, "HZO beside backprop"), (right, "at equal budget (backprop: equal steps)")):
        axes.set(ylim=(0, 112), ylabel="test accuracy, %", title=title)
    return figure


def bars(
    axes: Axes, at: list[float], found: list[list[Trained]], color: str, width: float, label: str | None = None
) -> None:
    figures = [mean_spread([run.accuracy for run in runs]) for runs in found]
    drawn = axes.bar(
        at, [m for m, _ in figures], width, yerr=[s for _, s in figures], color=color, label=label, capsize=3
    )
    axes.bar_label(drawn, [f"{mean:.1f}" for mean, _ in figures], fontsize=9)

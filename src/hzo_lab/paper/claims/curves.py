"""Training curves of HZO beside backprop's, in two arms: Fig. 2 (CIFAR-10) and Fig. 3 (ten ImageNet classes)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

import hzo
from hzo import presets
from hzo.errors import InputError
from hzo_lab.data import Dataset
from hzo_lab.paper.finding import Finding, Row, Setting, in_words, mean_spread, verdict
from hzo_lab.paper.images import notes_on_cifar
from hzo_lab.paper.plotting import new_figure
from hzo_lab.paper.recipes import ARMS, training
from hzo_lab.paper.trained import Trained, run_key, trained
from hzo_lab.training import COLORS, accuracy_axis, cosine_panel, models, running, series, spread_band

METHODS = ("hzo", "backprop")
COSINE = 0.99
LEARNED = 30.0  # percent, of ten classes: equal to backprop at the level of chance says nothing
# What others reach: DeepZero (Chen et al., 2024), ResNet-20 on CIFAR-10, 28,220 forward passes a step.
DEEPZERO = 86.94
Runs = dict[str, dict[str, list[Trained]]]  # by arm and method


def fig2(setting: Setting) -> Finding:
    claim = (
        "CIFAR-10: training loss and accuracy, validation accuracy, and cosine between HZO and BP during training "
        "(Fig. 2); accuracy competitive with backprop."
    )
    return curves(setting, "cifar10", claim, points=0.5, above=DEEPZERO)


def fig3(setting: Setting) -> Finding:
    return curves(setting, "imagenet", "The same for a 10-class ImageNet subset (Fig. 3).", points=1.0, above=None)


def curves(setting: Setting, data: str, claim: str, *, points: float, above: float | None) -> Finding:
    """Both arms, two seeds; ``points`` of accuracy that HZO may be behind, and what its full arm must exceed."""
    seeds = setting.seeds(2, smoke=1)
    runs = trained_runs(setting, data, seeds)
    require_a_pair(runs)
    parts = judge(runs, len(seeds), points=points, above=None if setting.smoke else above)
    full_size = predicted_at_full_size()
    return Finding(
        claim=claim,
        found=sentence(runs) + in_words(parts),
        verdict=verdict(parts),
        rows=all_rows(runs),
        plot=plot(runs),
        seeds=seeds,
        configuration={
            arm: {m: run_key(training(setting, data, arm, m, seeds[0])) for m in METHODS} for arm in ARMS
        },
        summary={"arms": summary(runs), "paper_arm_at_full_size": full_size},
        notes=(
            "Full arm: a standard ResNet with BatchNorm by the library's best plan (measured adjoints: a reverse sweep "
            "at about backprop's price). Paper arm: bisection with spatial parallel perturbation on a residual CNN "
            "without normalization, at the size that the machine affords.",
            f"The paper arm's method on a whole ResNet-20 (32 × 32, BatchNorm frozen) would cost "
            f"{full_size['forward_equivalents']:,.0f} forward equivalents a gradient by its plan.",
            "Both methods have the same recipe, weights, data order and augmentation for each seed. The cosine is that "
            "of all parameters' gradients on a fixed batch of training examples, and is measured aside from training.",
            *data_notes(setting, data),
        ),
    )  # fmt: skip


def require_a_pair(runs: Runs) -> None:
    """Something to compare, in one arm at least.

    Raises:
        InputError: there is nothing, and --no-train forbids to make it.
    """
    if not any(by_method["hzo"] and by_method["backprop"] for by_method in runs.values()):
        there = [run.config.method for by_method in runs.values() for found in by_method.values() for run in found]
        raise InputError(
            f"expected in one arm finished runs by hzo and by backprop, found {', '.join(there) or 'none'}, and "
            "--no-train forbids to make them: give --runs DIR, or --train."
        )


def all_rows(runs: Runs) -> list[Row]:
    every = [(arm, run) for arm, by_method in runs.items() for found in by_method.values() for run in found]
    return [row for arm, run in every for row in run.rows(arm=arm)]


def data_notes(setting: Setting, data: str) -> tuple[str, ...]:
    if setting.smoke:
        return ("At smoke scale both data sets are scikit-learn's digits (8 × 8): it shows that all works, no more.",)
    return notes_on_cifar(setting.data_dir) if data == "cifar10" and setting.data_dir is not None else ()


def trained_runs(setting: Setting, data: str, seeds: Sequence[int]) -> Runs:
    datasets: dict[str, Dataset] = {}
    found: Runs = {}
    for arm in ARMS:
        found[arm] = {}
        for method in METHODS:
            runs = [trained(training(setting, data, arm, method, seed), setting, datasets) for seed in seeds]
            found[arm][method] = [run for run in runs if run is not None]
    return found


def judge(runs: Runs, seeds: int, *, points: float, above: float | None) -> dict[str, bool]:
    """An arm with runs that are missing has not been seen to hold."""
    parts = {}
    for arm, by_method in runs.items():
        missing = sum(seeds - len(by_method[method]) for method in METHODS)
        if missing:
            parts[f"{arm} arm, of which {missing} of {2 * seeds} runs are not run yet"] = False
        ours, exact = by_method["hzo"], by_method["backprop"]
        if ours and exact:
            behind = _mean(exact) - _mean(ours)
            parts[f"{arm} arm within {points:g} points of backprop"] = behind <= points
        if ours:
            parts[f"{arm} arm learns (≥ {LEARNED:g} %)"] = all(run.accuracy >= LEARNED for run in ours)
            cosines = [run.lowest_cosine for run in ours]
            parts[f"{arm} arm, cosine ≥ {COSINE} throughout"] = all(c is not None and c >= COSINE for c in cosines)
    if above is not None and runs["full"]["hzo"]:
        parts[f"full arm above {above:g} % (DeepZero)"] = _mean(runs["full"]["hzo"]) > above
    return parts


def _mean(runs: Sequence[Trained]) -> float:
    return statistics.fmean(run.accuracy for run in runs)


def summary(runs: Runs) -> dict[str, Any]:
    """By arm and method: accuracy in percent, mean and standard deviation over seeds; cost, time, lowest cosine."""
    return {
        arm: {method: of_method(found) for method, found in by_method.items() if found}
        for arm, by_method in runs.items()
    }


def of_method(found: Sequence[Trained]) -> dict[str, Any]:
    mean, sd = mean_spread([run.accuracy for run in found])
    return {
        "test_accuracy_mean": mean, "test_accuracy_sd": sd, "test_accuracy": [run.accuracy for run in found],
        "seeds": [run.config.seed for run in found], "lowest_cosine": [run.lowest_cosine for run in found],
        "cost_in_forward_passes": [run.summary["cost"] for run in found],
        "forward_equivalents": [run.summary["forward_equivalents"] for run in found],
        "runs": [run.where() for run in found],
    }  # fmt: skip


def sentence(runs: Runs) -> str:
    parts = []
    for arm, by_method in runs.items():
        figures = []
        for method, found in by_method.items():
            if not found:
                figures.append(f"{method} not run yet")
                continue
            seconds = statistics.fmean(run.summary["seconds"] for run in found)
            figures.append(f"{method} {accuracy_words(found)} ({seeds_words(found)}, {seconds / 60:.1f} min each)")
        cosines = [run.lowest_cosine for run in by_method["hzo"] if run.lowest_cosine is not None]
        lowest = f", lowest cosine {min(cosines):.6f}" if cosines else ""
        parts.append(f"{arm.capitalize()} arm: {', '.join(figures)}{lowest}.")
    return " ".join(parts)


def accuracy_words(found: Sequence[Trained]) -> str:
    """A single run has no spread."""
    mean, sd = mean_spread([run.accuracy for run in found])
    return f"{mean:.2f} ± {sd:.2f} %" if len(found) > 1 else f"{mean:.2f} %"


def seeds_words(found: Sequence[Trained]) -> str:
    return f"seed{'s' if len(found) > 1 else ''} {', '.join(str(run.config.seed) for run in found)}"


def predicted_at_full_size() -> dict[str, float]:
    """What the paper's preset costs on a whole ResNet-20: a plan, nothing is run. BatchNorm is frozen, since in train
    mode it couples the samples that are perturbed at once."""
    model = models.build("resnet20", (3, 32, 32), 10).eval()
    chain = hzo.trace(model, torch.zeros(2, 3, 32, 32))
    plan = hzo.plan(chain, **presets.paper)
    return {"forward_equivalents": plan.forward_equivalents, "queries_per_sample": plan.queries / plan.batch}


def plot(runs: Runs) -> Figure:
    shown = {arm: by_method for arm, by_method in runs.items() if any(by_method.values())}
    figure = new_figure(14, 3.4 * len(shown))
    grid = figure.subplots(len(shown), 4, squeeze=False)
    for panels, (arm, by_method) in zip(grid, shown.items(), strict=True):
        draw(panels, arm, by_method)
    named: dict[str, Any] = {}  # an arm may lack a method
    for panels in grid:
        handles, labels = panels[0].get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=2)
    return figure


def draw(panels: Any, arm: str, by_method: Mapping[str, Sequence[Trained]]) -> None:
    loss, train_accuracy, test_accuracy, cosine = panels
    for method, found in by_method.items():
        logs = [run.records for run in found]
        if logs:
            spread_band(loss, [running(series(log, "loss")) for log in logs], COLORS[method], method)
            spread_band(
                train_accuracy, [running(series(log, "train_accuracy")) for log in logs], COLORS[method], method
            )
            spread_band(test_accuracy, [series(log, "test_accuracy") for log in logs], COLORS[method], method)
    loss.set(title=f"{arm} arm: training loss", ylim=(0, None), xlabel="step")
    train_accuracy.set(title="training accuracy", xlabel="step")
    test_accuracy.set(title="validation accuracy", xlabel="step")
    accuracy_axis(train_accuracy)
    accuracy_axis(test_accuracy)
    cosine_panel(cosine, [(series(run.records, "cosine"), COLORS["hzo"], "hzo") for run in by_method["hzo"]])
    cosine.set(xlabel="step", title="cosine")  # short: the lowest one stands beside it

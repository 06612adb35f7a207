"""Every claim by its name: what tries it, what data that needs, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hzo.errors import InputError
from hzo_lab.data import find_cifar10
from hzo_lab.errors import DataError
from hzo_lab.paper.claims.complexity import complexity, fig4
from hzo_lab.paper.claims.curves import fig2, fig3
from hzo_lab.paper.claims.error_accumulation import error_accumulation
from hzo_lab.paper.claims.fig1 import fig1
from hzo_lab.paper.claims.fig5 import fig5
from hzo_lab.paper.claims.spatial import spatial
from hzo_lab.paper.claims.table1 import table1
from hzo_lab.paper.claims.theorem1 import theorem1
from hzo_lab.paper.claims.unitary_limit import unitary_limit
from hzo_lab.paper.finding import Finding, Setting
from hzo_lab.paper.images import imagenet_folder


@dataclass(frozen=True)
class Experiment:
    """One claim of the paper and the function that tries it.

    Attributes:
        about: in a few words.
        hours: at scale "cpu", on one core that has nothing else to do, beyond runs that others of the list have made;
            estimates, from shares of each that were timed.
        data: that cannot be done without at scales "cpu" and "gpu".
    """

    name: str
    about: str
    run: Callable[[Setting], Finding]
    hours: float
    data: Literal["cifar10", "imagenet"] | None = None


EXPERIMENTS = (
    Experiment("theorem1", "the error falls with the step, at the scheme's order", theorem1, 0.02),
    Experiment("complexity", "counted stage evaluations and the recurrence", complexity, 0.01),
    Experiment("error-accumulation", "errors along the depth and the error model", error_accumulation, 0.1),
    Experiment("unitary-limit", "errors against the stages' gain", unitary_limit, 0.1),
    Experiment("fig1", "cosine with backprop against depth, standard ZO beside", fig1, 0.4),
    Experiment("fig2", "training curves on CIFAR-10, HZO beside backprop", fig2, 5, "cifar10"),
    Experiment("fig3", "training curves on ten ImageNet classes", fig3, 2.5, "imagenet"),
    Experiment("fig4", "cost against depth and width, exponents", fig4, 0.01),
    Experiment("fig5", "activations and precisions: cosine, trained accuracy", fig5, 0.3),
    Experiment("table1", "accuracies, and other estimates at equal budget", table1, 3, "cifar10"),
    Experiment("spatial", "colors instead of elements in convolutions", spatial, 0.02),
)


def names() -> tuple[str, ...]:
    return tuple(experiment.name for experiment in EXPERIMENTS)


def find(name: str) -> tuple[Experiment, ...]:
    """The experiment of this name, or all of them."""
    if name == "all":
        return EXPERIMENTS
    found = tuple(experiment for experiment in EXPERIMENTS if experiment.name == name)
    if not found:
        raise InputError(f"expected one of {', '.join(names())}, all or list, got {name!r}.")
    return found


def check_data(experiments: tuple[Experiment, ...], setting: Setting) -> None:
    """That all data are there, before the first hour is spent.

    Raises:
        DataError: what is missing, and where it was looked for.
    """
    if setting.data_dir is not None and not setting.data_dir.is_dir():
        raise DataError(f"expected the data in {setting.data_dir}, which is not a directory: check --data-dir.")
    for experiment in experiments:
        if experiment.data is None or setting.smoke:
            continue
        if setting.data_dir is None:
            raise DataError(
                f"{experiment.name} at scale {setting.scale} is about real images: say with --data-dir DIR where "
                "cifar-10-batches-py and a tree train/, val/ of ten ImageNet classes are, or try --scale smoke."
            )
        if experiment.data == "cifar10":
            find_cifar10(setting.data_dir)
        else:
            imagenet_folder(setting.data_dir)

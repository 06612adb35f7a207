"""The trainings of record: which network, data and schedule, at each scale. One place, so that a recipe that changes
changes for both methods, and for figure and table alike.

*Full arm*: a standard ResNet with BatchNorm by the library's best plan. *Paper arm*: bisection with spatial parallel
perturbation on a residual CNN without normalization, near the unitary limit. *Budget arm*: the paper arm's network once
more, smaller, for estimates at equal cost.

At scale "long" the full arm has the epochs that it takes to be done, and the paper arm a network that learns more for
each query: narrow where it is perturbed, wide inside of its blocks, small batches, forward differences.
"""

from __future__ import annotations

from typing import Any

from hzo import presets
from hzo_lab.paper.finding import Scale, Setting
from hzo_lab.paper.images import imagenet_folder
from hzo_lab.training import TrainConfig, recipe

Options = dict[str, Any]

ARMS = ("full", "paper")
BEST: Options = {"tree": presets.fast["tree"], "assume": presets.fast["assume"]}
PAPER: Options = {"tree": presets.paper["tree"], "assume": presets.paper["assume"], "scheme": presets.paper["scheme"]}

# Seconds on any machine, without any files.
_DIGITS: Options = {"data": "digit-images", "batch_size": 64, "cosine_every": 5, "weight_decay": 5e-4}
_SMOKE: dict[str, Options] = {
    "full": {**_DIGITS, **BEST, "model": "resnet20", "depth": 8, "width": 4, "lr": 0.1, "epochs": 2},
    "paper": {**_DIGITS, **PAPER, "model": "cnn", "depth": 2, "width": 4, "lr": 0.4, "epochs": 1},
    "budget": {**_DIGITS, **PAPER, "model": "cnn", "depth": 2, "width": 2, "lr": 0.4, "epochs": 1},
}
_CIFAR: Options = {"data": "cifar10", "batch_size": 128, "weight_decay": 5e-4}
_IMAGENET: Options = {"data": "imagefolder", "image_size": 64, "batch_size": 64, "weight_decay": 5e-4}
_FULL_CIFAR: Options = {**_CIFAR, **BEST, "model": "resnet20", "lr": 0.2}
_FULL_IMAGENET: Options = {**_IMAGENET, **BEST, "model": "resnet20", "lr": 0.1}
_NARROW: Options = {"model": "inverted-cnn", "depth": 8, "width": 8, "lr": 0.02, "batch_size": 32, "scheme": "forward"}
# Rates are backprop's, and HZO takes them: at depth 8 without normalization 0.3 diverges, at depth 4 it trains.
_RECIPES: dict[tuple[str, str, Scale], Options] = {
    ("cifar10", "full", "cpu"): {**_FULL_CIFAR, "epochs": 20},
    ("cifar10", "full", "gpu"): {**_FULL_CIFAR, "epochs": 100},
    ("cifar10", "paper", "cpu"): {**_CIFAR, **PAPER, "model": "cnn", "depth": 8, "width": 8, "lr": 0.1, "epochs": 2},
    ("cifar10", "paper", "gpu"): {**_CIFAR, **PAPER, "model": "cnn", "depth": 16, "width": 16, "lr": 0.1, "epochs": 20},
    ("cifar10", "budget", "cpu"): {**_CIFAR, **PAPER, "model": "cnn", "depth": 4, "width": 8, "lr": 0.3, "epochs": 1},
    ("cifar10", "budget", "gpu"): {**_CIFAR, **PAPER, "model": "cnn", "depth": 8, "width": 8, "lr": 0.1, "epochs": 5},
    # One pass: an image that is not seen again need not be shifted.
    ("cifar10", "paper", "long"): {**_CIFAR, **PAPER, **_NARROW, "augment": False, "epochs": 1},
    ("cifar10", "full", "long"): {**_FULL_CIFAR, "epochs": 50},
    ("imagenet", "full", "long"): {**_FULL_IMAGENET, "epochs": 80},
    ("imagenet", "full", "cpu"): {**_FULL_IMAGENET, "epochs": 30},
    ("imagenet", "full", "gpu"): {**_FULL_IMAGENET, "epochs": 60},
    ("imagenet", "paper", "cpu"): {
        **_IMAGENET,
        **PAPER,
        "model": "cnn",
        "depth": 8,
        "width": 8,
        "lr": 0.1,
        "epochs": 5,
    },
    ("imagenet", "paper", "gpu"): {
        **_IMAGENET,
        **PAPER,
        "model": "cnn",
        "depth": 16,
        "width": 16,
        "lr": 0.1,
        "epochs": 40,
    },
}


def _of(data: str, arm: str, scale: Scale) -> Options:
    """What has no longer run of its own is as long as at scale "cpu"."""
    known = _RECIPES.get((data, arm, scale))
    return _RECIPES[data, arm, "cpu"] if known is None else known


def training(setting: Setting, data: str, arm: str, method: str, seed: int, **changes: Any) -> TrainConfig:
    """The configuration of one run: ``data`` is "cifar10" or "imagenet"; at smoke scale both are digits."""
    chosen = dict(_SMOKE[arm] if setting.smoke else _of(data, arm, setting.scale))
    if not setting.smoke:
        folder = setting.data_dir
        assert folder is not None  # check_data has seen to it
        chosen["data_dir"] = str(imagenet_folder(folder) if data == "imagenet" else folder)
        chosen["threads"] = setting.threads
    return recipe(**{**chosen, "method": method, "seed": seed, "device": str(setting.device), **changes})

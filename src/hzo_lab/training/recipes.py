"""Settings that go together: what a run takes where its user says nothing."""

from __future__ import annotations

from typing import Any

import torch

from hzo_lab.data import BUNDLED
from hzo_lab.training.config import TrainConfig

# The main job's are the defaults of TrainConfig itself.
_BY_DATA: dict[str, dict[str, Any]] = {
    "digits": {},
    "digit-images": {"model": "cnn"},
    "cifar10": {
        "model": "cnn",
        "batch_size": 128,
        "epochs": 20,
        "log_every": 20,
        "cosine_every": 200,
        "probe_size": 8,
    },
    "imagefolder": {
        "model": "cnn",
        "batch_size": 64,
        "epochs": 20,
        "log_every": 20,
        "cosine_every": 200,
        "probe_size": 8,
    },
}
_BY_MODEL: dict[str, dict[str, Any]] = {
    "plain-mlp": {"lr": 0.02},
    "resnet20": {"lr": 0.2, "probe_size": 64},
}
# One random direction points nearly at right angles to the gradient and is long: its variance asks for a
# small rate.
_RANDOM_RATE = {"spsa": 0.0025, "mezo": 0.0025, "forward-gradient": 0.0025, "node-perturbation": 0.02}


def recipe(**given: Any) -> TrainConfig:
    """The configuration for what is given; None stands for what is not. What is given always wins."""
    asked = {name: value for name, value in given.items() if value is not None}
    chosen = {**_BY_DATA.get(asked.get("data", "digits"), {}), **asked}
    settings = {
        **_BY_DATA.get(asked.get("data", "digits"), {}),
        **_BY_MODEL.get(chosen.get("model", "mlp"), {}),
        **asked,
    }
    if "lr" not in asked and (share := _RANDOM_RATE.get(settings.get("method", "hzo"))) is not None:
        settings["lr"] = settings.get("lr", TrainConfig.lr) * share
    if settings.get("data", "digits") not in BUNDLED:
        # The digits' network is so small that a second thread gains little, and much is lost where cores are shared.
        settings.setdefault("threads", torch.get_num_threads())
    return TrainConfig(**settings)

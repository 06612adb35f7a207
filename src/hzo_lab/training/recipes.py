"""Settings that go together: what a run takes where its user says nothing."""

from __future__ import annotations

from typing import Any

import torch

from hzo.baselines import BASELINES
from hzo_lab.data import DATA_SETS
from hzo_lab.training.config import TrainConfig
from hzo_lab.training.models import MODELS


def recipe(**given: Any) -> TrainConfig:
    """The configuration for what is given; None stands for what is not. What is given always wins."""
    asked = {name: value for name, value in given.items() if value is not None}
    data, method = asked.get("data", TrainConfig.data), asked.get("method", TrainConfig.method)
    # A name that nobody knows is an error of TrainConfig's.
    by_data = DATA_SETS[data].recipe if data in DATA_SETS else {}
    model = asked.get("model", by_data.get("model", TrainConfig.model))
    settings = {**by_data, **(MODELS[model].recipe if model in MODELS else {}), **asked}
    if "lr" not in asked and method in BASELINES and BASELINES[method].rate != 1:
        settings["lr"] = settings.get("lr", TrainConfig.lr) * BASELINES[method].rate
    if data in DATA_SETS and not DATA_SETS[data].bundled:
        # The digits' network is so small that a second thread gains little, and much is lost where cores are shared.
        settings.setdefault("threads", torch.get_num_threads())
    return TrainConfig(**settings)

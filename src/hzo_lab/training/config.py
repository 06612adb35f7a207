"""What a run is: every decision that its numbers depend on, in one record that round-trips through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hzo.baselines import BASELINES
from hzo.errors import InputError
from hzo.plans import TREES
from hzo_lab.data import DATA_SETS
from hzo_lab.errors import CheckpointError
from hzo_lab.training import models

DATA = tuple(DATA_SETS)
MODELS = tuple(models.MODELS)
METHODS = ("hzo", *BASELINES)
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("one-cycle", "cosine", "constant")
DTYPES = ("float32", "float64", "bfloat16", "float16")
ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid", "silu", "leaky-relu")
ASSUMPTIONS = ("nothing", "locality", "structure")
SCHEMES = ("central", "forward")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the main job: a residual MLP learns handwritten digits by HZO.

    Attributes:
        data, data_dir, image_size, augment: what is learned; ``image_size`` is for ImageFolder trees.
        model, depth, width, activation: the network; ``None`` for the model's own.
        method: how gradients are made.
        tree, assume, scheme: the plan of HZO, as ``hzo.plan`` takes them; the defaults are
            ``hzo.presets.paper``.
        directions: random directions averaged for one gradient by the methods that draw any.
        epochs: passes over the training data; the learning rate's schedule ends with them.
        budget: forward equivalents to spend instead; the schedule ends with them, and ``epochs`` is not
            looked at.
        threads: of the CPU; sums round by how they are shared out, so a resumed run uses as many as it began with.
        lr: the highest learning rate of the schedule.
        log_every, cosine_every: in steps; 0 turns the cosine with backprop off.
        checkpoint_every: in steps; 0 for once an epoch (and once a minute in any case).
        probe_size: examples in the fixed batch on which the cosine is taken.
    """

    data: str = "digits"
    data_dir: str | None = None
    image_size: int = 64
    augment: bool = True
    model: str = "mlp"
    depth: int | None = None
    width: int | None = None
    activation: str | None = None
    method: str = "hzo"
    tree: str | int = "bisect"
    assume: str = "locality"
    scheme: str = "central"
    directions: int = 1
    epochs: int = 10
    budget: float | None = None
    batch_size: int = 32
    optimizer: str = "sgd"
    lr: float = 0.04
    momentum: float = 0.9
    weight_decay: float = 2e-3
    schedule: str = "one-cycle"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    log_every: int = 5
    cosine_every: int = 22
    probe_size: int = 16
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        _check(self)


_CHOICES = {
    "data": DATA,
    "model": MODELS,
    "activation": ACTIVATIONS,
    "method": METHODS,
    "assume": ASSUMPTIONS,
    "scheme": SCHEMES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "dtype": DTYPES,
}
_DEEPEST = 10_000  # blocks: more take hours to build and to trace, and are a slip of the keyboard
# Field: (lowest value, is that value itself allowed).
_BOUNDS = {
    "image_size": (8, True),
    "depth": (1, True),
    "width": (1, True),
    "directions": (1, True),
    "epochs": (1, True),
    "budget": (0, False),
    "batch_size": (1, True),
    "lr": (0, False),
    "momentum": (0, True),
    "weight_decay": (0, True),
    "seed": (0, True),
    "threads": (1, True),
    "log_every": (1, True),
    "cosine_every": (0, True),
    "probe_size": (1, True),
    "checkpoint_every": (0, True),
}


def _check(config: TrainConfig) -> None:
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        # A whole number may stand for a real one; a bool, which is an int to Python, for neither.
        fits = type(value) in kinds or (float in kinds and type(value) is int)
        if not fits:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise InputError(f"expected {field.name} to be {names}, got {value!r}.")
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices and not (name == "activation" and value is None):
            raise InputError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}.")
    for name, (low, included) in _BOUNDS.items():
        value = getattr(config, name)
        if value is None:
            continue
        if not math.isfinite(value) or value < low or (value == low and not included):
            raise InputError(f"expected {name} to be {'at least' if included else 'more than'} {low}, got {value!r}.")
    if config.depth is not None and config.depth > _DEEPEST:
        raise InputError(f"expected depth to be at most {_DEEPEST:,}, got {config.depth!r}.")
    if isinstance(config.tree, str) and config.tree not in TREES:
        raise InputError(
            f"expected tree to be one of {', '.join(TREES)} or a whole number of parts (2 or more), "
            f"got {config.tree!r}."
        )
    if isinstance(config.tree, int) and config.tree < 2:
        raise InputError(f"expected a tree of 2 or more parts, got {config.tree}.")


def to_json(config: TrainConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(values: Any, source: str = "the configuration") -> TrainConfig:
    """A configuration from a JSON object; unknown fields are an error, missing ones take their default."""
    if not isinstance(values, dict):
        raise InputError(f"expected {source} to be a JSON object, got {type(values).__name__}.")
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    if unknown := sorted(set(values) - set(known)):
        raise InputError(
            f"{source} has unknown field{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}. "
            f"Known are {', '.join(known)}: correct or remove the others."
        )
    try:
        return TrainConfig(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run directory."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"expected a run's configuration in {path}, it is missing: give the directory that `hzo "
            "train` wrote, "
            "or start a new run."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Restore it, or start a new run.") from error
    return from_dict(values, str(path))


def replace(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A configuration with some fields changed, checked again."""
    return dataclasses.replace(config, **changes)

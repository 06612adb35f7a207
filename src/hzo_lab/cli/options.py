"""The options that commands share; None where one is not given, for a recipe or a resumed run to fill in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hzo.errors import InputError
from hzo_lab.training import LOGS
from hzo_lab.training import config as names


def one_of(choices: tuple[str, ...]) -> str:
    return ", ".join(choices)


def choice(choices: tuple[str, ...], more: str = ".", *flags: str) -> Any:
    """An option that takes one of these names, and that a shell completes."""

    return typer.Option(*flags, help=f"{one_of(choices)}{more}", autocompletion=among(choices))


def among(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """What a shell completes a value with."""

    def begin(incomplete: str) -> list[str]:
        return [name for name in choices if name.startswith(incomplete)]

    return begin


DataName = Annotated[str | None, choice(names.DATA, ". Default: digits.", "--data")]
DataDir = Annotated[Path | None, typer.Option(help="Folder of cifar10's or imagefolder's files.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of imagefolder's images, in pixels. Default: 64.")]
Augment = Annotated[bool | None, typer.Option(help="Shift and mirror training images. Default: yes.")]
ModelName = Annotated[str | None, choice(names.MODELS, ". Default: mlp for digits, cnn for images.")]
Depth = Annotated[int | None, typer.Option(help="Blocks of the network (layers, of resnet20).")]
Width = Annotated[int | None, typer.Option(help="Units or channels of a block.")]
Activation = Annotated[str | None, choice(names.ACTIVATIONS)]
MethodName = Annotated[str | None, choice(names.METHODS, ". Default: hzo.")]
TreeName = Annotated[str | None, choice(names.TREES, ", or a number of parts. Default: bisect.")]
AssumeName = Annotated[str | None, choice(names.ASSUMPTIONS, ". Default: locality.")]
SchemeName = Annotated[str | None, choice(names.SCHEMES, ". Default: central.")]
Directions = Annotated[int | None, typer.Option(help="Random directions a gradient, for methods that draw any.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training data. Default: 10, of images 20.")]
Budget = Annotated[float | None, typer.Option(help="Forward equivalents to spend, instead of a number of epochs.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples a step.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Highest learning rate. Default: by data, model and method.")]
Optimizer = Annotated[str | None, choice(names.OPTIMIZERS, ". Default: sgd.")]
Decay = Annotated[float | None, typer.Option(help="Weight decay. Default: 0.0005.")]
ScheduleName = Annotated[str | None, choice(names.SCHEDULES, ". Default: one-cycle.")]
Seed = Annotated[int | None, typer.Option(help="Of weights, order, augmentation and directions. Default: 0.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: cpu.")]
DType = Annotated[str | None, choice(names.DTYPES, ". Default: float32.", "--dtype")]
Threads = Annotated[int | None, typer.Option(help="Threads of the CPU. Default: 1 for digits, all for images.")]
CosineEvery = Annotated[
    int | None, typer.Option(help="Steps between measurements of the cosine with backprop; 0: none.")
]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: an epoch's.")]
Log = Annotated[list[str] | None, choice(LOGS, ": keep the log like this, too. Repeatable.", "--log")]


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as fields of a names.TrainConfig."""
    fields = {name: value for name, value in values.items() if name in names.TrainConfig.__dataclass_fields__}
    given = {name: value for name, value in fields.items() if value is not None}
    if "data_dir" in given:
        given["data_dir"] = str(given["data_dir"])
    if given.get("tree", "").lstrip("-").isdigit():
        given["tree"] = int(given["tree"])
    return given


def listed(text: str) -> list[str]:
    """The parts of an option with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(option: str, text: str, between: str, kind: Callable[[str], float], such: str) -> tuple[float, ...]:
    """Two numbers in one option."""
    try:
        first, second = (kind(part) for part in text.replace("×", "x").split(between))
    except ValueError:
        raise InputError(f"expected --{option} to be two numbers, {such}, got {text!r}.") from None
    return first, second


def whole_from_one(text: str) -> int:
    """A number of processes; raises ValueError for any other number."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def whole_numbers(text: str) -> list[int]:
    """Seeds, with commas between."""
    parts = listed(text)
    if not all(part.isdigit() for part in parts):
        raise InputError(f"expected seeds to be whole numbers with commas between (0,1,2), got {text!r}.")
    return [int(part) for part in parts]

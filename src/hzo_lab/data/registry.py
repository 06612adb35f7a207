"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hzo.errors import InputError
from hzo_lab.data.cifar10 import load_cifar10
from hzo_lab.data.dataset import Dataset, Split
from hzo_lab.data.imagefolder import load_imagefolder
from hzo_lab.errors import DataError

DIGITS_TEST = 360  # of 1,797; the split is fixed, so that runs with different seeds are tested on the same digits


def digits(shape: tuple[int, ...] = (64,)) -> Dataset:
    """The 8 × 8 handwritten digits that come with scikit-learn: 1,437 to learn from, 360 to be tested on.

    Vectors, or of another ``shape``.
    """
    bunch = load_digits()
    values = bunch.data.astype(np.float32)
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=DIGITS_TEST, random_state=0, stratify=labels)

    def split(rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Split:
        stored = torch.from_numpy(values[rows]).reshape(-1, *shape)
        return Split(labels=torch.from_numpy(labels[rows]), fetch=lambda indices: stored[indices])

    # One mean and one deviation for all pixels. With one for each, the nearly empty pixels at the rim are
    # blown up and a stray mark there dwarfs the digit.
    mean, std = float(values[train].mean()), float(values[train].std())
    return Dataset(
        name="digits",
        train=split(train),
        test=split(test),
        classes=tuple(str(name) for name in bunch.target_names),
        shape=shape,
        mean=torch.tensor(mean),
        std=torch.tensor(std),
    )


@dataclass(frozen=True)
class DataSource:
    """A data set by name.

    Attributes:
        read: from the folder of its files, and the side of images where the files leave it open.
        shape: of an example; None where it is images of the side that one asks for.
        bundled: whether it needs no files; ``read`` then looks at no folder.
        recipe: settings of ``TrainConfig`` that suit it, where they differ from the defaults.
    """

    read: Callable[[Path, int], Dataset]
    shape: tuple[int, ...] | None
    bundled: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def shape_for(self, image_size: int) -> tuple[int, ...]:
        """The shape of an example, before any file is read."""
        return (3, image_size, image_size) if self.shape is None else self.shape


IMAGES = {"model": "cnn", "epochs": 20, "log_every": 20, "cosine_every": 200, "probe_size": 8}

DATA_SETS: dict[str, DataSource] = {
    "digits": DataSource(lambda *_: digits(), (64,), bundled=True),
    "cifar10": DataSource(lambda folder, _: load_cifar10(folder), (3, 32, 32), recipe={**IMAGES, "batch_size": 128}),
    "imagefolder": DataSource(load_imagefolder, None, recipe={**IMAGES, "batch_size": 64}),
    "digit-images": DataSource(lambda *_: digits((1, 8, 8)), (1, 8, 8), bundled=True, recipe={"model": "cnn"}),
}
"""All that takes, lists or completes names of data sets reads this table."""


def load(name: str, data_dir: Path | None = None, *, image_size: int = 64) -> Dataset:
    """The data set ``name``: the digits need nothing, the others the folder that their files are in."""
    if name not in DATA_SETS:
        raise InputError(f"expected data to be one of {', '.join(DATA_SETS)}, got {name!r}.")
    source = DATA_SETS[name]
    if source.bundled:
        return source.read(Path(), image_size)
    if data_dir is None:
        raise DataError(f"{name} is read from files of yours: say where they are with --data-dir DIR.")
    if not data_dir.exists():
        raise DataError(f"expected the files of {name} in {data_dir}, which does not exist: check --data-dir.")
    return source.read(data_dir, image_size)

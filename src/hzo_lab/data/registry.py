"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hzo.errors import InputError
from hzo_lab.data.cifar10 import load_cifar10
from hzo_lab.data.dataset import Dataset, Split
from hzo_lab.data.imagefolder import load_imagefolder
from hzo_lab.errors import DataError

BUNDLED: dict[str, tuple[int, ...]] = {"digits": (64,), "digit-images": (1, 8, 8)}  # by name, the shape of an example
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


def load(name: str, data_dir: Path | None = None, *, image_size: int = 64) -> Dataset:
    """The data set ``name``: the digits need nothing, the others the folder that their files are in."""
    if name in BUNDLED:
        return digits(BUNDLED[name])
    readers: dict[str, Callable[[Path], Dataset]] = {
        "cifar10": load_cifar10,
        "imagefolder": lambda folder: load_imagefolder(folder, image_size),
    }
    if name not in readers:
        raise InputError(f"expected data to be one of {', '.join([*BUNDLED, *readers])}, got {name!r}.")
    if data_dir is None:
        raise DataError(f"{name} is read from files of yours: say where they are with --data-dir DIR.")
    if not data_dir.exists():
        raise DataError(f"expected the files of {name} in {data_dir}, which does not exist: check --data-dir.")
    return readers[name](data_dir)

"""What the networks see: images of the user's data where they are given, else the digits of scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hzo_lab.data import Dataset, epoch_order, make_batch, registry
from hzo_lab.errors import DataError
from hzo_lab.paper.finding import Setting

CIFAR_FOLDER = "cifar-10-batches-py"
# Files that a copy of CIFAR-10 may come with: which of its images are not the original's, bit by bit.
INEXACT = {"train": "inexact_train_indices.npy", "test": "inexact_test_indices.npy"}


@dataclass(frozen=True)
class ImageSet:
    """A data set, and what a record must say of it."""

    dataset: Dataset
    name: str
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dataset.shape


def images(setting: Setting, *, flat: bool = False) -> ImageSet:
    """CIFAR-10 where ``setting.data_dir`` is given, else 8 × 8 digits; ``flat`` asks for the digits as vectors."""
    if setting.data_dir is not None and not flat:
        return ImageSet(registry.load("cifar10", setting.data_dir), "cifar10", notes_on_cifar(setting.data_dir))
    if flat:
        return ImageSet(registry.load("digits"), "digits")
    note = "On scikit-learn's digits (8 × 8), not on CIFAR-10, for which no --data-dir was given."
    return ImageSet(registry.load("digit-images"), "digit-images", (note,))


def first_batch(
    source: ImageSet, size: int, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The first examples of the training order of a seed."""
    split = source.dataset.train
    indices = epoch_order(len(split), seed, 0)[:size]
    return make_batch(source.dataset, split, indices, device=device, dtype=dtype)


def notes_on_cifar(data_dir: Path) -> tuple[str, ...]:
    """Which images of this copy are said not to be exact, by the index files beside it."""
    for folder in (data_dir, data_dir / CIFAR_FOLDER):
        paths = {split: folder / name for split, name in INEXACT.items()}
        if all(path.is_file() for path in paths.values()):
            try:
                indices = {split: np.load(path).reshape(-1).tolist() for split, path in paths.items()}
            except ValueError as error:
                raise DataError(
                    f"expected {folder} to name inexact images in NumPy files, they cannot be read: {error}"
                ) from error
            named = "; ".join(
                f"{len(found)} of the {split} split, {', '.join(map(str, found))}" for split, found in indices.items()
            )
            count = sum(map(len, indices.values()))
            return (f"This copy of CIFAR-10 holds {count} images that are not exact (decoded from JPEG): {named}.",)
    return ()


def imagenet_folder(data_dir: Path) -> Path:
    """The tree with ``train`` and ``val``: ``data_dir``, or the one folder in it that holds both.

    Raises:
        DataError: none, or more than one.
    """
    found = [f for f in (data_dir, *sorted(data_dir.glob("*/"))) if (f / "train").is_dir() and (f / "val").is_dir()]
    if found and found[0] == data_dir:
        return data_dir
    if len(found) != 1:
        names = ", ".join(f.name for f in found) or "none"
        raise DataError(
            f"expected in {data_dir} one folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg (ten ImageNet "
            f"classes), found {names}: give its path, or a folder that holds only this one, with --data-dir."
        )
    return found[0]

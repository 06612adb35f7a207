"""Trees of images: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, decoded when first used."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hzo_lab.data.dataset import Dataset, Split
from hzo_lab.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
TEST_NAMES = ("val", "test", "validation")
# ImageNet's own channel statistics, the ones that are customary for photographs.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CACHE_BYTES = 2 * 2**30  # decoded images of a split are kept in memory up to here, and decoded each time beyond


def load_imagefolder(data_dir: Path, size: int) -> Dataset:
    """Index the tree at ``data_dir``; of an image scaled to ``size`` at its short side, the middle is cut out."""
    train_dir = data_dir / "train"
    test_dir = next((data_dir / name for name in TEST_NAMES if (data_dir / name).is_dir()), data_dir / TEST_NAMES[0])
    for folder in (train_dir, test_dir):
        if not folder.is_dir():
            raise DataError(
                f"expected {folder} with one folder of images per class, it is missing: give with "
                "--data-dir a folder "
                "that holds train/CLASS/*.jpg and val/CLASS/*.jpg."
            )
    classes = _classes(train_dir)
    if (others := _classes(test_dir)) != classes:
        differing = sorted(set(classes).symmetric_difference(others))
        raise DataError(
            f"{train_dir} and {test_dir} must hold the same classes, but these are in one of them only: "
            f"{', '.join(differing[:8])}{' …' if len(differing) > 8 else ''}."
        )
    return Dataset(
        name="imagefolder",
        train=_split(train_dir, classes, size),
        test=_split(test_dir, classes, size),
        classes=classes,
        shape=(3, size, size),
        mean=255 * torch.tensor(MEAN).view(3, 1, 1),
        std=255 * torch.tensor(STD).view(3, 1, 1),
        pad=size // 8,
    )


def _classes(folder: Path) -> tuple[str, ...]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"expected at least two folders, one per class, in {folder}, found {len(names)}.")
    return tuple(names)


def _split(folder: Path, classes: tuple[str, ...], size: int) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        # Sorted: the order of a directory differs from machine to machine, the order of a run must not.
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not found:
            raise DataError(f"expected images ({', '.join(sorted(EXTENSIONS))}) in {folder / name}, found none.")
        paths += found
        labels += [label] * len(found)
    return Split(labels=torch.tensor(labels), fetch=_reader(paths, size))


def _reader(paths: list[Path], size: int) -> Callable[[Tensor], Tensor]:
    keep = len(paths) * 3 * size * size <= CACHE_BYTES
    # Pages of an empty array cost nothing until they are written: the cache fills as images are first used.
    cache = np.empty((len(paths) if keep else 0, 3, size, size), dtype=np.uint8)
    known = np.zeros(len(paths), dtype=bool)
    workers = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def fetch(indices: Tensor) -> Tensor:
        wanted = indices.numpy()
        if not keep:
            return torch.from_numpy(np.stack(list(workers.map(lambda i: decode_image(paths[i], size), wanted))))
        missing = wanted[~known[wanted]]
        for index, image in zip(missing, workers.map(lambda i: decode_image(paths[i], size), missing), strict=True):
            cache[index] = image
            known[index] = True
        return torch.from_numpy(cache[wanted])

    return fetch


def decode_image(path: Path, size: int) -> np.ndarray[Any, Any]:
    """One image file as (3, size, size) uint8."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG may be decoded at a fraction of its size
            picture = image.convert("RGB")
    # Pillow's decoders raise all of these on broken files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be decoded as an image: {error}. Replace it or take it out of the tree."
        ) from error
    width, height = picture.size
    scale = size / min(width, height)
    scaled = (max(size, round(width * scale)), max(size, round(height * scale)))
    if scaled != picture.size:
        picture = picture.resize(scaled, Image.Resampling.BILINEAR)  # antialiased when it shrinks
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))

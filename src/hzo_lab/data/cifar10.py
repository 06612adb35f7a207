"""CIFAR-10 as its makers pack it: ``cifar-10-batches-py``, six pickled dictionaries.

A pickle can run any code. These files need byte strings, lists, dictionaries and NumPy arrays, so that is
all the reader below constructs; whatever else a file names is an error, not a call.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from hzo_lab.data.dataset import Dataset, Split
from hzo_lab.errors import DataError

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILE = "test_batch"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = 3 * 32 * 32


def load_cifar10(data_dir: Path) -> Dataset:
    """Read the official Python archive, unpacked at ``data_dir`` or in a folder of it."""
    folder = find_cifar10(data_dir)
    parts = [_read_batch(folder / name) for name in TRAIN_FILES]
    train_images = np.concatenate([images for images, _ in parts])
    train_labels = np.concatenate([labels for _, labels in parts])
    test_images, test_labels = _read_batch(folder / TEST_FILE)
    mean, std = channel_statistics(train_images)
    return Dataset(
        name="cifar10",
        train=_split(train_images, train_labels),
        test=_split(test_images, test_labels),
        classes=CLASSES,
        shape=(3, 32, 32),
        mean=mean,
        std=std,
        pad=4,
    )


def channel_statistics(images: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, from counts: exact, and without a float copy of the set."""
    values = np.arange(256)
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].reshape(-1), minlength=256)
        share = counts / counts.sum()
        mean = float(share @ values)
        means.append(mean)
        deviations.append(max(float(share @ (values - mean) ** 2) ** 0.5, 1.0))
    return torch.tensor(means).view(-1, 1, 1), torch.tensor(deviations).view(-1, 1, 1)


def _split(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Split:
    stored = torch.from_numpy(images)
    return Split(labels=torch.from_numpy(labels), fetch=lambda indices: stored[indices])


def find_cifar10(data_dir: Path) -> Path:
    """The folder of the batch files: ``data_dir`` or one in it."""
    for folder in (data_dir, data_dir / FOLDER):
        if (folder / TEST_FILE).is_file() or (folder / TRAIN_FILES[0]).is_file():
            return folder
    packed = next((p for p in (data_dir / "cifar-10-python.tar.gz", data_dir) if p.name.endswith(".tar.gz")), None)
    hint = (
        f"unpack {packed} first (tar -xzf)"
        if packed is not None and packed.is_file()
        else "get cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, unpack "
        "it, and give "
        "its folder with --data-dir"
    )
    raise DataError(f"expected CIFAR-10's files ({FOLDER}/{TRAIN_FILES[0]} …) in {data_dir}, found none: {hint}.")


def _read_batch(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one batch file."""
    entry = _unpickle(path)
    if not isinstance(entry, dict) or b"data" not in entry or b"labels" not in entry:
        _foreign(path, "a dictionary with b'data' and b'labels'", type(entry).__name__)
    data, labels = entry[b"data"], entry[b"labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        came = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        _foreign(path, f"b'data' as uint8 of shape (n, {PIXELS})", came)
    try:
        targets = np.asarray(labels, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        _foreign(path, "b'labels' as a list of whole numbers", f"a {type(labels).__name__} of something else")
    if targets.shape != (len(data),) or len(data) == 0:
        _foreign(path, f"one label for each of {len(data)} images", f"labels of shape {targets.shape}")
    if targets.min() < 0 or targets.max() >= len(CLASSES):
        _foreign(path, "labels from 0 to 9", f"labels from {targets.min()} to {targets.max()}")
    return np.ascontiguousarray(data).reshape(-1, 3, 32, 32), targets


def _foreign(path: Path, expected: str, came: str) -> NoReturn:
    raise DataError(
        f"{path} is not a batch file of CIFAR-10 (Python version): expected {expected}, found {came}. "
        "Unpack the archive again."
    )


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """What pickles of protocol 2 rebuild byte strings with; the general ``codecs.encode`` does far more."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"an encoding {encoding!r}")
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    arrays = np.zeros(1, dtype=np.uint8)
    rebuild: Callable[..., Any] = arrays.__reduce__()[0]  # type: ignore[assignment]  # public way to numpy's rebuilder
    frombuffer: Callable[..., Any] = arrays.__reduce_ex__(5)[0]  # type: ignore[assignment]
    scalar: Callable[..., Any] = np.int64(0).__reduce__()[0]  # type: ignore[assignment]
    table: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }
    for package in ("numpy.core", "numpy._core"):  # the name before and since NumPy 2
        table[f"{package}.multiarray", "_reconstruct"] = rebuild
        table[f"{package}.multiarray", "scalar"] = scalar
        table[f"{package}.numeric", "_frombuffer"] = frombuffer
    return table


class _DataUnpickler(pickle.Unpickler):
    """Reads bytes, numbers, lists, dictionaries and NumPy arrays, and refuses to construct anything else."""

    allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no data file needs") from None


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _DataUnpickler(file, encoding="bytes").load()
    except FileNotFoundError:
        raise DataError(f"expected {path}, it is missing: unpack CIFAR-10's Python archive again.") from None
    except MemoryError:
        raise
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check the disk and its permissions."
        ) from error
    except Exception as error:  # a broken pickle raises nearly anything: EOFError, KeyError, ValueError, ...
        raise DataError(
            f"{path} is truncated or not a batch file of CIFAR-10 (Python version): "
            f"{error or type(error).__name__}. "
            "Unpack the archive again."
        ) from error

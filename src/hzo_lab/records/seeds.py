"""Random numbers of a run: every stream has a seed of its own, and states can be saved and put back.

Order and augmentation are functions of (seed, epoch, batch) and hold no state, so a run resumes in the
middle of an epoch without replaying it. The global generators are saved and restored for what models and
estimators draw from them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hzo._seeds import derive


def generator(seed: int, *labels: object) -> torch.Generator:
    """A CPU generator for one stream: the same numbers whatever device the run is on."""
    return torch.Generator().manual_seed(derive(seed, *labels))


def seed_everything(seed: int) -> None:
    """Seed the global generators that a model (dropout) or an estimator (random directions) may draw from."""
    torch.manual_seed(derive(seed, "torch"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    random.seed(derive(seed, "python"))


def generator_states() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """States of the global generators: (tensors, values that JSON can hold)."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng.cuda.{index}"] = state
    name, keys, position, has_gauss, gauss = np.random.get_state()  # the legacy tuple: plain data, no pickle
    tensors["rng.numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, internal, gauss_next = random.getstate()
    values = {
        "numpy": [name, int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }
    return tensors, values


def restore_generators(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Put the global generators back as ``generator_states`` found them."""
    torch.set_rng_state(tensors["rng.torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if (state := tensors.get(f"rng.cuda.{index}")) is not None:
                torch.cuda.set_rng_state(state, index)
    name, position, has_gauss, gauss = values["numpy"]
    keys = tensors["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))
    version, internal, gauss_next = values["python"]
    random.setstate((version, tuple(internal), gauss_next))


@contextmanager
def separate_random_numbers(seed: int) -> Iterator[None]:
    """Run the block with seeded global generators and put the run's own back afterwards."""
    tensors, values = generator_states()
    try:
        seed_everything(seed)
        yield
    finally:
        restore_generators(tensors, values)

"""Labelled examples in memory or on disk, their order, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hzo_lab.records import generator


@dataclass(frozen=True)
class Split:
    """Examples of one split: ``fetch(indices)`` gives the raw ones, stacked, as they lie in the files."""

    labels: Tensor
    fetch: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set for classification.

    Attributes:
        shape: of one example, without the batch.
        mean, std: of the raw values, broadcastable over an example; inputs are ``(raw - mean) / std``.
        pad: pixels that a random crop may shift an image by; 0 where shifts and flips make no sense.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: Tensor
    std: Tensor
    pad: int = 0


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of the examples in an epoch: a function of (seed, epoch), the same for every method."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def crop_and_flip(images: Tensor, pad: int, random: torch.Generator) -> Tensor:
    """Shift each image by up to ``pad`` pixels (black comes in at the edge) and mirror half of them.

    Numbers are drawn on the CPU, so that the images are the same on any device.
    """
    count, _, height, width = images.shape
    top = torch.randint(0, 2 * pad + 1, (count, 1), generator=random)
    left = torch.randint(0, 2 * pad + 1, (count, 1), generator=random)
    mirrored = torch.randint(0, 2, (count, 1), generator=random).bool()
    rows = (top + torch.arange(height)).to(images.device)
    columns = torch.arange(width).expand(count, width)
    columns = (left + torch.where(mirrored, columns.flip(1), columns)).to(images.device)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    every = torch.arange(count, device=images.device)
    picked = padded[every[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def make_batch(
    data: Dataset,
    split: Split,
    indices: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    augment: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalised inputs and labels; shifted and mirrored at random where ``augment`` is given."""
    raw = split.fetch(indices).to(device)
    if augment is not None and data.pad:
        raw = crop_and_flip(raw, data.pad, augment)
    # Normalised in float32 whatever the dtype of the run: bfloat16 cannot hold all of 0..255.
    inputs = (raw.float() - data.mean.to(device)) / data.std.to(device)
    return inputs.to(dtype), split.labels[indices].to(device)


def batch_indices(count: int, batch_size: int, seed: int, epoch: int, position: int) -> Tensor:
    """Which examples make up batch ``position`` of an epoch.

    An incomplete last batch is left out: every step then costs the same, and no batch is too small for batch
    statistics. The order changes from epoch to epoch, so all examples take part.
    """
    return epoch_order(count, seed, epoch)[position * batch_size : (position + 1) * batch_size]


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in an epoch; one short batch where the data are fewer than that."""
    return max(1, count // batch_size)

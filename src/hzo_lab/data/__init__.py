"""Data sets, as tensors of one kind."""

from hzo_lab.data.cifar10 import find_cifar10
from hzo_lab.data.dataset import Dataset, Split, batch_indices, batches_per_epoch, epoch_order, make_batch
from hzo_lab.data.registry import DATA_SETS, digits

__all__ = [
    "DATA_SETS",
    "Dataset",
    "Split",
    "batch_indices",
    "batches_per_epoch",
    "digits",
    "epoch_order",
    "find_cifar10",
    "make_batch",
]

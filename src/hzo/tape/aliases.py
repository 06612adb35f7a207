"""What in-place code on views means without side effects: three functions between a storage's content and its windows.

A tape is in single-assignment form. Where several tensors share memory and one of them is written to, the content of
the storage becomes a value of its own, one-dimensional: ``write_window`` puts what was written into it, and a tensor
that is read later is a ``read_window`` of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]
"""Size, stride and offset of a window, in elements."""


def geometry_of(tensor: Tensor) -> Geometry:
    """Where in its storage a tensor lies."""
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def read_window(content: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """A copy of the elements that a window of a storage shows."""
    return content.as_strided(size, stride, offset).clone()


def write_window(content: Tensor, window: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """The content of a storage after a window of it was replaced."""
    result = content.clone()
    result.as_strided(size, stride, offset).copy_(window)
    return result


def pass_through(old: Tensor, new: Tensor) -> Tensor:  # noqa: ARG001
    """``new`` as the value, with ``old`` as its path: what a write under ``no_grad`` does for autograd."""
    return new.clone()


def constant_content(size: int, like: Tensor) -> Tensor:
    """The content of a storage in which nothing carries a gradient yet."""
    return torch.zeros(size, dtype=like.dtype, device=like.device)

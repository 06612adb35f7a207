"""Whole float32 while differences are taken: what a device rounds away, no difference can see."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

# By kind: how PyTorch's older switch is read and written, what it is for whole float32, and the newer ones beside it,
# whose values round operands of float32 to 11 bits ("tf32") or 8 ("bf16").
_cudnn: Any = torch.backends.cudnn
_mkldnn: Any = torch.backends.mkldnn  # PyTorch's types do not know all of their members
_cuda: Any = torch.backends.cuda
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], None], Any, tuple[Any, ...]], ...] = (
    (
        lambda: _cudnn.allow_tf32,
        lambda value: setattr(_cudnn, "allow_tf32", value),
        False,
        (_cudnn.conv, _cudnn.rnn),
    ),
    (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "highest",
        (_cuda.matmul, _mkldnn.matmul),
    ),
)
_WITHOUT_A_SWITCH = (_mkldnn.conv, _mkldnn.rnn)
_UNITS = {"tf32": 2.0**-10, "bf16": 2.0**-7}

_lock = threading.Lock()
_inside: list[None] = []  # one for each that is inside
_put_back: list[Callable[[], None]] = []


def coarsest_product() -> float:
    """The relative rounding of what float32 products and convolutions read, as the settings are now; 0 for none."""
    return max(_UNITS.get(kernel.fp32_precision, 0.0) for kernel in _kernels())


@contextmanager
def full_float32(wanted: bool = True) -> Iterator[None]:
    """Inside, float32 products, convolutions and recurrent layers are not rounded to TF32 or bfloat16.

    PyTorch lets cuDNN round what a convolution reads to TF32, 11 bits, unless told otherwise: of the steps that
    differences take in float32, few of those bits would be left, or none. The settings are of the whole process;
    several threads may be inside at once, the last one puts them back.

    Args:
        wanted: False changes nothing.
    """
    if not wanted:
        yield
        return
    with _lock:
        if not _inside:
            _lower()
        _inside.append(None)
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            while not _inside and _put_back:
                _put_back.pop()()


def _lower() -> None:
    for read, write, whole, kernels in _SWITCHES:
        before = [kernel.fp32_precision for kernel in kernels]
        try:
            switch = read()
        except RuntimeError:  # whoever has set the newer ones apart from each other cannot ask for the older one
            continue
        if switch == whole and all(value not in _UNITS for value in before):
            continue
        write(whole)
        for kernel, value in zip(kernels, before, strict=True):
            _put_back.append(partial(setattr, kernel, "fp32_precision", value))
        _put_back.append(partial(write, switch))  # the first that is put back: it writes to the newer ones
    for kernel in _kernels():
        if (value := kernel.fp32_precision) in _UNITS:
            kernel.fp32_precision = "ieee"
            _put_back.append(partial(setattr, kernel, "fp32_precision", value))


def _kernels() -> list[Any]:
    return [*_WITHOUT_A_SWITCH, *(kernel for *_, both in _SWITCHES for kernel in both)]

"""Libraries of the zoo are imported by name, when a family asks for them.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch of the same version its Python part works, but its
import asks for two operators of the compiled part, which cannot be loaded there. They are declared here, without
kernels: no model of the zoo calls them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from hzo_lab.zoo.case import NotBuiltError

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # an operator lives as long as the object that declared it


def library(name: str) -> Any:
    """The module of this name. Raises NotBuiltError where it is not installed."""
    _declare_operators()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        raise NotBuiltError(f"{missing.name} is not installed; scripts/zoo.sh installs what the zoo needs") from missing


def _declare_operators() -> None:
    if _declared or importlib.util.find_spec("torchvision") is None:
        return
    lib = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _declared.append(lib)
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in ("nms", "qnms"):
            lib.define(name + _SIGNATURE)  # type: ignore[no-untyped-call]

"""Where a number comes from: versions and hardware, kept beside every result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, machine and device of this process."""
    device = device or torch.device("cpu")
    try:
        own = version("hzo")
    except PackageNotFoundError:  # run from a source tree that was not installed
        own = "not installed"
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {
        "hzo": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
    }

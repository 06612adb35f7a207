"""Where a number comes from: code, versions and hardware, kept beside every result."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import hzo


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Commit, versions, machine and device of this process."""
    device = device or torch.device("cpu")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "hzo": hzo.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "hardware": hardware,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@cache
def commit() -> str | None:
    """The commit of the checkout that this code is run from, with a "+" where its files differ from it; None outside of
    one. Asked for once: what the checkout holds when a long run ends says nothing about what ran."""
    here = Path(__file__).parents[1]  # the package; of what else lies in the checkout only hzo beside it runs

    def git(*words: str) -> str | None:
        try:
            said = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return said.stdout.strip()

    # A package that lies inside someone else's repository (a virtual environment, say) is not that repository's code.
    head = git("rev-parse", "HEAD") if git("ls-files", "--", "__init__.py") else None
    return None if head is None else head + ("+" if git("status", "--porcelain", "--", ".", "../hzo") else "")


def processor() -> str:
    """The name of the processor, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, None) or platform.processor() or platform.machine()

"""How a benchmark writes its result: beside the numbers, what they depend on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hzo_lab.records import environment


def write(out: Path, device: torch.device | None = None, **content: Any) -> None:
    """JSON with command, commit, versions and hardware; the device is the CPU where none is given."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "environment": environment(device or torch.device("cpu")),
        **content,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

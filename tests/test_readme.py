"""The training loop of the README runs as written, and is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_first_code_block_trains(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    lines = [line for line in block.splitlines() if line.strip()]
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert len(lines) <= 15
    assert float(printed.split()[-1]) < 0.2

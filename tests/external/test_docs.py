"""The page on black boxes starts with a script that runs, and its calls are calls that there are."""

import re
from pathlib import Path

import pytest
import torch

import hzo

PAGE = (Path(__file__).parents[2] / "docs" / "blackbox.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_the_first_script_runs(capsys):
    scope = {}
    exec(compile(BLOCKS[0], "docs/blackbox.md", "exec"), scope)
    assert "512 queries in 3 calls" in capsys.readouterr().out
    assert scope["model"][0].weight.grad.any()


@pytest.mark.parametrize("line", [line for block in BLOCKS[1:] for line in block.splitlines() if "blackbox(f" in line])
def test_options_are_there(line):
    assert isinstance(eval(line.split("#")[0].strip(), {"hzo": hzo, "torch": torch, "f": torch.sin}), hzo.BlackBox)

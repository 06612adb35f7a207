"""Each example of examples/distributed/ on two processes ends in the weights that autograd alone would give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples" / "distributed").glob("with_*.py"))


def torchrun(*arguments, limit=150):
    """Two processes on this machine; their output where they fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    folders = [str(ROOT / "src"), str(ROOT / "examples" / "distributed"), os.environ.get("PYTHONPATH", "")]
    paths = os.pathsep.join(folders)
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit, env=os.environ | quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_five():
    assert EXAMPLES == ["with_accelerate", "with_ddp", "with_fsdp2", "with_lightning", "with_trainer"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_weights_are_those_of_backprop(name, tmp_path):
    torchrun(str(ROOT / "tests_ranks" / "compare.py"), name, str(tmp_path))
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert len(reports) == 2
    for report in reports:
        assert report["ranks"] == 2
        assert report["queries"] > 0, "hzo was not asked"
        assert report["moved"] > 0.01, "nothing was learned"
        assert report["to backprop"] <= 1e-5
        assert report["to rank 0"] == 0


def test_as_its_command_says():
    out = torchrun(str(ROOT / "examples" / "distributed" / "with_ddp.py"))
    assert out.count("% of the training digits") == 2

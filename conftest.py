"""Every Python snippet of README and docs runs as it is written: sh scripts/docs.sh, or pytest README.md docs.

Snippets of one page run in order and share their names, as a reader would type them.
"""

import os

import pytest

sybil = pytest.importorskip("sybil", reason="snippets of README and docs need the extra docs")

from sybil import Sybil  # noqa: E402
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser  # noqa: E402


def setup(namespace):  # noqa: ARG001  # sybil hands it over
    """Each page starts where a newcomer does: the same random numbers, and few threads."""
    import torch  # noqa: PLC0415

    os.environ.setdefault("TQDM_DISABLE", "1")
    torch.manual_seed(0)
    torch.set_num_threads(1)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md"], setup=setup, excludes=["CHANGELOG.md"]
).pytest()

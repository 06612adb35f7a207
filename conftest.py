"""Every Python snippet of README and docs runs as it is written: sh scripts/docs.sh, or pytest README.md docs.

Snippets of one page run in order and share their names, as a reader would type them. Without the extra
``docs`` none is found.
"""

import os

import torch

try:
    from sybil import Sybil
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
except ModuleNotFoundError:  # the tests themselves do not need it
    Sybil = None


def setup(namespace):  # noqa: ARG001  # sybil hands it over
    """Each page starts where a newcomer does: the same random numbers, and few threads."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    torch.manual_seed(0)
    torch.set_num_threads(1)


if Sybil is not None:
    pytest_collect_file = Sybil(
        parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md"], setup=setup, excludes=["CHANGELOG.md"]
    ).pytest()

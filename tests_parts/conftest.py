"""The examples and experiments that are tested here are scripts: they find each other beside themselves."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "experiments")]

"""The command ``hzo``: runs, or says what to install where the parts that it needs are missing."""

from __future__ import annotations

import importlib
import sys

from hzo import __version__

# Import names of what the extra "train" brings.
_EXTRA = {"typer", "rich", "numpy", "matplotlib", "safetensors", "sklearn", "PIL", "filelock"}


def main() -> None:
    """Run the command line; the console script and ``python -m hzo`` enter here."""
    try:
        commands = importlib.import_module("hzo_lab.cli.commands")
        for name in ("reproduce_command", "zoo_command"):  # each adds itself
            importlib.import_module(f"hzo_lab.cli.{name}")
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        if sys.argv[1:] == ["--version"]:
            print(f"hzo {__version__}")
            sys.exit()
        print(
            f'The command line needs {package}, which is not installed. Run: pip install "hzo[train]"',
            file=sys.stderr,
        )
        sys.exit(2)
    commands.run()

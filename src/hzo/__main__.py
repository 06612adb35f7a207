"""``python -m hzo``."""

from hzo.cli import main

main()

"""``python -m hzo``."""

from hzo_lab.cli.main import main

main()

"""``python -m hzo_lab``."""

from hzo_lab.cli.main import main

main()

"""``python -m hzo_lab.zoo``."""

import sys

from hzo_lab.zoo.command import main

sys.exit(main())

"""A simulator in a process of its own as a layer: an optical interferometer whose phases a network sets.

The simulator (interferometer.py) is a NumPy program that knows nothing of PyTorch; it may be written in any language.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import hzo
from digits import compare, last_layer_only, options
from interferometer import MODES, PHASES

COMMAND = [sys.executable, str(Path(__file__).with_name("interferometer.py"))]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    optics = hzo.blackbox(hzo.simulator(COMMAND), numpy=True)
    return nn.Sequential(nn.Linear(64, PHASES), optics, nn.Linear(MODES, 10))


def main() -> None:
    given = options(__doc__)
    models = {"hzo": network(given.seed), "last layer only": last_layer_only(network(given.seed))}
    compare(models, epochs=20, lr=1e-2, given=given)


if __name__ == "__main__":
    main()

"""A photonic simulator: a program that reads phases on stdin and writes the intensities that detectors see to stdout.

A mesh of Mach–Zehnder interferometers on eight waveguides, light entering by all of them. Arrays go through the pipes
in NumPy's own format (.npy), one after the other; the program ends with its input.
"""

import sys
from types import SimpleNamespace

import numpy as np

MODES, LAYERS = 8, 8
PHASES = sum((MODES - layer % 2) // 2 for layer in range(LAYERS))
COUPLER = np.array([[1, 1j], [1j, 1]]) / np.sqrt(2)


def intensities(phases: np.ndarray) -> np.ndarray:
    """(batch, PHASES) -> (batch, MODES). An interferometer is a coupler, a phase on one arm, and a coupler."""
    fields = np.full((len(phases), MODES), 1 / np.sqrt(MODES), complex)
    used = 0
    for layer in range(LAYERS):
        for first in range(layer % 2, MODES - 1, 2):
            pair = fields[:, first : first + 2] @ COUPLER
            pair[:, 0] *= np.exp(1j * phases[:, used])
            fields[:, first : first + 2] = pair @ COUPLER
            used += 1
    return np.abs(fields) ** 2


def main() -> None:
    # Bare streams: NumPy would take the pipes for files on disk and look for a position in them.
    reader, writer = SimpleNamespace(read=sys.stdin.buffer.read), SimpleNamespace(write=sys.stdout.buffer.write)
    while sys.stdin.buffer.peek(1):
        phases = np.lib.format.read_array(reader)
        np.lib.format.write_array(writer, intensities(phases).astype(phases.dtype))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

"""A photonic circuit as a layer: two photons in four waveguides, simulated by Perceval with the noise of a real chip.

A linear layer sets the phases of five interferometers; Perceval loses photons, tells them partly apart, and counts 200
coincidences; a linear layer reads how often they left by which waveguides. How noisy counts are is known, and how long
a step a phase takes. Perceval simulates a sample after the other, for milliseconds each: queries are what it costs.
"""

from collections import Counter

import numpy as np
import torch
from perceval import BS, PS, BasicState, Circuit, NoiseModel, P, Processor
from torch import nn

import hzo
from digits import compare, last_layer_only, options

MODES, LAYERS, PAIRS, CLASSES = 4, 3, 200, 3
NOISE = NoiseModel(brightness=0.9, indistinguishability=0.92, transmittance=0.7)
OUTCOMES = [BasicState([(k == a) + (k == b) for k in range(MODES)]) for a in range(MODES) for b in range(a, MODES)]

chip = Circuit(MODES)
for layer in range(LAYERS):
    for mode in range(layer % 2, MODES - 1, 2):
        chip.add(mode, BS()).add(mode, PS(P(f"phase {layer} {mode}"))).add(mode, BS())
processor = Processor("SLOS", chip, noise=NOISE)
processor.min_detected_photons_filter(2)
processor.with_input(BasicState([1, 0, 1, 0]))


def counts(phases: np.ndarray) -> np.ndarray:
    """(samples, phases) -> (samples, OUTCOMES): shares of each pair of waveguides, in units of their mean."""
    found = np.empty((len(phases), len(OUTCOMES)))
    for row, sample in zip(found, phases, strict=True):
        for phase, value in zip(chip.get_parameters(), sample, strict=True):
            phase.set_value(float(value))
        pairs = Counter(processor.samples(PAIRS)["results"])
        row[:] = [len(OUTCOMES) * pairs[outcome] / PAIRS for outcome in OUTCOMES]
    return found


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    noise = hzo.Noise(readout=(len(OUTCOMES) / PAIRS) ** 0.5)  # Poisson's, of a share that is one
    layer = hzo.blackbox(counts, numpy=True, state=None, noise=noise, step=0.5)  # long for noise, short for a sine
    return nn.Sequential(nn.Linear(64, len(chip.get_parameters())), layer, nn.Linear(len(OUTCOMES), 10))


def main() -> None:
    given = options(__doc__)
    models = {"hzo": network(given.seed), "last layer only": last_layer_only(network(given.seed))}
    compare(models, epochs=3, lr=3e-2, given=given, classes=CLASSES)


if __name__ == "__main__":
    main()

"""An analog electronic circuit as a layer, simulated by ngspice: pairs of transistors behind a resistor network.

A linear layer sets four input voltages, resistors mix them into the bases of four differential pairs, whose outputs
load each other, and a linear layer reads the eight collectors. One run of ngspice finds the operating points of
sixteen samples: the circuit stands in the netlist once for each. Nothing is known of it: inputs are moved one by one.
"""

import subprocess

import numpy as np
import torch
from torch import nn

import hzo
from digits import compare, last_layer_only, options

INPUTS, PAIRS, BATCH, CLASSES = 4, 4, 16, 3
RESISTORS = np.random.default_rng(0).uniform(1e3, 2e4, (PAIRS, 2, INPUTS))
SUBCIRCUIT = "\n".join(
    [f".subckt layer {' '.join(f'i{k}' for k in range(INPUTS))} {' '.join(f'p{k} n{k}' for k in range(PAIRS))} vcc"]
    + [f"r{p}{s}{k} i{k} b{p}{s} {RESISTORS[p, s, k]:.6g}" for p in range(PAIRS) for s in (0, 1) for k in range(INPUTS)]
    + [f"rl{p}{s} b{p}{s} 0 3k" for p in range(PAIRS) for s in (0, 1)]
    + [f"q{p}0 p{p} b{p}0 e{p} npn\nq{p}1 n{p} b{p}1 e{p} npn\nie{p} e{p} 0 1m" for p in range(PAIRS)]
    + [f"rp{p} vcc p{p} 2k\nrn{p} vcc n{p} 2k\nrx{p} p{p} n{(p + 1) % PAIRS} 10k" for p in range(PAIRS)]
    + [".ends", ".model npn npn(is=1e-15 bf=100 vaf=50)", ".options reltol=1e-6", "vcc vcc 0 5"]
)


def operating_points(voltages: np.ndarray) -> np.ndarray:
    """(samples, INPUTS) volts -> (samples, 2 PAIRS) volts around the mean of the collectors."""
    lines = ["layer", SUBCIRCUIT]
    for b, sample in enumerate(voltages):
        lines += [f"v{b}_{k} i{b}_{k} 0 {float(v):.12g}" for k, v in enumerate(sample)]
        inputs, outputs = (
            " ".join(f"{name}{b}_{k}" for k in range(n)) for name, n in (("i", INPUTS), ("o", 2 * PAIRS))
        )
        lines.append(f"x{b} {inputs} {outputs} vcc layer")
    names = [f"v(o{b}_{k})" for b in range(len(voltages)) for k in range(2 * PAIRS)]
    lines += [".control", "set numdgt=12", "op", *(f"print {name}" for name in names), ".endc", ".end"]
    run = subprocess.run(
        ["ngspice", "-b", "/dev/stdin"], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    found = dict(line.split(" = ") for line in run.stdout.splitlines() if line.startswith("v(o"))
    return np.array([float(found[name]) for name in names]).reshape(len(voltages), -1) - 4.0


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    circuit = hzo.blackbox(operating_points, numpy=True, batched=BATCH)
    return nn.Sequential(nn.Linear(64, INPUTS), circuit, nn.Linear(2 * PAIRS, 10))


def main() -> None:
    given = options(__doc__)
    models = {"hzo": network(given.seed), "last layer only": last_layer_only(network(given.seed))}
    compare(models, epochs=10, lr=3e-2, given=given, classes=CLASSES)


if __name__ == "__main__":
    main()

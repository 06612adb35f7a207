"""Hodgkin–Huxley neurons as the hidden layer of a network, simulated by NEURON.

A linear layer sets the current into each membrane, NEURON solves its four differential equations for ten milliseconds,
a linear layer reads the mean potentials. A neuron sees no other one's current, so a backward pass asks for all of them
at once: two queries. Where a neuron begins to spike its slope is a needle; that over a finite width trains better.
"""

import numpy as np
import torch
from neuron import h
from torch import nn

import hzo
from digits import compare, last_layer_only, options

NEURONS, BATCH, MILLISECONDS, TICK = 12, 64, 10.0, 0.05
CURRENT, CENTRE, SPREAD = 0.01, -55.0, 10.0  # nA for an input of one (10 μA/cm²); mV of outputs 0 and 1
STEP = 0.1  # of the query, in units of CURRENT


h.usetable_hh, h.dt, h.celsius = 0, TICK, 6.3  # rates computed, not looked up in a table
membranes = [h.Section(name=f"membrane_{k}") for k in range(BATCH * NEURONS)]
electrodes, voltages = [h.IClamp(membrane(0.5)) for membrane in membranes], h.PtrVector(len(membranes))
for k, (membrane, electrode) in enumerate(zip(membranes, electrodes, strict=True)):
    membrane.L = membrane.diam = np.sqrt(100 / np.pi)  # 100 μm²
    membrane.insert("hh")
    electrode.dur = 1e9
    voltages.pset(k, membrane(0.5)._ref_v)


def potentials(drive: np.ndarray) -> np.ndarray:
    """(BATCH, NEURONS) currents -> mean potentials."""
    for electrode, current in zip(electrodes, drive.flat, strict=True):
        electrode.amp = CURRENT * float(current)
    h.finitialize(-65)
    now, total, ticks = h.Vector(drive.size), np.zeros(drive.size), int(MILLISECONDS / TICK)
    for _ in range(ticks):
        h.fadvance()
        voltages.gather(now)
        total += now.as_numpy()
    return (total.reshape(drive.shape) / ticks - CENTRE) / SPREAD


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layer = hzo.blackbox(potentials, numpy=True, elementwise=True, batched=BATCH, state=None, step=STEP)
    return nn.Sequential(nn.Linear(64, NEURONS), layer, nn.Linear(NEURONS, 10))


def main() -> None:
    given = options(__doc__)
    models = {"hzo": network(given.seed), "last layer only": last_layer_only(network(given.seed))}
    compare(models, epochs=10, lr=2e-2, given=given)


if __name__ == "__main__":
    main()

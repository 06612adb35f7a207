"""A spiking network of snnTorch's neurons, trained through time without a surrogate gradient.

A spike has no derivative, and usually a made-up one takes its place in the backward pass. Here the neuron as it is, its
reset included, is a black box: the backward pass asks it what happens at one threshold more and at one less.
"""

import snntorch as snn
import torch
from torch import Tensor, nn

import hzo
from digits import compare, last_layer_only, options

HIDDEN, STEPS, DECAY = 64, 10, 0.9
STEP = 1.0  # of the query, in thresholds


def neurons(how: str) -> nn.Module:
    """(current, membrane) -> (spike, membrane), each neuron for itself."""
    if how == "hzo":
        return hzo.blackbox(snn.Leaky(DECAY, surrogate_disable=True), elementwise=True, step=STEP)
    return snn.Leaky(DECAY, spike_grad=snn.surrogate.atan() if how == "atan" else snn.surrogate.fast_sigmoid())


class Spiking(nn.Module):
    """Two layers of neurons, driven by the same pixels at every step; a linear layer reads their rates of spikes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.synapses = nn.ModuleList([nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, HIDDEN)])
        self.neurons = nn.ModuleList([neurons(how), neurons(how)])
        self.readout = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        membranes = [x.new_zeros(len(x), HIDDEN) for _ in self.neurons]
        total = x.new_zeros(len(x), HIDDEN)
        for _ in range(STEPS):
            spikes = x
            for k, (synapses, fire) in enumerate(zip(self.synapses, self.neurons, strict=True)):
                spikes, membranes[k] = fire(synapses(spikes), membranes[k])
            total = total + spikes
        return self.readout(total / STEPS)


def network(how: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Spiking(how)


def main() -> None:
    given = options(__doc__)
    models = {how: network(how, given.seed) for how in ("hzo", "atan", "fast sigmoid")}
    models["last layer only"] = last_layer_only(network("hzo", given.seed))
    compare(models, epochs=20, lr=1e-2, given=given)


if __name__ == "__main__":
    main()

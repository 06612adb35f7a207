"""Hodgkin–Huxley neurons: the gradient of a black box around NEURON beside the derivative of Jaxley, another simulator.

    pip install jaxley
    PYTHONPATH=examples python experiments/jaxley_neurons.py    # writes results/blackbox/jaxley_neurons.json

Jaxley (Deistler et al.) solves the same equations, in JAX, and differentiates them. Its neuron is given the membrane,
channels and currents of examples/hodgkin_huxley.py, and takes steps of the same length by the same scheme. Compared are
the gradients of the layer in front of the neurons, on digits, in networks as they are made and after one epoch:
``forward`` is the largest difference of a potential, in the units of the network's outputs (10 mV); ``cosine`` that of
the gradients with a step short enough for the onset of spikes, where the derivative is a needle; ``own_cosine`` with
the step that hzo takes by itself, of which it warns there; ``wide_cosine`` with the one that the example trains with.
"""

import json
import statistics
from importlib.metadata import version
from typing import Any

import jax
import jaxley
import numpy as np
import torch
from jaxley.channels import HH
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import digits
import hodgkin_huxley as neuron
import hzo
from common import RESULTS, cosine
from hzo_lab.records import commit

jax.config.update("jax_enable_x64", True)
OUT, SEEDS, BATCHES = RESULTS.parent / "blackbox" / "jaxley_neurons.json", range(3), 2
STEPS = {"exact": 1e-5, "own": None}
TICKS = int(neuron.MILLISECONDS / neuron.TICK)

membrane = jaxley.Compartment()
membrane.insert(HH())
side = float(np.sqrt(100 / np.pi))  # 100 μm²
for key, value in {"radius": side / 2, "length": side, "v": -65.0}.items():
    membrane.set(key, value)
membrane.init_states(delta_t=neuron.TICK)
membrane.record("v", verbose=False)


def mean_potential(drive: jax.Array) -> jax.Array:
    """Of one neuron, as ``hodgkin_huxley.potentials``."""
    current = membrane.data_stimulate(jax.numpy.full(TICKS, neuron.CURRENT * drive))
    (volts,) = jaxley.integrate(membrane, data_stimuli=current, delta_t=neuron.TICK, solver="bwd_euler")
    return (volts[1 : 1 + TICKS].mean() - neuron.CENTRE) / neuron.SPREAD


both = jax.jit(jax.vmap(jax.value_and_grad(mean_potential)))


class _Jaxley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, drive: Tensor) -> Tensor:
        values, slopes = (np.asarray(t).reshape(drive.shape) for t in both(drive.double().flatten().numpy()))
        ctx.save_for_backward(torch.tensor(slopes))
        return torch.tensor(values).to(drive.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (slopes,) = ctx.saved_tensors
        return (g.double() * slopes).to(g.dtype)


class Jaxley(nn.Module):
    def forward(self, drive: Tensor) -> Tensor:
        found: Tensor = _Jaxley.apply(drive)
        return found


def before_part(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    model.zero_grad()
    digits.autograd(model, cross_entropy, *batch)
    return torch.cat([p.grad.flatten() for p in model[0].parameters()])


def compared(seed: int, epochs: int) -> list[dict[str, float]]:
    """For some batches what the simulators say of one network."""
    trained = digits.train(neuron.network(seed), epochs, 2e-2, seed=seed)
    options = {"numpy": True, "elementwise": True, "batched": neuron.BATCH, "state": None}
    boxes = {name: hzo.blackbox(neuron.potentials, step=step, **options) for name, step in STEPS.items()}
    parts = boxes | {"wide": trained[1], "jaxley": Jaxley()}
    models = {name: nn.Sequential(trained[0], part, trained[2]) for name, part in parts.items()}
    (x, y), found = digits.examples("train"), []
    for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(neuron.BATCH)[:BATCHES]:
        drive = trained[0](x[rows]).detach()
        gap = (parts["jaxley"](drive.double()) - torch.tensor(neuron.potentials(drive.double().numpy()))).abs().max()
        gradients = {name: before_part(model, (x[rows], y[rows])) for name, model in models.items()}
        found.append(
            {
                "forward": float(gap),
                "cosine": cosine(gradients["exact"], gradients["jaxley"]),
                "own_cosine": cosine(gradients["own"], gradients["jaxley"]),
                "wide_cosine": cosine(gradients["wide"], gradients["jaxley"]),
            }
        )
    return found


def main() -> None:
    began_at = commit()  # the tree may have changed by the end
    rows = []
    for epochs in (0, 1):
        of_seeds = {seed: compared(seed, epochs) for seed in SEEDS}
        each = [batch for batches in of_seeds.values() for batch in batches]
        rows.append(
            {"epochs": epochs, "forward": max(b["forward"] for b in each)}
            | {key: statistics.mean(b[key] for b in each) for key in ("cosine", "own_cosine", "wide_cosine")}
            | {"lowest_cosine": min(b["cosine"] for b in each), "by_seed": of_seeds}
        )
        print({key: value for key, value in rows[-1].items() if key != "by_seed"}, flush=True)
    report = {"command": "PYTHONPATH=examples python experiments/jaxley_neurons.py", "commit": began_at}
    report |= {"seeds": list(SEEDS), "versions": {p: version(p) for p in ("jaxley", "jax", "neuron", "torch")}}
    OUT.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

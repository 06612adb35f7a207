"""How long does it take until a network has a plan, and how does that grow with the number of calls?

    python benchmarks/planning.py                 # prints a table, writes results/benchmarks/planning.json
    python benchmarks/planning.py --networks GPT-2 --rounds 3

``trace`` runs every call of a network by itself a few times, on a few samples; ``plan`` decides. Networks of the same
kind and growing depth show the exponent of time in the number of calls, by least squares in logarithms. One thread;
seconds of its processor and, in brackets, of the clock, which counts what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import hzo
from hzo_lab import networks
from hzo_lab.records import environment

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "planning.json"


def resnet50() -> tuple[nn.Module, Tensor]:
    return networks.ResNet(networks.Bottleneck, (3, 4, 6, 3), 64, stem="imagenet"), torch.randn(2, 3, 64, 64)


def llama() -> tuple[nn.Module, Tensor]:
    return networks.Llama(layers=16), torch.randint(100, (2, 64))


def gpt2() -> tuple[nn.Module, Tensor]:
    model = networks.GPT(vocabulary=50257, tokens=128, width=768, layers=12, heads=12)
    return model, torch.randint(50257, (2, 128))


class Adapted(nn.Module):
    """A frozen layer with an adapter of low rank."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def lora() -> tuple[nn.Module, Tensor]:
    """The same Llama, frozen, with adapters at all linear layers of its blocks."""
    model, tokens = llama()
    model.requires_grad_(False)
    for block in model.blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                owner, _, attribute = name.rpartition(".")
                setattr(block.get_submodule(owner), attribute, Adapted(layer, 4))
    return model, tokens


def mlp(depth: int) -> tuple[nn.Module, Tensor]:
    layers = (m for _ in range(depth) for m in (nn.Linear(16, 16), nn.Tanh()))
    return nn.Sequential(*layers), torch.randn(4, 16)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "ResNet-50": resnet50,
    "Llama, 16 blocks": llama,
    "GPT-2": gpt2,
    "LoRA, 16 blocks": lora,
}
DEPTHS = (333, 1000, 3333, 6667)  # layers of three calls each


def measure(make: Callable[[], tuple[nn.Module, Tensor]], rounds: int) -> dict[str, float]:
    """Seconds of trace, plan and both by the clock (medians), calls, and the peak of Python's memory in planning."""
    torch.manual_seed(0)
    model, x = make()
    traces, plans, clock, calls = [], [], [], 0
    for _ in range(rounds):
        begin, start = time.perf_counter(), time.process_time()
        chain = hzo.trace(model, x)
        between = time.process_time()
        hzo.plan(chain)
        traces.append(between - start)
        plans.append(time.process_time() - between)
        clock.append(time.perf_counter() - begin)
        calls = len(chain.traced.operations)
    tracemalloc.start()
    hzo.plan(chain)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "calls": calls,
        "trace": median(traces),
        "plan": median(plans),
        "clock": median(clock),
        "plan_bytes_per_call": peak / calls,
    }


def exponent(rows: list[dict[str, float]]) -> float:
    """Of the sum of both times in the number of calls."""
    points = [(math.log(row["calls"]), math.log(row["trace"] + row["plan"])) for row in rows]
    mean_x, mean_y = (sum(p[k] for p in points) / len(points) for k in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--depths", nargs="*", type=int, default=list(DEPTHS))
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    hzo.plan(hzo.trace(*mlp(2)))  # imports
    found = {}
    for name in given.networks:
        found[name] = measure(NETWORKS[name], given.rounds)
        print(f"{name:20}", {k: round(v, 2) for k, v in found[name].items()}, flush=True)
    depths = []
    for depth in given.depths:
        depths.append(measure(lambda depth=depth: mlp(depth), given.rounds))  # type: ignore[misc]
        print(f"MLP of {depth} layers ", {k: round(v, 2) for k, v in depths[-1].items()}, flush=True)
    power = exponent(depths) if len(depths) > 1 else None
    print("exponent of calls:", None if power is None else round(power, 2))
    record = {
        "command": shlex.join(["python", "benchmarks/planning.py", *sys.argv[1:]]),
        **environment(),
        "networks": found,
        "mlp": depths,
        "exponent": power,
    }
    OUT.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

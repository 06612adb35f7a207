"""How long the planner takes to find a tree, steps and repeats, against the length of the chain.

python benchmarks/planning.py                        # prints a table, writes results/benchmarks/planning.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import hzo
from record import write

WIDTH = 64


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


STAGES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear, tanh": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "residual": Residual,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/planning.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name, make in STAGES.items():
        for length in arguments.lengths:
            torch.manual_seed(0)
            chain = hzo.trace(nn.Sequential(*(make() for _ in range(length))), torch.randn(4, WIDTH))
            for assume, step in (("nothing", 0.1), ("structure", None)):
                times = []
                for _ in range(arguments.rounds):
                    began = time.perf_counter()
                    plan = hzo.plan(chain, assume=assume, step=step, noise=1e-3, target_cosine=0.99)
                    times.append(time.perf_counter() - began)
                seconds = statistics.median(times)
                rows.append({"stages": name, "length": length, "assume": assume, "seconds": seconds})
                print(
                    f"{length:4d} × {name:13} assume {assume:10} {seconds:6.2f} s, {len(plan.nodes)} nodes", flush=True
                )
    write(arguments.out, seed=0, rows=rows)


if __name__ == "__main__":
    main()

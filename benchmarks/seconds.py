"""Seconds predicted before the run, against seconds measured.

    python benchmarks/seconds.py                         # prints a table, writes results/benchmarks/seconds.json

``hzo.calibrate`` times the parts of a gradient on one batch: the base pass, the estimate of every edge, every
parameter rule, every operation in chunks of queries. A plan's time is their sum. For each network the default plan is
predicted, then run; the MLP also by plans that calibration has never run (bisect, flat, repeats for a target).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hzo
from hzo_lab.networks import GPT, ProjectionBlock, ResNet
from hzo_lab.training import mlp, resnet
from record import write

Problem = tuple[nn.Module, Tensor, Tensor]
Case = tuple[Callable[[], Problem], str, tuple[dict[str, Any], ...]]


def images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def vectors(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 64), torch.randint(10, (batch,))


CASES: dict[str, Case] = {
    "resnet20": (lambda: (resnet((3, 32, 32), 10), *images(128)), "structure", ({},)),
    "resnet18": (lambda: (ResNet(ProjectionBlock, (2, 2, 2, 2), 64), *images(32)), "structure", ({},)),
    "gpt": (
        lambda: (GPT(65, 64, 128, 4, 4), torch.randint(65, (16, 64)), torch.randint(65, (16, 64))),
        "structure",
        ({},),
    ),
    "mlp": (
        lambda: (mlp(64, 10, depth=16, width=64), *vectors(32)),
        "nothing",
        (
            {"tree": "stagewise"},
            {"tree": "bisect"},
            {"tree": "flat"},
            {"noise": 1e-3, "step": 0.1, "target_cosine": 0.99},
        ),
    ),
}


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    make, assume, plans = CASES[name]
    torch.manual_seed(0)
    model, x, y = make()
    chain = hzo.trace(model, x)
    hzo.backward(chain, F.cross_entropy, x, y, assume=assume)  # warm
    known = hzo.calibrate(chain, x, F.cross_entropy, y, assume=assume)
    found = []
    for options in plans:
        plan = hzo.plan(chain, assume=assume, calibration=known, **options)
        times = []
        for _ in range(rounds):
            model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            hzo.backward(chain, F.cross_entropy, x, y, plan=plan)
            times.append(time.perf_counter() - began)
        assert plan.expected is not None
        assert plan.expected.seconds is not None
        measured = statistics.median(times)
        found.append(
            {
                "network": name,
                "plan": options,
                "assume": assume,
                "predicted_seconds": plan.expected.seconds,
                "measured_seconds": measured,
                "quickest_seconds": min(times),
                "ratio": plan.expected.seconds / measured,
                "forward_equivalents": plan.forward_equivalents,
            }
        )
        row = found[-1]
        print(
            f"{name:9} {options!s:58} predicted {row['predicted_seconds']:7.3f} s  measured {measured:7.3f} s  "
            f"ratio {row['ratio']:.2f}",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/seconds.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for name in arguments.networks for row in measure(name, arguments.rounds)]
    write(arguments.out, seed=0, threads=arguments.threads, rows=rows)


if __name__ == "__main__":
    main()

"""Wall time of one gradient with ``assume="nothing"`` against what its forward equivalents promise, and its memory.

    python benchmarks/gradient_time.py          # prints a table, writes results/benchmarks/gradient_time.json

A gradient of F forward equivalents should take about F forward passes. The pass to compare with is one without autograd
of a batch as large as the chunks that the queries run in, per sample: nodes have chunks of different sizes, so each
node's forward equivalents are weighed with the time at its own chunk. Forward passes and gradients take turns; medians
are compared. Memory is the peak of what the queries allocate beyond what the base pass left, by the profiler's count,
beside the budget that was set.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hzo
from hzo.finite_differences import directions_per_chunk
from hzo.gradients import base_pass
from hzo.plans import bytes_per_direction, schedule
from hzo_lab.records import peak_of
from record import write

MIB = 2**20
OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "gradient_time.json"


def mlp() -> tuple[nn.Module, Tensor]:
    """20 stages of width 256."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(20))), torch.randn(128, 256)


def cnn() -> tuple[nn.Module, Tensor]:
    """Three convolutions of 8 to 16 channels on 16×16 and a linear layer."""
    stages = (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)),
    )
    return nn.Sequential(*stages), torch.randn(8, 3, 16, 16)


NETWORKS = {"mlp": mlp, "cnn": cnn}


def forward_seconds(model: nn.Module, x: Tensor, copies: int) -> float:
    """One pass of ``copies`` batches, per batch."""
    large = x.repeat(copies, *(1 for _ in x.shape[1:]))
    with torch.no_grad():
        model(large)
        start, count = time.perf_counter(), 0
        while count < 3 or time.perf_counter() - start < 0.05:
            model(large)
            count += 1
    return (time.perf_counter() - start) / count / copies


def by_chunk(chain: hzo.Chain, plan: hzo.Plan, batch: int, memory: int) -> dict[int, float]:
    """Forward equivalents by the size of the chunks that they run in."""
    found: dict[int, float] = {}
    for node in plan.nodes:
        needed = bytes_per_direction(chain.traced, node, batch)
        chunk = min(directions_per_chunk(needed, memory, torch.device("cpu")), max(1, node.directions))
        found[chunk] = found.get(chunk, 0.0) + float(node.cost.forward_equivalents_of(batch))
    return found


def held_bytes(chain: hzo.Chain, plan: hzo.Plan, x: Tensor) -> int:
    """What the base pass leaves for the queries, which is not the budget's affair."""
    with torch.no_grad():
        activations, _ = base_pass(chain, x, schedule(chain.traced, plan).base_pass)
    tensors = [t for t in activations.values if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) - x.untyped_storage().nbytes()


def measure(name: str, tree: str, memory: int, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    y = torch.randint(0, 10, (len(x),))
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, tree=tree, assume="nothing")  # type: ignore[arg-type]
    chunks = by_chunk(chain, plan, len(x), memory)

    def gradient() -> None:
        hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=plan, memory=memory)

    with hzo.count_queries() as count:
        gradient()
    seconds, ratios = [], []
    for _ in range(rounds):
        promised = sum(forward_seconds(model, x, copies) * share for copies, share in chunks.items())
        start = time.perf_counter()
        gradient()
        seconds.append(time.perf_counter() - start)
        ratios.append(seconds[-1] / promised)
    return {
        "network": name,
        "tree": tree,
        "batch": len(x),
        "budget_mib": memory / MIB,
        "peak_mib": (peak_of(gradient) - held_bytes(chain, plan, x)) / MIB,
        "forward_equivalents": plan.forward_equivalents,
        "queries_predicted": plan.queries,
        "queries_counted": count.queries,
        "chunks": sorted(chunks),
        "seconds": median(seconds),
        "ratio": median(ratios),
        "all_ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32], help="MiB")
    parser.add_argument("--trees", nargs="+", default=["bisect", "stagewise"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print("network  tree       budget  peak MiB  forward eq.  seconds  ratio")
    for name in options.networks:
        for tree in options.trees:
            for budget in options.budgets:
                row = measure(name, tree, budget * MIB, options.rounds)
                rows.append(row)
                print(
                    f"{name:8} {tree:10} {budget:6}  {row['peak_mib']:8.1f}  {row['forward_equivalents']:11.1f}  "
                    f"{row['seconds']:7.2f}  {row['ratio']:5.2f}",
                    flush=True,
                )
    write(options.out, seed=0, rows=rows)


if __name__ == "__main__":
    main()

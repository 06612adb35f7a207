"""How a gradient speeds up on a mesh of gloo processes: a part that takes 20 ms a sample, samples and queries divided.

    PYTHONPATH=src python benchmarks/mesh.py [--processes 8] [--out FILE]

The part sleeps, so that more processes than processors can be told. ``model`` is the time by docs/scale.md: queries of
the busiest process, the forward pass and the test that the part repeats, without exchanges; ``efficiency`` is the time
of one process over that of N times N.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import hzo

SECONDS, SAMPLES, INPUTS = 0.02, 8, 32


def part(z):
    """Sleeps as a simulator computes."""
    time.sleep(SECONDS * len(z))
    return z.sin() * z.sum(1, keepdim=True)


def shapes(processes):
    """All (sample, query) of 1, 2, 4, … processes."""
    sizes = [2**k for k in range(processes.bit_length()) if 2**k <= processes]
    return [(s, n // s) for n in sizes for s in sizes if n % s == 0]


def rank_main(rank, processes, store, pipe):
    """One process: takes part in every mesh that it belongs to."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=600)
    torch.distributed.init_process_group("gloo", f"file://{store}", limit, processes, rank)
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, INPUTS, dtype=torch.float64)
    rows = []
    for s, q in shapes(processes):
        mesh = DeviceMesh("cpu", torch.arange(s * q).view(s, q), mesh_dim_names=("sample", "query"))
        torch.distributed.barrier()
        if mesh.get_coordinate() is None:
            continue
        at, each = mesh.get_local_rank("sample"), SAMPLES // s
        box = hzo.blackbox(part)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(INPUTS, INPUTS), box).double()
        mine = x[at * each : (at + 1) * each]
        loss = lambda out: out.square().sum(1)  # noqa: E731
        hzo.backward(model, loss, mine, mesh=mesh)  # what is done once, for a shape and for a process
        model.zero_grad()
        with hzo.count_queries() as count:
            began = time.perf_counter()
            hzo.backward(model, loss, mine, mesh=mesh)
            seconds = time.perf_counter() - began
        others = count.base_evaluations + count.check_evaluations
        gradient = model[0].weight.grad
        rows.append(
            {"sample": s, "query": q, "seconds": seconds, "queries": count.queries, "others": others}
            | {"gradient": gradient.tolist()}
        )
    pipe.send(rows)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main():
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--processes", type=int, default=8)
    given.add_argument("--out")
    options = given.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(options.processes)]
        ranks = [
            context.Process(target=rank_main, args=(k, options.processes, str(Path(folder) / "store"), pipe[1]))
            for k, pipe in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        found = [pipe[0].recv() for pipe in pipes]
        for process in ranks:
            process.join()
    rows, alone = [], found[0][0]
    for s, q in shapes(options.processes):
        here = [row for of_rank in found for row in of_rank if (row["sample"], row["query"]) == (s, q)]
        seconds, queries = (max(row[name] for row in here) for name in ("seconds", "queries"))
        exact, gradient = (torch.tensor(row["gradient"]) for row in (alone, here[0]))
        error = float((gradient - exact).norm() / exact.norm())
        row = {"sample": s, "query": q, "seconds": seconds, "queries": queries}
        row |= {"model": (2 * -(-INPUTS // q) * -(-SAMPLES // s) + here[0]["others"]) * SECONDS, "error": error}
        row |= {"efficiency": alone["seconds"] / (s * q * seconds)}
        rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) and k != "error" else v for k, v in row.items()}, flush=True)
    if options.out:
        load = None
        with suppress(OSError):
            load = os.getloadavg()
        about = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count(), "load": load}
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump({"about": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()

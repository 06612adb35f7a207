"""How close pools come to ideal: a part that takes 50 ms a sample, under threads, processes, dask and Ray.

    PYTHONPATH=src python benchmarks/pools.py [--engines threads,processes,dask,ray] [--workers 1,4,16,64] [--out FILE]

The ideal is the number of evaluations of one sample, divided by the number of workers, times 50 ms. Workers sleep, so
that more of them than processors can be told; they are started before the clock.
"""

import argparse
import gc
import json
import math
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

import hzo

SECONDS, SAMPLES, INPUTS = 0.05, 4, 64


def part(z):
    """Sleeps as a simulator computes."""
    time.sleep(SECONDS * len(z))
    return np.sin(z) * z.sum(1, keepdims=True)


def warm(_):
    """A worker has imported what the part needs."""
    part(np.zeros((1, INPUTS)))


@contextmanager
def engine(name, workers):
    """An executor with so many workers, started."""
    if name == "threads":
        with ThreadPoolExecutor(workers) as executor:
            yield executor
    elif name == "processes":
        with ProcessPoolExecutor(workers) as executor:
            list(executor.map(warm, range(4 * workers)))
            yield executor
    elif name == "dask":
        from distributed import Client  # noqa: PLC0415  # only where asked for

        processes = min(workers, 2)
        with Client(
            n_workers=processes, threads_per_worker=workers // processes, dashboard_address=None, processes=True
        ) as client:
            executor = client.get_executor()
            list(executor.map(warm, range(4 * workers)))
            yield executor
    else:
        executor = hzo.ray_executor(workers)
        list(executor.map(warm, range(4 * workers)))
        yield executor
        executor.shutdown()


def measure(executor):
    """The seconds of a forward and a backward pass, how many samples were evaluated, and the gradient."""
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, INPUTS, dtype=torch.float64, requires_grad=True)
    box = hzo.blackbox(part, numpy=True, batched=1, executor=executor)
    gc.collect()  # what importing torch and starting workers has left: 0.1 seconds, at whatever moment Python chooses
    began = time.perf_counter()
    with hzo.count_queries() as count:
        box(x).sum().backward()
    seconds = time.perf_counter() - began
    return seconds, SAMPLES + count.queries + count.base_evaluations + count.check_evaluations, x.grad


def main():
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--engines", default="threads,processes,dask,ray")
    given.add_argument("--workers", default="1,4,16,64")
    given.add_argument("--out")
    options = given.parse_args()
    rows, exact = [], None
    for name in options.engines.split(","):
        for workers in map(int, options.workers.split(",")):
            with engine(name, workers) as executor:
                seconds, evaluations, gradient = measure(executor)
            exact = gradient if exact is None else exact
            ideal = math.ceil(evaluations / workers) * SECONDS
            row = {"engine": name, "workers": workers, "seconds": seconds, "evaluations": evaluations, "ideal": ideal}
            row |= {"efficiency": ideal / seconds, "same bits": torch.equal(gradient, exact)}
            rows.append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    if options.out:
        about = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump({"about": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()

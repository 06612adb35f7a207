"""What a gradient from the tape costs beside backprop's on a GPU: time, time of kernels, memory, waits of the host.

    python benchmarks/gpu.py [--rounds 15] [--only resnet20,gpt] [--out results/benchmarks/gpu.json]

Interleaved rounds in one process; medians of seconds between two synchronisations of the device, at float32 (matrix
products not rounded to TF32) and under ``torch.autocast`` to bfloat16. "Busy" is the time of the kernels alone, by
PyTorch's profiler: where a gradient takes longer than that, the device waits for the host. Waits of the host are those
that CUDA's debug mode reports. A captured gradient is one whole ``hzo.backward``, recording and sweep, that a CUDA
graph repeats; a compiled one is what ``torch.compile`` makes of the same function.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import hzo
from gradients import Loss, by_backprop, by_hzo, flat_gradient, medians
from hzo_lab import networks
from hzo_lab.training.models import build
from price import METHODS, Gpt, Problem
from record import write

DEVICE = torch.device("cuda")


def on_images(model: nn.Module, batch: int, size: int) -> Problem:
    x, y = torch.randn(batch, 3, size, size, device=DEVICE), torch.randint(10, (batch,), device=DEVICE)
    return model.to(DEVICE), lambda m: F.cross_entropy(m(x), y)


def gpt(depth: int, width: int, batch: int, length: int) -> Problem:
    tokens = torch.randint(200, (batch, length), device=DEVICE)
    model = Gpt(depth, width, 4, 200, length).to(DEVICE)
    return model, lambda m: F.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten())


def mlp(width: int, batch: int) -> Problem:
    x = torch.randn(batch, width, device=DEVICE)
    model = nn.Sequential(*(layer for _ in range(16) for layer in (nn.Linear(width, width), nn.ReLU())))
    return model.to(DEVICE), lambda m: m(x).square().mean()


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "ResNet-20, batch 512": lambda: on_images(build("resnet20", (3, 32, 32), 10), 512, 32),
    "ResNet-18, batch 512": lambda: on_images(networks.ResNet(networks.ProjectionBlock, (2, 2, 2, 2), 64), 512, 32),
    "GPT 12x256, 64x256 tokens": lambda: gpt(12, 256, 64, 256),
    "GPT 12x768, 16x512 tokens": lambda: gpt(12, 768, 16, 512),
    "ViT-tiny, batch 128": lambda: on_images(networks.ViT(), 128, 224),
    "MLP 16x2048, batch 512": lambda: mlp(2048, 512),
}


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def busy(run: Callable[[], object]) -> float:
    """Seconds that kernels take."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    return sum(event.time_range.elapsed_us() for event in kernels) / 1e6


def waits(run: Callable[[], object]) -> int:
    """How often the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def peak(run: Callable[[], object]) -> float:
    """MiB allocated at once, above those before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def captured(model: nn.Module, loss: Loss, rounds: int, method: Callable[[nn.Module, Loss], None]) -> dict[str, Any]:
    """A whole gradient in a CUDA graph: seconds of a repetition, or why there is none."""
    why = ""
    model.zero_grad(set_to_none=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                method(model, loss)
        torch.cuda.current_stream().wait_stream(side)
        exact = flat_gradient(model)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            try:
                method(model, loss)
            except Exception as first:
                why = f"{type(first).__name__}: {first}"[:600]
                raise
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        graph.replay()
        found = flat_gradient(model)
        taken = statistics.median(seconds(graph.replay) for _ in range(rounds))
        return {"seconds": taken, "cosine to the same outside of a graph": cosine(found, exact)}
    except Exception as error:  # what is reported is why
        return {"error": why or f"{type(error).__name__}: {error}"[:600]}


def compiled(model: nn.Module, loss: Loss, rounds: int, before: Callable[[str], None]) -> dict[str, Any]:
    """The same under torch.compile: seconds after warming up, or why there is none."""
    try:
        run = torch.compile(by_hzo)
        start = time.perf_counter()
        for _ in range(3):
            before("")
            run(model, loss)
        torch.cuda.synchronize()
        warm = time.perf_counter() - start
        taken = medians({"compiled": lambda: run(model, loss)}, rounds, before, seconds)
        return {"seconds": taken["compiled"], "seconds of the first three": warm}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:600]}


def measure(name: str, dtype: torch.dtype, rounds: int, compile_too: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model, plain = PROBLEMS[name]()

    def loss(m: nn.Module) -> Tensor:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return plain(m)

    def before(method: str) -> None:
        if method == "weights kept":
            METHODS[method](model, loss)
        model.zero_grad()

    def forward() -> None:
        loss(model)

    def recorded() -> None:
        with hzo.record():
            loss(model)

    model.zero_grad()
    first = seconds(lambda: by_hzo(model, loss))
    runs: dict[str, Callable[[], object]] = {n: partial(run, model, loss) for n, run in METHODS.items()}
    for method, run in runs.items():  # warm
        before(method)
        run()
    median = medians({**runs, "forward": forward, "recorded forward": recorded}, rounds, before, seconds)
    result: dict[str, Any] = {
        "seconds": median,
        "time over backprop": median["hzo"] / median["backprop"],
        "with weights kept": median["weights kept"] / median["backprop"],
        "floor, weights read": median["weights read"] / median["backprop"],
        "first gradient, seconds": first,
        "busy, seconds": {},
        "waits of the host": {},
        "peak memory, MiB": {},
    }
    gradients = {}
    for method, run in runs.items():
        for key, instrument in (("busy, seconds", busy), ("waits of the host", waits), ("peak memory, MiB", peak)):
            before(method)
            result[key][method] = instrument(run)
        gradients[method] = flat_gradient(model)
    result["busy over backprop"] = result["busy, seconds"]["hzo"] / result["busy, seconds"]["backprop"]
    result["peak memory over backprop"] = result["peak memory, MiB"]["hzo"] / result["peak memory, MiB"]["backprop"]
    result["1 - cosine"] = 1 - cosine(gradients["hzo"], gradients["backprop"])
    if compile_too:
        result["compiled"] = compiled(model, loss, rounds, before)
    result["captured"] = {
        "hzo": captured(model, loss, rounds, by_hzo),
        "backprop": captured(model, loss, rounds, by_backprop),
    }
    return result


def shown(tried: dict[str, Any]) -> str:
    return f"{1e3 * tried['seconds']:.1f} ms" if "seconds" in tried else tried["error"][:120]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="parts of names, with commas between")
    parser.add_argument("--compile", default="ResNet-20", help="part of the names to try torch.compile on")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/gpu.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in PROBLEMS:
        if options.only and not any(part.lower() in name.lower() for part in options.only.split(",")):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            row = measure(name, dtype, options.rounds, bool(options.compile) and options.compile in name)
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[label] = row
            print(
                f"{label:40s} time {row['time over backprop']:5.2f}x of {1e3 * row['seconds']['backprop']:6.1f} ms "
                f"(kept {row['with weights kept']:4.2f}x, floor {row['floor, weights read']:4.2f}x)   "
                f"busy {row['busy over backprop']:4.2f}x   memory {row['peak memory over backprop']:4.2f}x   "
                f"waits {row['waits of the host']}   1 - cosine {row['1 - cosine']:.0e}   "
                f"captured {shown(row['captured']['hzo'])} beside {shown(row['captured']['backprop'])}"
                + (f"   compiled {shown(row['compiled'])}" if "compiled" in row else ""),
                flush=True,
            )
            write(options.out, DEVICE, rounds=options.rounds, networks=found)
            gc.collect()  # graphs hold their memory
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

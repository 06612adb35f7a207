"""What a gradient costs beside backprop's: time, memory, cosine, and where the time goes.

    python benchmarks/structure.py                       # prints tables, writes results/benchmarks/structure.json
    python benchmarks/structure.py --networks resnet20 --rounds 5

One process, one machine, one batch: a step of ``hzo.backward`` and one of backprop take turns, and medians are
compared. Memory is the peak of all that is allocated during a step, above what is there before it. The ratios to
coordinate-wise estimation are extrapolated from a measured share, as the output says.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import hzo
from hzo_lab.networks import GPT, ProjectionBlock, ResNet
from hzo_lab.records import peak_of
from hzo_lab.training import resnet
from record import write

Problem = tuple[nn.Module, Tensor, Tensor]

NETWORKS: dict[str, tuple[int, Callable[[int], Problem]]] = {
    "resnet20": (128, lambda batch: (resnet((3, 32, 32), 10), *images(batch))),
    "resnet18": (128, lambda batch: (ResNet(ProjectionBlock, (2, 2, 2, 2), 64), *images(batch))),
    "gpt": (16, lambda batch: (GPT(65, 64, 128, 4, 4), torch.randint(65, (batch, 64)), torch.randint(65, (batch, 64)))),
}

# Parts of the names of operators, the first that fits.
KERNELS = {
    "convolution, backward": ("convolution_backward", "conv_backward"),
    "convolution": ("conv",),
    "normalization, backward": ("norm_backward",),
    "normalization": ("norm",),
    "products": ("mm", "linear", "matmul"),
    "attention": ("attention", "softmax"),
    "copies": ("copy_", "clone", "contiguous", "cat", "fill_", "zero_", "index", "scatter", "sparse"),
    "allocation": ("empty", "resize"),
}


def images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def steps(problem: Problem) -> dict[str, Callable[[], None]]:
    """A step of each, from the same random numbers and without gradients from before."""
    model, x, y = problem
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain)

    def run(gradient: Callable[[], Any]) -> None:
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        gradient()

    return {
        "hzo": lambda: run(lambda: hzo.backward(chain, F.cross_entropy, x, y, plan=plan)),
        "backprop": lambda: run(lambda: F.cross_entropy(model(x), y).backward()),
    }


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def times(step: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, Any]:
    """Medians of steps that take turns, so that what else the machine does falls on both."""
    for run in step.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in step}
    for _ in range(rounds):
        for name, run in step.items():
            taken[name].append(seconds(run, device))
    median = {name: statistics.median(t) for name, t in taken.items()}
    ratios = sorted(a / b for a, b in zip(taken["hzo"], taken["backprop"], strict=True))
    return {
        "seconds": median,
        "ratio": median["hzo"] / median["backprop"],
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "all_seconds": taken,
    }


def cosines(step: dict[str, Callable[[], None]], model: nn.Module) -> dict[str, Any]:
    """The least cosine over all parameters; gradients that are zero up to rounding are counted and left out."""
    found = {}
    for name, run in step.items():
        run()
        found[name] = {n: p.grad.double().flatten() for n, p in model.named_parameters() if p.grad is not None}
    floor = 1e-6 * max(float(g.norm()) for g in found["backprop"].values())
    values = {
        n: float(F.cosine_similarity(found["hzo"][n], g, dim=0, eps=1e-30))
        for n, g in found["backprop"].items()
        if float(g.norm()) > floor
    }
    worst = min(values, key=lambda n: values[n])
    zero = len(found["backprop"]) - len(values)
    return {"min": values[worst], "where": worst, "parameters": len(values), "zero_gradients": zero}


def peak(run: Callable[[], None], device: torch.device) -> int:
    """Bytes allocated at once during a step, above those before it."""
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    return peak_of(run)


def kernels(run: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Milliseconds by kind of operator, without those that it calls."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        run()
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, parts in KERNELS.items() if any(part in name for part in parts)), "elementwise")
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        found[kind] = found.get(kind, 0.0) + spent / 1000
    return {kind: round(ms, 2) for kind, ms in sorted(found.items(), key=lambda item: -item[1])}


def parts(run: Callable[[], None]) -> dict[str, float]:
    """Milliseconds by package of hzo: what its own functions take, and the operators of PyTorch that they call."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    stats: Any = pstats.Stats(profiler)
    library = Path(hzo.__file__).parent
    found = {"other": stats.total_tt * 1000}
    for (file, _, _), (_, _, own, _, callers) in stats.stats.items():
        spent = (
            {file: own} if library in Path(file).parents else {by: times[2] for (by, _, _), times in callers.items()}
        )
        for place, taken in spent.items():
            if library in Path(place).parents:
                package = Path(place).relative_to(library).parts[0]
                found[package] = found.get(package, 0.0) + taken * 1000
                found["other"] -= taken * 1000
    return {name: round(ms, 2) for name, ms in sorted(found.items(), key=lambda item: -item[1])}


def coordinate_wise(problem: Problem, device: torch.device, step_seconds: float, share: int) -> dict[str, Any]:
    """Forward differences over every parameter: as many forward passes, timed on a few of them."""
    model, x, y = problem
    elements = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        taken = [seconds(lambda: F.cross_entropy(model(x), y), device) for _ in range(share + 1)][1:]
    whole = (elements + 1) * statistics.median(taken)
    return {
        "forward_passes": elements + 1,
        "measured_forward_passes": share,
        "seconds_extrapolated": whole,
        "times_hzo": whole / step_seconds,
    }


def layer_wise(problem: Problem, device: torch.device, step_seconds: float, share_batch: int) -> dict[str, Any]:
    """Forward differences over every activation, one edge to the next boundary that a parameter needs.

    Norms over the batch keep samples apart here (evaluation mode), without which there are no such differences. The
    share: the gradient of the last layers alone, on a few samples.
    """
    model, x, y = copy.deepcopy(problem[0]).eval(), problem[1], problem[2]
    options: dict[str, Any] = {"tree": "planned", "assume": "nothing", "scheme": "forward"}
    whole = hzo.plan(hzo.trace(model, x), **options)
    layers = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    model.requires_grad_(False)
    for layer in layers[-4:]:
        layer.requires_grad_(True)
    small = x[:share_batch]
    chain = hzo.trace(model, small)
    plan = hzo.plan(chain, **options)
    taken = seconds(lambda: hzo.grad_and_value(chain, F.cross_entropy, small, y[:share_batch], plan=plan), device)
    each = taken / plan.forward_equivalents / share_batch
    total = each * whole.forward_equivalents * x.shape[0]
    return {
        "queries": whole.queries,
        "forward_equivalents": whole.forward_equivalents,
        "measured_forward_equivalents": plan.forward_equivalents,
        "measured_samples": share_batch,
        "seconds_extrapolated": total,
        "times_hzo": total / step_seconds,
    }


def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    batch, make = NETWORKS[name]
    batch = options.batch or batch
    model, x, y = make(batch)
    problem = (model.to(device).train(), x.to(device), y.to(device))
    step = steps(problem)
    timed = times(step, options.rounds, device)
    memory = {kind: peak(run, device) for kind, run in step.items()}
    plan = hzo.plan(hzo.trace(problem[0], problem[1]))
    result: dict[str, Any] = {
        "batch": batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "time": timed,
        "cosine": cosines(step, model),
        "peak_bytes": memory,
        "peak_ratio": memory["hzo"] / memory["backprop"],
        "plan": {"queries": plan.queries, "adjoints": plan.adjoints, "forward_equivalents": plan.forward_equivalents},
        "milliseconds_by_part": parts(step["hzo"]),
        "milliseconds_by_operator": {kind: kernels(run, device) for kind, run in step.items()},
    }
    if not options.skip_differences:
        spent = timed["seconds"]["hzo"]
        result["coordinate_wise"] = coordinate_wise(problem, device, spent, 5)
        result["layer_wise"] = layer_wise(problem, device, spent, options.share_batch)
    return result


def show(name: str, result: dict[str, Any]) -> None:
    time_, cosine, spent = result["time"], result["cosine"], result["time"]["seconds"]
    print(f"\n{name}, batch {result['batch']}, {result['parameters']:,} parameters")
    print(f"  time     {time_['ratio']:.2f} × backprop ({spent['hzo']:.3f} s, {spent['backprop']:.3f} s)")
    print(f"  memory   {result['peak_ratio']:.2f} × backprop ({result['peak_bytes']['hzo'] / 2**20:.0f} MiB)")
    print(f"  cosine   ≥ {cosine['min']:.6f} ({cosine['where']}; {cosine['zero_gradients']} zero gradients left out)")
    for key, label in (
        ("coordinate_wise", "coordinate-wise over parameters"),
        ("layer_wise", "layer-wise differences"),
    ):
        if key in result:
            found = result[key]
            print(f"  {label}: {found['seconds_extrapolated']:,.0f} s (extrapolated), {found['times_hzo']:,.0f} × hzo")
    print("  ms by part: " + ", ".join(f"{part} {ms:.0f}" for part, ms in result["milliseconds_by_part"].items()))
    for kind, found in result["milliseconds_by_operator"].items():
        print(f"  ms by operator, {kind}: " + ", ".join(f"{k} {ms:.0f}" for k, ms in found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, help="instead of each network's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--share-batch", type=int, default=2, help="samples of the share of layer-wise differences")
    parser.add_argument("--skip-differences", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/structure.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    chosen = {k: v for k, v in vars(options).items() if k != "out"}
    networks: dict[str, Any] = {}
    for name in options.networks:
        networks[name] = measure(name, options, device)
        show(name, networks[name])
        write(options.out, device, options=chosen, networks=networks)
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()

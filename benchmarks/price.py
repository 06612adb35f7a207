"""What a gradient from the tape costs beside backprop's: time, memory, the share of recording, on favourable and
unfavourable networks.

    python benchmarks/price.py [--rounds 7] [--only resnet20,gpt] [--process] [--out results/benchmarks/price.json]

Interleaved rounds in one process, one thread, float32; medians of processor time, so that others may use the machine,
whose load is noted. Peak memory is that of tensors, as PyTorch's allocator counts them, in one gradient. ``--process``
adds what the process takes: for each network and method one of its own, above what it held before its first gradient,
with a malloc that gives back what is freed (``MALLOC_MMAP_THRESHOLD_=65536``; without, its gaps count as well, which
depend on the order of sizes).
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hzo
from gradients import Loss, by_backprop, by_hzo, flat_gradient, medians, seconds
from hzo_lab import networks
from hzo_lab.records import peak_of
from hzo_lab.training.models import build
from record import write

Problem = tuple[nn.Module, Loss]
"""A model, and its loss on a fixed batch."""


class Block(nn.Module):
    """A transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Gpt(nn.Module):
    """A language model of ``depth`` blocks."""

    def __init__(self, depth: int, width: int, heads: int, words: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


def resnet20(batch: int) -> Problem:
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    return build("resnet20", (3, 32, 32), 10), lambda m: F.cross_entropy(m(x), y)


def gpt(depth: int, width: int, batch: int, length: int, words: int = 200) -> Problem:
    tokens = torch.randint(words, (batch, length))
    model = Gpt(depth, width, 4, words, length)
    return model, lambda m: F.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten())


def mlp(width: int, batch: int) -> Problem:
    x = torch.randn(batch, width)
    model = nn.Sequential(*(layer for _ in range(16) for layer in (nn.Linear(width, width), nn.ReLU())))
    return model, lambda m: m(x).square().mean()


def lstm() -> Problem:
    x = torch.randn(32, 20, 64)
    return nn.LSTM(64, 64, batch_first=True), lambda m: m(x)[0].square().mean()


def on_images(model: nn.Module, batch: int, size: int) -> Problem:
    x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    return model, lambda m: F.cross_entropy(m(x), y)


def words() -> Problem:
    """The loss of a language model, written in a lambda as for ``hzo.backward``, and the layer before it."""
    hidden, tokens = torch.randn(4, 128, 64), torch.randint(50257, (4, 128))
    loss_fn = lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())  # noqa: E731
    return nn.Linear(64, 50257), lambda m: loss_fn(m(hidden), tokens)


def llama() -> Problem:
    tokens = torch.randint(200, (16, 64))
    return networks.Llama(), lambda m: F.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten())


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "ResNet-20, batch 128": lambda: resnet20(128),
    "ResNet-20, batch 8": lambda: resnet20(8),
    "ResNet-18, batch 32": lambda: on_images(networks.ResNet(networks.ProjectionBlock, (2, 2, 2, 2), 64), 32, 32),
    "ResNet-50, batch 2, 64 pixels": lambda: on_images(
        networks.ResNet(networks.Bottleneck, (3, 4, 6, 3), 64, stem="imagenet"), 2, 64
    ),
    "GPT 4x128, 16x64 tokens": lambda: gpt(4, 128, 16, 64),
    "GPT 12x256, 4x128 tokens": lambda: gpt(12, 256, 4, 128),
    "GPT 1x64, 50,257 words, 4x128 tokens": lambda: gpt(1, 64, 4, 128, 50257),
    "a loss of 50,257 words, 4x128 tokens": words,
    "ViT-tiny, batch 8": lambda: on_images(networks.ViT(), 8, 224),
    "ConvNeXt, batch 16, 64 pixels": lambda: on_images(networks.ConvNeXt(), 16, 64),
    "MobileNetV2, batch 16, 64 pixels": lambda: on_images(networks.MobileNetV2(), 16, 64),
    "Llama 4x128, grouped attention, 16x64 tokens": llama,
    "MLP 16x512, batch 128": lambda: mlp(512, 128),
    "MLP 16x64, batch 64": lambda: mlp(64, 64),
    "LSTM 64, 20 steps, batch 32": lstm,
}


def by_keeping(model: nn.Module, loss: Loss) -> None:
    """Measured weights are kept and tried; here they never change, as within a step's micro-batches."""
    with hzo.record() as step:
        value = loss(model)
    step.backward(value, keep=True)


def by_reading(model: nn.Module, loss: Loss) -> None:
    """The floor, a diagnostic: the same sweep where weights are read like activations, so that nothing is measured."""
    with hzo.record() as step:
        value = loss(model)
    for about in step.tape.values:
        about.weight = False
    step.backward(value)


METHODS = {"backprop": by_backprop, "hzo": by_hzo, "weights kept": by_keeping, "weights read": by_reading}


def measure(name: str, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    model, loss = PROBLEMS[name]()
    calls = 0

    def forward() -> None:
        loss(model)

    def recorded() -> None:
        nonlocal calls
        with hzo.record() as step:
            loss(model)
        calls = len(step.tape.operations)

    def before(method: str) -> None:
        if method == "weights kept":  # the methods before have released them
            METHODS[method](model, loss)
        model.zero_grad()
        torch.manual_seed(1)  # of dropout

    with hzo.count_queries() as count:
        model.zero_grad()
        first = seconds(lambda: by_hzo(model, loss))
    runs: dict[str, Callable[[], None]] = {name: partial(run, model, loss) for name, run in METHODS.items()}
    median = medians({**runs, "forward": forward, "recorded forward": recorded}, rounds, before)
    peaks, gradients = {}, {}
    for method in ("backprop", "hzo"):
        before(method)
        peaks[method] = peak_of(runs[method]) / 2**20
        gradients[method] = flat_gradient(model)
    a, b = gradients["hzo"], gradients["backprop"]
    recording = median["recorded forward"] - median["forward"]
    return {
        "time over backprop": median["hzo"] / median["backprop"],
        "with weights kept": median["weights kept"] / median["backprop"],
        "floor, weights read": median["weights read"] / median["backprop"],
        "peak memory over backprop": peaks["hzo"] / peaks["backprop"],
        "peak memory of backprop, MiB": peaks["backprop"],
        "backprop, seconds": median["backprop"],
        "first gradient, seconds": first,
        "calls": calls,
        "recording, microseconds a call": 1e6 * recording / calls,
        "recording over backprop": recording / median["backprop"],
        "1 - cosine": 1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)),
        "queries": count.queries,
    }


def resident_of(name: str, method: str) -> float:
    """MiB above what the process held, over three gradients in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", name, method],
        capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    return float(done.stdout)


def high_water() -> float:
    """The most memory that this process has held, in MiB; getrusage would tell of the parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def print_peak(name: str, method: str) -> None:
    torch.manual_seed(0)
    model, loss = PROBLEMS[name]()
    METHODS[method](nn.Linear(1, 1), lambda m: m(torch.ones(1, 1)).sum())  # what the first gradient of all loads
    before = high_water()
    for _ in range(3):
        model.zero_grad()
        METHODS[method](model, loss)
    print(high_water() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="parts of names, with commas between")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/price.json"))
    parser.add_argument("--process", action="store_true", help="measure the memory of processes, too")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print_peak(*options.peak)
        return
    found = {}
    for name in PROBLEMS:
        if options.only and not any(part.lower() in name.lower() for part in options.only.split(",")):
            continue
        row = measure(name, options.rounds)
        process = ""
        if options.process:
            resident = {method: resident_of(name, method) for method in ("backprop", "hzo")}
            row["memory of the process over backprop"] = resident["hzo"] / max(resident["backprop"], 0.1)
            process = f" (process {row['memory of the process over backprop']:4.2f}x)"
        found[name] = row
        print(
            f"{name:45s} time {row['time over backprop']:5.2f}x (kept {row['with weights kept']:4.2f}x, "
            f"floor {row['floor, weights read']:4.2f}x)   "
            f"memory {row['peak memory over backprop']:5.2f}x{process}   recording "
            f"{row['recording, microseconds a call']:4.0f} us a call, {row['recording over backprop']:.0%} "
            f"of backprop   1 - cosine {row['1 - cosine']:.0e}",
            flush=True,
        )
        write(options.out, rounds=options.rounds, load=os.getloadavg(), networks=found)  # a long run may be cut short


if __name__ == "__main__":
    main()

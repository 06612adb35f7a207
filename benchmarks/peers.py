"""Other ways to a gradient in the same process: time for one gradient, and its cosine with backprop's.

    python benchmarks/peers.py [--rounds 5] [--only resnet] [--out results/benchmarks/peers.json]

Ours (``hzo.baselines``: SPSA, MeZO, forward gradient), those of torchzero (``pip install torchzero``; left out where it
is missing), and coordinate-wise differences over all parameters as in DeepZero (Chen et al., ICLR 2024), of which a
share is measured and its time extrapolated. Interleaved rounds, one thread, medians of processor time; cosines are
means over the rounds, each with directions of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradients import Loss, by_backprop, by_hzo, flat_gradient, seconds
from hzo import baselines
from price import PROBLEMS
from record import write

try:
    import torchzero
except ImportError:
    torchzero = None


class WithLoss(nn.Module):
    """A model whose output is its loss: what baselines, which take a batch, are given."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, _: Tensor) -> Tensor:
        return self.loss(self.model)


def ours(method: Callable[..., Tensor]) -> Callable[[nn.Module, Loss], None]:
    """A baseline of ours, one direction."""

    def run(model: nn.Module, loss: Loss) -> None:
        method(WithLoss(model, loss), lambda value: value, torch.zeros(1, 1))

    return run


RATE = 1e-3


def of_torchzero(name: str) -> Callable[[nn.Module, Loss], None]:
    """An estimator of torchzero, as the step that it makes of plain gradient descent."""

    def run(model: nn.Module, loss: Loss) -> None:
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torchzero.Optimizer(model.parameters(), getattr(torchzero.m, name)(), torchzero.m.LR(RATE))

        def closure(backward: bool = True) -> Tensor:
            value = loss(model)
            if backward:
                optimizer.zero_grad()
                value.backward()
            return value

        optimizer.step(closure)
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.grad = (old - p) / RATE
                p.copy_(old)

    return run


METHODS: dict[str, Callable[[nn.Module, Loss], None]] = {
    "backprop": by_backprop,
    "hzo": by_hzo,
    "SPSA": ours(baselines.spsa),
    "MeZO": ours(baselines.mezo),
    "forward gradient": ours(baselines.forward_gradient),
}
if torchzero is not None:
    METHODS |= {f"torchzero {name}": of_torchzero(name) for name in ("SPSA", "RDSA", "MeZO", "ForwardGradient")}


@torch.no_grad()
def coordinates(model: nn.Module, loss: Loss, exact: Tensor, count: int, step: float = 5e-3) -> tuple[float, float]:
    """Forward differences along some coordinates: seconds for one, and the cosine with their exact derivatives."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([torch.arange(p.numel()) for p in parameters])
    owner = torch.cat([torch.full((p.numel(),), k) for k, p in enumerate(parameters)])
    chosen = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:count]
    found = []

    def run() -> None:
        base = float(loss(model))
        for k in chosen.tolist():
            place = parameters[int(owner[k])].data.view(-1)[int(flat[k])]
            before = place.clone()
            place += step
            found.append((float(loss(model)) - base) / step)
            place.copy_(before)

    took = seconds(run)
    return took / (count + 1), cosine(torch.tensor(found, dtype=torch.float64), exact[chosen])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def measure(name: str, rounds: int, count: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, loss = PROBLEMS[name]()
    by_backprop(model, loss)  # whatever is made once
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    cosines: dict[str, list[float]] = {method: [] for method in METHODS}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    exact = torch.empty(0)
    for at in range(rounds):
        for method, run in METHODS.items():
            model.load_state_dict(state)
            model.zero_grad()
            torch.manual_seed(at)
            times[method].append(seconds(lambda run=run: run(model, loss)))
            found = flat_gradient(model)
            exact = found if method == "backprop" else exact
            cosines[method].append(cosine(found, exact))
    unit = statistics.median(times["backprop"])
    row = {
        method: {
            "seconds": statistics.median(t),
            "over backprop": statistics.median(t) / unit,
            "cosine": statistics.mean(c),
        }
        for (method, t), c in zip(times.items(), cosines.values(), strict=True)
    }
    each, alike = coordinates(model, loss, exact, count)
    total = each * (len(exact) + 1)
    row["coordinate-wise differences, extrapolated"] = {
        "seconds": total, "over backprop": total / unit, "cosine": alike, "coordinates measured": count,
        "coordinates": len(exact),
    }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="ResNet-20, batch 128;MLP 16x64", help="parts of names, with ; between")
    parser.add_argument("--coordinates", type=int, default=40, help="how many are measured")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/peers.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in PROBLEMS:
        if not any(part.lower() in name.lower() for part in options.only.split(";")):
            continue
        found[name] = measure(name, options.rounds, options.coordinates)
        print(name)
        for method, row in found[name].items():
            print(f"  {method:45s} {row['over backprop']:10.2f}x   cosine {row['cosine']:+.4f}", flush=True)
    write(
        options.out, rounds=options.rounds, load=os.getloadavg(), networks=found,
        torchzero=None if torchzero is None else getattr(torchzero, "__version__", "installed"),
    )  # fmt: skip


if __name__ == "__main__":
    main()

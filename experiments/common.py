"""What the experiments share: networks, exact cotangents, comparisons, and how a result is written."""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import hzo
from hzo.train.environment import environment

RESULTS = Path(__file__).parents[1] / "results" / "planner"
WIDTH, BATCH = 64, 16
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
# Of plain stages: each contracts a little, so that 64 of them do not drown everything.
PLAIN_GAINS = {"tanh": 1.0, "relu": 0.95 * 2**0.5, "gelu": 1.4}


class Residual(nn.Module):
    """x + act(Wx)."""

    def __init__(self, width: int, activation: nn.Module, gain: float) -> None:
        super().__init__()
        self.linear, self.activation = linear(width, gain), activation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation(self.linear(x))


def linear(width: int, gain: float) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.normal_(layer.weight, std=gain / width**0.5)
    nn.init.zeros_(layer.bias)
    return layer


def network(kind: str, activation: str, depth: int, width: int = WIDTH, gain: float | None = None) -> nn.Sequential:
    """A ``residual`` chain near the unitary limit, or a ``plain`` one that contracts."""
    act = ACTIVATIONS[activation]
    if kind == "residual":
        return nn.Sequential(*(Residual(width, act(), 0.1 if gain is None else gain) for _ in range(depth)))
    gain = PLAIN_GAINS[activation] if gain is None else gain
    return nn.Sequential(*(nn.Sequential(linear(width, gain), act()) for _ in range(depth)))


def data(width: int = WIDTH, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, width), torch.randn(batch, width)


def exact_by_autograd(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    """The loss's cotangent at every boundary, in float64, of the weights as they are."""
    own = [p.detach().double() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    at: list[Tensor] = [x.double().requires_grad_()]
    for k, stage in enumerate(model):
        mine = {n[len(f"{k}.") :]: p for n, p in zip(names, own, strict=True) if n.startswith(f"{k}.")}
        at.append(torch.func.functional_call(stage, mine, (at[-1],)))
    return list(torch.autograd.grad(F.mse_loss(at[-1], y.double()), at))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0, eps=1e-300))


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def expected_error(chain: hzo.Chain, plan: hzo.Plan, boundary: int) -> float:
    """Squared relative error that a plan expects at a stage boundary."""
    graph = chain.traced
    position = graph.boundaries[boundary]
    assert plan.expected is not None
    return plan.expected.errors[position, graph.live[position][0]]


def squared_gain(calibration: hzo.Calibration, chain: hzo.Chain) -> float:
    """Mean growth of the cotangent's squared norm over a stage."""
    graph = chain.traced
    first = sum(calibration.norms[0, v] for v in graph.live[0])
    return float(max(first, 1e-300) ** (1 / len(graph.stages)))


def options(description: str, seed: int = 0, out: Path = RESULTS) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few points of the grid")
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=out)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    torch.manual_seed(found.seed)
    # Of the code that runs, which may have changed in the checkout by the time the result is written.
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found.commit = head.stdout.strip()
    return found


LONG = 1000  # rows: more go into a CSV file beside the JSON


def write(name: str, given: argparse.Namespace, figure: Figure, **content: Any) -> None:
    report = {
        "command": shlex.join(["python", f"experiments/{name}.py", *sys.argv[1:]]),
        "commit": given.commit,
        "environment": environment(),
        "seed": given.seed,
        **content,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    if len(rows := content.get("rows", [])) > LONG:
        write_rows(given.out / f"{name}.csv", rows)
        report["rows"] = f"{name}.csv"
    (given.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    figure.savefig(given.out / f"{name}.png", dpi=130)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Numbers to six digits: what is measured here is not known to more."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    body = [[cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[k]) for line in [list(columns), *body]) for k in range(len(columns))]
    for line in [list(columns), *body]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())

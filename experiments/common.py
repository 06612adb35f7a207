"""What the experiments share, beside networks and comparisons of ``hzo_lab.paper``: how a result is written."""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from hzo_lab.paper import ACTIVATIONS, BATCH, WIDTH, cosine, data, expected_error, network, relative_error, squared_gain
from hzo_lab.records import commit, environment

__all__ = [
    "ACTIVATIONS",
    "BATCH",
    "WIDTH",
    "cosine",
    "data",
    "exact_by_autograd",
    "expected_error",
    "network",
    "options",
    "relative_error",
    "squared_gain",
    "table",
    "write",
]

RESULTS = Path(__file__).parents[1] / "results" / "planner"


def exact_by_autograd(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    """The loss's cotangent at every boundary, in float64, of the weights as they are."""
    own = [p.detach().double() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    at: list[Tensor] = [x.double().requires_grad_()]
    for k, stage in enumerate(model):
        mine = {n[len(f"{k}.") :]: p for n, p in zip(names, own, strict=True) if n.startswith(f"{k}.")}
        at.append(torch.func.functional_call(stage, mine, (at[-1],)))
    return list(torch.autograd.grad(F.mse_loss(at[-1], y.double()), at))


def options(
    description: str, seed: int = 0, out: Path = RESULTS, parts: Sequence[str] = (), missing: bool = False
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if parts:
        parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all")
    if missing:
        parser.add_argument("--missing", action="store_true", help="only what the record does not have")
    parser.add_argument("--quick", action="store_true", help="a few points of the grid")
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=out)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    torch.manual_seed(found.seed)
    commit()  # of the code that runs, which may have changed in the checkout by the time the result is written
    return found


LONG = 1000  # rows: more go into a CSV file beside the JSON


def write(name: str, given: argparse.Namespace, figure: Figure, **content: Any) -> None:
    report = {
        "command": shlex.join(["python", f"experiments/{name}.py", *sys.argv[1:]]),
        "commit": commit(),
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

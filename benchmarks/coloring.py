"""Depth of a segment against colors, exact and approximate, with the measured error of the latter.

    python benchmarks/coloring.py                         # prints tables, writes results/benchmarks/coloring.json

A segment is d convolutions 3×3, zero-padded, each with a tanh, plain or residual; a node estimates the cotangent of
its input from a random one of its output. The exact coloring takes C (2d + 1)² directions until its window is wider
than the map. With a spacing k, elements k apart share a direction, with random signs, twice. Errors are relative to
autograd in float64: of the cotangent of the input, over all its elements.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hzo
from hzo_lab.records import environment


class Layer(nn.Module):
    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        nn.init.normal_(self.conv.weight, std=(1 / (9 * width)) ** 0.5)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.conv(x.tanh()) if self.residual else self.conv(x).tanh()


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def row(depth: int, residual: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Colors and errors for one depth."""
    torch.manual_seed(options.seed)
    model = nn.Sequential(*(Layer(options.width, residual) for _ in range(depth))).double().requires_grad_(False)
    x = torch.randn(options.batch, options.width, options.size, options.size, dtype=torch.float64)
    y = model(x) - torch.randn_like(x)  # the mean squared error then has a random cotangent
    leaf = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(nn.functional.mse_loss(model(leaf), y), leaf)
    chain = hzo.trace(hzo.Chain([model]), x)

    def plan(spacing: int | None) -> hzo.Plan:
        return hzo.plan(chain, tree="flat", assume="locality", boundaries="all", spacing=spacing)

    def estimate(plan: hzo.Plan) -> tuple[Tensor, float, float]:
        start = time.perf_counter()
        with hzo.report_crosstalk() as report, hzo.count_queries() as count:
            found = hzo.cotangents(chain, nn.functional.mse_loss, x, y, plan=plan)[0]
        assert isinstance(found, Tensor)
        assert count.queries == plan.queries
        return found, report.relative_error, time.perf_counter() - start

    whole = plan(None)
    colors = whole.nodes[0].probe.directions
    result: dict[str, Any] = {"depth": depth, "elements": x[0].numel(), "colors": colors, "approximate": []}
    if colors <= options.largest:
        found, _, seconds = estimate(whole)
        result |= {"error": relative(found, exact), "seconds": seconds}
    for spacing in options.spacings:
        thinned = plan(spacing)
        if not thinned.random:
            continue
        found, told, seconds = estimate(thinned)
        result["approximate"].append(
            {
                "spacing": spacing,
                "directions": thinned.nodes[0].probe.directions,
                "error": relative(found, exact),
                "error_reported": told,
                "seconds": seconds,
            }
        )
    return result


def table(rows: list[dict[str, Any]], spacings: list[int]) -> str:
    heads = ["depth", "exact colors", "error", *(f"spacing {k}" for k in spacings)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    for found in rows:
        thinned = {item["spacing"]: item for item in found["approximate"]}
        everything = " (all)" if found["colors"] == found["elements"] else ""
        cells = [str(found["depth"]), f"{found['colors']:,}{everything}"]
        cells.append(f"{found['error']:.0e}" if "error" in found else "not run")
        for k in spacings:
            item = thinned.get(k)
            cells.append(
                "–" if item is None else f"{item['directions']:,}: {item['error']:.3g} ({item['error_reported']:.3g})"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12])
    parser.add_argument("--spacings", type=int, nargs="+", default=[3, 5, 8])
    parser.add_argument("--width", type=int, default=4, help="channels")
    parser.add_argument("--size", type=int, default=24, help="height and width of the map")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--largest", type=int, default=700, help="run exact colorings of up to so many colors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/coloring.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/coloring.py", *sys.argv[1:]]),
        "environment": environment(),
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "segments": {},
    }
    for name, residual in (("plain", False), ("residual", True)):
        rows = [row(depth, residual, options) for depth in options.depths]
        result["segments"][name] = rows
        print(f"\n{name}, {options.width} channels, {options.size}×{options.size}, batch {options.batch};")
        print("approximate: directions: relative error (as reported without a reference)\n")
        print(table(rows, options.spacings))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()

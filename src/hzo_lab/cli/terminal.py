"""One run on a terminal: what is said before, shown during and told after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import typer
from rich.console import Console

from hzo.verification import GradientCheck
from hzo_lab.cli.interrupt import stop_on_interrupt
from hzo_lab.records import CURVES, METRICS
from hzo_lab.reports import clock, display, large, percent
from hzo_lab.training import Result, Run, train

DISAGREES = 3  # the loss does not agree with the gradient
INTERRUPTED, TERMINATED = 130, 143  # what a shell reports of a program that Ctrl-C, or SIGTERM, ended

# Where nobody's terminal sets a width (a file, a pipe), tables may be as wide as a page of the sources.
WIDTH = 120
console = Console(width=None if Console().is_terminal or "COLUMNS" in os.environ else WIDTH)
errors = Console(stderr=True)


def announce(running: Run, *, resumed: bool) -> None:
    config = running.config
    weights = sum(p.numel() for p in running.model.parameters())
    how = (
        f"{config.method} ({config.tree}, {config.assume}, {config.scheme})"
        if config.method == "hzo"
        else config.method
    )
    console.print(
        f"{config.model} ({weights:,} weights) learns {config.data} by {how}, seed {config.seed}, in "
        f"{running.out}" + (f", from step {running.counters.step}" if resumed else ""),
        highlight=False,
        soft_wrap=True,
    )


def print_check(found: GradientCheck) -> bool:
    """Say whether the loss agrees with a gradient, and where it does not; returns it."""
    console.print(str(found), highlight=False, soft_wrap=True, markup=False, style="" if found.holds else "red")
    return found.holds


def train_shown(running: Run, max_steps: int | None, go_on: str, logs: Sequence[str] = ()) -> Result:
    """Train under a display. Ctrl-C and SIGTERM save, say how to go on, and end the program."""

    def tell() -> None:
        console.print("Finishing this step, then saving. Once more stops at once.")

    try:
        with stop_on_interrupt(tell) as stop:
            with display(console) as watch:
                result = train(running, max_steps=max_steps, watch=watch, stop=lambda: bool(stop()), logs=logs)
            asked = stop()
    except KeyboardInterrupt:
        console.print(
            f"Stopped at once; what was done since the last checkpoint is lost. Go on with: {go_on}",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    if asked and not result.finished:
        console.print(
            f"Stopped at step {result.step}, all is saved. Go on with: {go_on}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(TERMINATED if asked == signal.SIGTERM else INTERRUPTED)
    return result


def conclude(result: Result, go_on: str) -> None:
    spent = f"{large(result.queries)} queries, {large(result.forward_equivalents)} forward equivalents"
    state = "Finished" if result.finished else f"Stopped at step {result.step} as asked"
    console.print(
        f"[bold]{state}: test accuracy {percent(result.test_accuracy)}[/], loss "
        f"{result.test_loss:.4f}; {spent}, "
        f"{clock(result.seconds)}.",
        highlight=False,
        soft_wrap=True,
    )
    for what, where in (
        ("curves", result.out / CURVES),
        ("log", result.out / METRICS),
        ("weights", result.checkpoint / "weights.safetensors"),
    ):
        console.print(f"  {what:8} {where}", highlight=False, soft_wrap=True)
    if not result.finished:
        console.print(f"Go on with: {go_on}", highlight=False, soft_wrap=True)

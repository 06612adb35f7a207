"""``hzo reproduce``: try a claim of the paper, write down what was found."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

import hzo
from hzo.errors import InputError
from hzo_lab.cli.commands import app
from hzo_lab.cli.options import among, one_of, whole_numbers
from hzo_lab.cli.terminal import INTERRUPTED, console, train_shown
from hzo_lab.paper import SCALES, Finding, Scale, Setting, record, registry
from hzo_lab.records import commit
from hzo_lab.reports import clock
from hzo_lab.training import STYLE, device_called, on_threads
from hzo_lab.training import train as train_to_the_end

OUT: dict[Scale, Path] = {
    "smoke": Path("runs/reproduction-smoke"),  # a quick look does not replace results of record
    "cpu": Path("results/reproduction"),
    "long": Path("results/reproduction/long"),
    "gpu": Path("results/reproduction"),
}
COLORS = {"holds": "green", "holds in part": "yellow", "does not hold": "red"}


@app.command("reproduce")
def reproduce_command(
    name: Annotated[
        str,
        typer.Argument(
            help=f"{one_of(registry.names())}; all; or list, to see what there is.",
            autocompletion=among((*registry.names(), "all", "list")),
        ),
    ] = "list",
    scale: Annotated[
        str, typer.Option(help=f"{one_of(SCALES)}: seconds; hours on two cores; a night on two cores; a GPU.")
    ] = "smoke",
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder that holds cifar-10-batches-py and a tree train/, val/ of ten ImageNet classes."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where records, and runs in training, go. Default: results/reproduction; long: its folder long; "
            "smoke: in runs/."
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Whole numbers, with commas between. Default: each's own.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: cpu; cuda at scale gpu.")] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of runs by hzo train: those of the same configuration are used. Repeatable."),
    ] = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Train the runs that are not there yet.")] = True,
) -> None:
    """Try a claim of the paper: writes NAME.json, NAME.csv and NAME.png, and says what holds.

    Runs that train are kept in OUT/runs: started again, the command goes on with them, and uses those that are done.
    """
    if name == "list":
        console.print(listing())
        return
    experiments = registry.find(name)
    size = scale_called(scale)
    setting = Setting(
        scale=size,
        out=OUT[size] if out is None else out,
        data_dir=data_dir,
        chosen=tuple(whole_numbers(seeds)) if seeds is not None else None,
        device=device_called(device or ("cuda" if scale == "gpu" else "cpu")),
        threads=threads,
        runs=tuple(runs or ()),
        train=train,
        # Whoever waits for hours sees how far it is; a run of seconds needs no display.
        train_run=train_to_the_end if size == "smoke" else lambda run: train_shown(run, None, "the same command"),
        tell=lambda line: console.print(f"  {line}", style="dim", highlight=False),
    )
    check_setting(setting)
    registry.check_data(experiments, setting)
    record.prepare_directory(setting.out)
    commit()  # of the code as it is now
    try:
        findings = {experiment.name: reproduce(experiment, setting) for experiment in experiments}
    except KeyboardInterrupt:
        console.print(
            f"Stopped. What was written, and runs in {setting.out / 'runs'}, is kept: the same command goes on.",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    console.print(verdicts(findings))


def scale_called(name: str) -> Scale:
    for scale in SCALES:
        if scale == name:
            return scale
    raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {name!r}.")


def check_setting(setting: Setting) -> None:
    if setting.chosen == ():
        raise InputError("expected at least one seed: --seeds 0,1,2.")
    for folder in setting.runs:
        if not folder.is_dir():
            raise InputError(f"expected runs of `hzo train` in {folder}, which is not a directory: check --runs.")


def reproduce(experiment: registry.Experiment, setting: Setting) -> Finding:
    """Run one claim, write its record, say what came of it."""
    began = time.monotonic()
    with on_threads(setting.threads), mpl.rc_context(STYLE):
        torch.manual_seed(0)
        with hzo.tolerate_rounding():  # how good estimates are is what claims are about
            finding = experiment.run(setting)
        where = record.write(experiment.name, setting, finding, time.monotonic() - began)
    color = COLORS[finding.verdict]
    console.print(
        f"[bold]{experiment.name}[/]: [{color}]{finding.verdict}[/]  {clock(time.monotonic() - began)}  {where}",
        highlight=False,
        soft_wrap=True,
    )
    return finding


def listing() -> Table:
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("name", no_wrap=True)
    shown.add_column("what is tried")
    shown.add_column("real data needed", no_wrap=True)
    shown.add_column("hours, --scale cpu", justify="right", no_wrap=True)
    for experiment in registry.EXPERIMENTS:
        shown.add_row(experiment.name, experiment.about, experiment.data or "-", f"{experiment.hours:g}")
    return shown


def verdicts(findings: dict[str, Finding]) -> Table:
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("name", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    shown.add_column("what we found")
    for name, finding in findings.items():
        shown.add_row(name, f"[{COLORS[finding.verdict]}]{finding.verdict}[/]", finding.found)
    return shown

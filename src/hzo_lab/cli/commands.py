"""The commands: ``hzo train``, ``hzo compare``, ``hzo plan``."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

import hzo
from hzo.errors import HzoError, InputError
from hzo_lab.cli.options import (
    Activation,
    AssumeName,
    Augment,
    BatchSize,
    Budget,
    CheckpointEvery,
    CosineEvery,
    DataDir,
    DataName,
    Decay,
    Depth,
    Device,
    Directions,
    DType,
    Epochs,
    ImageSize,
    Log,
    MethodName,
    ModelName,
    Optimizer,
    Rate,
    ScheduleName,
    SchemeName,
    Seed,
    Threads,
    TreeName,
    Width,
    given_options,
    listed,
    one_of,
    whole_numbers,
)
from hzo_lab.cli.plan_command import plan_command
from hzo_lab.cli.terminal import DISAGREES, announce, conclude, console, errors, print_check, train_shown
from hzo_lab.errors import CheckpointError
from hzo_lab.records import CONFIG
from hzo_lab.reports import compare as comparing
from hzo_lab.training import (
    Result,
    Run,
    TrainConfig,
    check_logs,
    on_threads,
    ranks_of,
    read_config,
    recipe,
    refuse_untestable,
    restarted,
    resume,
    run_id,
    start,
)
from hzo_lab.training import config as names

FAILED = 2

app = typer.Typer(
    help="Train deep networks with forward passes only.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        console.print(f"hzo {hzo.__version__} (torch {torch.__version__}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Train deep networks with forward passes only."""


def run() -> None:
    """Run the command line. An error raised on purpose becomes one line; others keep their traceback."""
    try:
        app()
    except HzoError as error:
        errors.print(f"[bold red]error:[/] [red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
        sys.exit(FAILED)


@app.command("train")
def train_command(
    data: DataName = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    augment: Augment = None,
    model: ModelName = None,
    depth: Depth = None,
    width: Width = None,
    activation: Activation = None,
    method: MethodName = None,
    tree: TreeName = None,
    assume: AssumeName = None,
    scheme: SchemeName = None,
    directions: Directions = None,
    epochs: Epochs = None,
    budget: Budget = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    optimizer: Optimizer = None,
    weight_decay: Decay = None,
    schedule: ScheduleName = None,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
    cosine_every: CosineEvery = None,
    checkpoint_every: CheckpointEvery = None,
    log: Log = None,
    check: Annotated[
        bool, typer.Option("--check", help="First test the gradient against the loss, by forward passes.")
    ] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after this step; --resume goes on.")] = None,
    out: Annotated[Path | None, typer.Option(help="New directory for the run. Default: one in runs/.")] = None,
    resume_dir: Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this directory.")] = None,
) -> None:
    """Train a network. Without options: a residual MLP learns handwritten digits by HZO in a minute or two."""
    given = given_options(locals())
    logs = check_logs(log or [])
    if resume_dir is not None:
        if out is not None:
            raise InputError("give --resume DIR to go on with a run or --out DIR to start one, not both.")
        running = _resume(resume_dir, given)
    else:
        config = recipe(**given)
        if check:
            refuse_untestable(config.method)
        among = ranks_of(config.device)
        where = out if out is not None else among.on_first(lambda: _free_directory(config))
        # Started anew by torchrun, with the same command: the run is there.
        again = restarted() and (where / CONFIG).is_file()
        running = _resume(where, given) if again else start(config, where)
    console.quiet = not running.ranks.first
    announce(running, resumed=resume_dir is not None or running.counters.step > 0)
    if check:
        with on_threads(running.config.threads):
            found = running.check() if running.ranks.first else None
        if not running.ranks.on_first(lambda: found is None or print_check(found)):
            raise typer.Exit(DISAGREES)
    go_on = " ".join([f"hzo train --resume {running.out}", *(f"--log {name}" for name in logs)])
    result = train_shown(running, max_steps, go_on, logs)
    conclude(result, go_on)


def _free_directory(config: TrainConfig) -> Path:
    name = f"{config.data}-{config.model}-{config.method}-{config.seed}"
    if run_id() is not None:  # torchrun finds it again when it starts the processes anew
        return Path("runs") / f"{name}-{run_id()}"
    candidates = (Path("runs") / (name if n == 1 else f"{name}-run{n}") for n in range(1, 10_000))
    for candidate in candidates:
        if not candidate.exists():
            return candidate
    raise CheckpointError("runs/ holds too many runs of this name: choose a directory with --out.")


def _resume(directory: Path, given: dict[str, Any]) -> Run:
    config = read_config(directory / CONFIG)
    # Where a run computes and where its data lie may change; what its numbers depend on may not.
    movable = {name: given.pop(name) for name in ("device", "data_dir") if name in given}
    for name, value in given.items():
        if value != (own := getattr(config, name)):
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"the run in {directory} has {name} = {own!r}, {option} asks for {value!r}: leave "
                f"{option} out to go "
                "on with it, or start a new run."
            )
    return resume(names.replace(config, **movable), directory)


@app.command("compare")
def compare_command(
    methods: Annotated[str, typer.Option(help="Names, with commas between.")] = "hzo,backprop,node-perturbation,spsa",
    seeds: Annotated[str, typer.Option(help="Whole numbers, with commas between.")] = "0,1,2",
    data: DataName = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    augment: Augment = None,
    model: ModelName = None,
    depth: Depth = None,
    width: Width = None,
    activation: Activation = None,
    tree: TreeName = None,
    assume: AssumeName = None,
    scheme: SchemeName = None,
    directions: Directions = None,
    epochs: Epochs = None,
    budget: Budget = None,
    batch_size: BatchSize = None,
    rates: Annotated[
        list[str] | None,
        typer.Option("--lr", help="Highest learning rate: of all methods, or METHOD=RATE. Repeatable."),
    ] = None,
    optimizer: Optimizer = None,
    weight_decay: Decay = None,
    schedule: ScheduleName = None,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
    cosine_every: CosineEvery = None,
    log: Log = None,
    out: Annotated[Path, typer.Option(help="New directory for the runs, the table and the plot.")] = Path(
        "runs/compare"
    ),
    resume_dir: Annotated[Path | None, typer.Option("--resume", help="Go on with the comparison in this one.")] = None,
) -> None:
    """Train several methods on the same data, seeds and order, for equal epochs or an equal budget."""
    given = given_options(locals())
    logs = check_logs(log or [])
    if resume_dir is not None:
        out = resume_dir
        configs = comparing.read(out)
    else:
        by_name = _rates(rates or [])
        configs = [
            recipe(**given, method=method, seed=seed, lr=by_name.get(method, by_name.get("")))
            for method in listed(methods)
            for seed in whole_numbers(seeds)
        ]
        if not configs:
            raise InputError("expected at least one method and one seed to compare.")
        comparing.begin(configs, out)

    def train_run(running: Run) -> Result:
        console.print(f"[bold]{running.config.method}[/], seed {running.config.seed}", highlight=False)
        return train_shown(running, None, f"hzo compare --resume {out}", logs)

    outcomes = comparing.compare(configs, out, train_run)
    console.print(comparing.table(outcomes))
    for what, name in (("table", comparing.TABLE), ("results", comparing.RESULTS), ("plot", comparing.PLOT)):
        console.print(f"  {what:8} {out / name}", highlight=False, soft_wrap=True)


def _rates(given: list[str]) -> dict[str, float]:
    """Learning rates by method; under the empty name, the one for all others."""
    rates = {}
    for text in given:
        method, _, number = text.rpartition("=")
        if method and method not in names.METHODS:
            raise InputError(f"expected --lr of one of {one_of(names.METHODS)}, got {method!r}.")
        try:
            rates[method] = float(number)
        except ValueError:
            raise InputError(f"expected --lr to be a number or METHOD=NUMBER, got {text!r}.") from None
    return rates


app.command("plan")(plan_command)

"""The commands: ``hzo train``, ``hzo compare``, ``hzo plan``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

import hzo
from hzo.errors import CheckpointError, HzoError, InputError
from hzo.train import compare as comparing
from hzo.train import config as names
from hzo.train import models
from hzo.train.config import TrainConfig, read_config
from hzo.train.display import clock, display, large, percent
from hzo.train.files import CONFIG, CURVES, METRICS
from hzo.train.interrupt import stop_on_interrupt
from hzo.train.loop import Result, train
from hzo.train.methods import make_plan
from hzo.train.recipes import recipe
from hzo.train.run import Run, resume, start

INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended
FAILED = 2

app = typer.Typer(
    help="Train deep networks with forward passes only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)


def run() -> None:
    """Run the command line. An error raised on purpose becomes one line; others keep their traceback."""
    try:
        app()
    except HzoError as error:
        errors.print(f"[bold red]error:[/] [red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
        sys.exit(FAILED)


def _one_of(choices: tuple[str, ...]) -> str:
    return ", ".join(choices)


DataName = Annotated[str | None, typer.Option("--data", help=f"{_one_of(names.DATA)}. Default: digits.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder of cifar10's or imagefolder's files.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of imagefolder's images, in pixels. Default: 64.")]
Augment = Annotated[bool | None, typer.Option(help="Shift and mirror training images. Default: yes.")]
Model = Annotated[str | None, typer.Option(help=f"{_one_of(names.MODELS)}. Default: mlp for digits, cnn for images.")]
Depth = Annotated[int | None, typer.Option(help="Blocks of the network (layers, of resnet20).")]
Width = Annotated[int | None, typer.Option(help="Units or channels of a block.")]
Activation = Annotated[str | None, typer.Option(help=f"{_one_of(names.ACTIVATIONS)}.")]
Method = Annotated[str | None, typer.Option(help=f"{_one_of(names.METHODS)}. Default: hzo.")]
Tree = Annotated[str | None, typer.Option(help=f"{_one_of(names.TREES)}, or a number of parts. Default: bisect.")]
Assume = Annotated[str | None, typer.Option(help=f"{_one_of(names.ASSUMPTIONS)}. Default: locality.")]
Scheme = Annotated[str | None, typer.Option(help=f"{_one_of(names.SCHEMES)}. Default: central.")]
Directions = Annotated[int | None, typer.Option(help="Random directions a gradient, for methods that draw any.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training data. Default: 10, of images 20.")]
Budget = Annotated[float | None, typer.Option(help="Forward equivalents to spend, instead of a number of epochs.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples a step.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Highest learning rate. Default: by data, model and method.")]
Optimizer = Annotated[str | None, typer.Option(help=f"{_one_of(names.OPTIMIZERS)}. Default: sgd.")]
Decay = Annotated[float | None, typer.Option(help="Weight decay. Default: 0.0005.")]
Schedule = Annotated[str | None, typer.Option(help=f"{_one_of(names.SCHEDULES)}. Default: one-cycle.")]
Seed = Annotated[int | None, typer.Option(help="Of weights, order, augmentation and directions. Default: 0.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: cpu.")]
DType = Annotated[str | None, typer.Option("--dtype", help=f"{_one_of(names.DTYPES)}. Default: float32.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the CPU. Default: 1 for digits, all for images.")]
CosineEvery = Annotated[
    int | None, typer.Option(help="Steps between measurements of the cosine with backprop; 0: none.")
]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: an epoch's.")]


@app.command("train")
def train_command(
    data: DataName = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    augment: Augment = None,
    model: Model = None,
    depth: Depth = None,
    width: Width = None,
    activation: Activation = None,
    method: Method = None,
    tree: Tree = None,
    assume: Assume = None,
    scheme: Scheme = None,
    directions: Directions = None,
    epochs: Epochs = None,
    budget: Budget = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    optimizer: Optimizer = None,
    weight_decay: Decay = None,
    schedule: Schedule = None,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
    cosine_every: CosineEvery = None,
    checkpoint_every: CheckpointEvery = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after this step; --resume goes on.")] = None,
    out: Annotated[Path | None, typer.Option(help="New directory for the run. Default: one in runs/.")] = None,
    resume_dir: Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this directory.")] = None,
) -> None:
    """Train a network. Without options: a residual MLP learns handwritten digits by HZO in a minute or two."""
    given = _given(locals())
    if resume_dir is not None:
        if out is not None:
            raise InputError("give --resume DIR to go on with a run or --out DIR to start one, not both.")
        running = _resume(resume_dir, given)
    else:
        config = recipe(**given)
        running = start(config, out if out is not None else _free_directory(config))
    _announce(running, resumed=resume_dir is not None)
    go_on = f"hzo train --resume {running.out}"
    result = _train(running, max_steps, go_on)
    _conclude(result, go_on)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as fields of a TrainConfig."""
    fields = {name: value for name, value in values.items() if name in TrainConfig.__dataclass_fields__}
    given = {name: value for name, value in fields.items() if value is not None}
    if "data_dir" in given:
        given["data_dir"] = str(given["data_dir"])
    if given.get("tree", "").lstrip("-").isdigit():
        given["tree"] = int(given["tree"])
    return given


def _free_directory(config: TrainConfig) -> Path:
    name = f"{config.data}-{config.model}-{config.method}-{config.seed}"
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


def _announce(running: Run, *, resumed: bool) -> None:
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


def _train(running: Run, max_steps: int | None, go_on: str) -> Result:
    """Train under a display. Ctrl-C saves, says how to go on, and ends the program."""

    def announce() -> None:
        console.print("Finishing this step, then saving. Ctrl-C again stops at once.")

    try:
        with stop_on_interrupt(announce) as stop:
            with display(console) as watch:
                result = train(running, max_steps=max_steps, watch=watch, stop=stop)
            interrupted = stop() and not result.finished
    except KeyboardInterrupt:
        console.print(
            f"Stopped at once; what was done since the last checkpoint is lost. Go on with: {go_on}",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    if interrupted:
        console.print(
            f"Stopped at step {result.step}, all is saved. Go on with: {go_on}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED)
    return result


def _conclude(result: Result, go_on: str) -> None:
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


@app.command("compare")
def compare_command(
    methods: Annotated[str, typer.Option(help="Names, with commas between.")] = "hzo,backprop,node-perturbation,spsa",
    seeds: Annotated[str, typer.Option(help="Whole numbers, with commas between.")] = "0,1,2",
    data: DataName = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    augment: Augment = None,
    model: Model = None,
    depth: Depth = None,
    width: Width = None,
    activation: Activation = None,
    tree: Tree = None,
    assume: Assume = None,
    scheme: Scheme = None,
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
    schedule: Schedule = None,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
    cosine_every: CosineEvery = None,
    out: Annotated[Path, typer.Option(help="New directory for the runs, the table and the plot.")] = Path(
        "runs/compare"
    ),
    resume_dir: Annotated[Path | None, typer.Option("--resume", help="Go on with the comparison in this one.")] = None,
) -> None:
    """Train several methods on the same data, seeds and order, for equal epochs or an equal budget."""
    given = _given(locals())
    if resume_dir is not None:
        out = resume_dir
        configs = comparing.read(out)
    else:
        by_name = _rates(rates or [])
        configs = [
            recipe(**given, method=method, seed=seed, lr=by_name.get(method, by_name.get("")))
            for method in _listed(methods)
            for seed in _numbers(seeds)
        ]
        if not configs:
            raise InputError("expected at least one method and one seed to compare.")
        comparing.begin(configs, out)

    def train_run(running: Run) -> Result:
        console.print(f"[bold]{running.config.method}[/], seed {running.config.seed}", highlight=False)
        return _train(running, None, go_on=f"hzo compare --resume {out}")

    outcomes = comparing.compare(configs, out, train_run)
    console.print(comparing.table(outcomes))
    for what, name in (("table", comparing.TABLE), ("results", comparing.RESULTS), ("plot", comparing.PLOT)):
        console.print(f"  {what:8} {out / name}", highlight=False, soft_wrap=True)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    parts = _listed(text)
    if not all(part.isdigit() for part in parts):
        raise InputError(f"expected seeds to be whole numbers with commas between (0,1,2), got {text!r}.")
    return [int(part) for part in parts]


def _rates(given: list[str]) -> dict[str, float]:
    """Learning rates by method; under the empty name, the one for all others."""
    rates = {}
    for text in given:
        method, _, number = text.rpartition("=")
        if method and method not in names.METHODS:
            raise InputError(f"expected --lr of one of {_one_of(names.METHODS)}, got {method!r}.")
        try:
            rates[method] = float(number)
        except ValueError:
            raise InputError(f"expected --lr to be a number or METHOD=NUMBER, got {text!r}.") from None
    return rates


@app.command("plan")
def plan_command(
    data: DataName = None,
    image_size: ImageSize = None,
    model: Model = None,
    depth: Depth = None,
    width: Width = None,
    activation: Activation = None,
    tree: Tree = None,
    assume: Assume = None,
    scheme: Scheme = None,
    batch_size: BatchSize = None,
) -> None:
    """Show what HZO would do for one gradient, and what it would cost, without running it. Needs no data."""
    config = recipe(**_given(locals()))
    side = {"digits": None, "cifar10": 32}.get(config.data, config.image_size)
    shape = (64,) if side is None else (3, side, side)
    network = models.build(
        config.model,
        shape,
        10,
        depth=config.depth,
        width=config.width,
        activation=config.activation,
        seed=config.seed,
    )
    example = torch.randn(config.batch_size, *shape, generator=torch.Generator().manual_seed(config.seed))
    chain = hzo.trace(network, example)
    print(make_plan(config, chain))

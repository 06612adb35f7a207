"""``hzo plan``: what one gradient would cost and be worth, shown, drawn, kept, and compared over trees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import hzo
from hzo.errors import InputError
from hzo.planner import as_mesh, with_mesh, words_of_parameters
from hzo_lab.cli.options import (
    Activation,
    AssumeName,
    BatchSize,
    DataDir,
    DataName,
    Depth,
    Device,
    DType,
    ImageSize,
    ModelName,
    SchemeName,
    Seed,
    Threads,
    TreeName,
    Width,
    given_options,
    numbers,
    whole_from_one,
)
from hzo_lab.cli.terminal import DISAGREES, console, print_check
from hzo_lab.reports import (
    PlannedNetwork,
    PlannedTree,
    all_trees,
    check_picture,
    comparison_table,
    draw,
    exact_cotangents,
    explanations,
    forward_seconds,
    measured,
    node_table,
    planned_network,
    totals,
)
from hzo_lab.training import loss_fn, on_threads, recipe

NOTHING = 1  # no tree could be planned; the reasons are in the table


def plan_command(
    data: DataName = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    model: ModelName = None,
    depth: Depth = None,
    width: Width = None,
    activation: Activation = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    dtype: DType = None,
    device: Device = None,
    threads: Threads = None,
    tree: TreeName = None,
    assume: AssumeName = None,
    scheme: SchemeName = None,
    step: Annotated[float | None, typer.Option(help="Distance of all differences. Default: chosen per node.")] = None,
    readout: Annotated[float | None, typer.Option(help="Noise of every element that a query returns.")] = None,
    process: Annotated[float | None, typer.Option(help="Noise that every stage adds to what it hands on.")] = None,
    repeats: Annotated[str | None, typer.Option(help="optimal (default) or uniform, with something aimed at.")] = None,
    target_cosine: Annotated[float | None, typer.Option(help="Cosine to keep at every boundary, cheaply.")] = None,
    gradient_budget: Annotated[
        float | None, typer.Option("--budget", help="Forward equivalents that one gradient may cost.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Time that one gradient may take; needs --calibrate.")] = None,
    memory: Annotated[int | None, typer.Option(help="Bytes for stored activations. Default: all are stored.")] = None,
    mesh: Annotated[str | None, typer.Option(help="Processes that share it, along sample and query: 2x4.")] = None,
    link: Annotated[
        str | None, typer.Option(help="Between them: seconds an exchange and words a second, 1e-4,1e8; for seconds.")
    ] = None,
    boundaries: Annotated[str | None, typer.Option(help="needed (default) by parameters, or all.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure gains, curvature and times first.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="All trees beside each other.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Run one gradient, and test it against the loss and against backprop.")
    ] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Run one gradient of each, counted.")] = False,
    longest: Annotated[
        float, typer.Option("--measure-seconds", min=0, help="Leave out what would run longer than this.")
    ] = 60.0,
    rows: Annotated[int, typer.Option(min=2, help="Nodes to show of the plan.")] = 24,
    load: Annotated[Path | None, typer.Option(help="A plan that --save wrote, for the same network.")] = None,
    save: Annotated[Path | None, typer.Option(help="JSON file to keep the plan in.")] = None,
    picture: Annotated[Path | None, typer.Option("--draw", help="Picture of the tree: a .svg or .png file.")] = None,
) -> None:
    """Show what HZO would do for one gradient, what it costs and how good it is expected to be, without training.

    Without options: the network and plan of `hzo train`. Real examples are used where they are at hand (digits, or
    --data-dir), else random ones of their shape.
    """
    config = recipe(**given_options(locals()))
    asked: dict[str, Any] = {
        "step": step,
        "noise": None if readout is None and process is None else hzo.Noise(readout or 0.0, process or 0.0),
        "repeats": repeats,
        "boundaries": boundaries,
        "target_cosine": target_cosine,
        "budget": gradient_budget,
        "seconds": seconds,
        "memory": memory,
        "mesh": None if mesh is None else numbers("mesh", mesh, "x", whole_from_one, "2x4, each at least 1"),
        "link": None if link is None else numbers("link", link, ",", float, "1e-4,1e8"),
    }
    options = {name: value for name, value in asked.items() if value is not None}
    if load is not None and (wrong := _beside_load(options, calibrate, tree, assume, scheme)):
        raise InputError(f"--load takes the plan as it is: leave out {', '.join(wrong)}, or leave out --load.")
    if seconds is not None and not calibrate:
        raise InputError("--seconds plans from measured times: add --calibrate.")
    if picture is not None:
        check_picture(picture)
    if load is not None and not load.is_file():
        raise InputError(f"expected a plan in {load}, which is not a file: write one with hzo plan --save {load}.")
    if save is not None and not save.parent.is_dir():
        raise InputError(f"expected --save to name a file in a directory that exists, got {save}: make it first.")
    options |= {"tree": config.tree, "assume": config.assume, "scheme": config.scheme}
    with on_threads(config.threads), console.status("tracing"):
        given = planned_network(config)
        _announce(given)
        if calibrate:
            kinds = {"assume": options["assume"], "scheme": options["scheme"]}
            options["calibration"] = hzo.calibrate(given.chain, given.x, loss_fn, given.y, **kinds)
    with on_threads(config.threads):
        shown = load is not None or save is not None or picture is not None or not compare
        outcomes: list[PlannedTree] = []
        if shown:
            with console.status("planning"):
                plan = hzo.plan(given.chain, **options) if load is None else _loaded(given, load, options)
            outcomes.append(PlannedTree("loaded" if load else str(plan.tree), repeats or "-", plan))
            _show(given, plan, rows, save, picture)
        if compare:
            with console.status("planning all trees"):
                outcomes = [*(outcomes if load else []), *all_trees(given, options)]
        if measure:
            outcomes = _measure(given, outcomes, options.get("noise"), longest)
        holds = not check or _checked(given, plan if shown else hzo.plan(given.chain, **options))
        if compare or measure:
            _print_outcomes(outcomes, config.assume, config.scheme)
            if all(outcome.plan is None for outcome in outcomes):
                raise typer.Exit(NOTHING)
        if not holds:
            raise typer.Exit(DISAGREES)


def _loaded(given: PlannedNetwork, load: Path, options: dict[str, Any]) -> hzo.Plan:
    """A plan from a file, with what it costs on the mesh that was given."""
    plan = hzo.load_plan(given.chain, load)
    graph = given.chain.traced
    mesh = as_mesh(options.get("mesh"), options.get("link"), words_of_parameters(graph))
    return plan if mesh is None else with_mesh(graph, plan, mesh)


def _beside_load(options: dict[str, Any], calibrate: bool, *chosen: str | None) -> list[str]:
    """Options that decide what a loaded plan has decided; noise stands beside it, to be measured under, and a mesh."""
    found = [f"--{name.replace('_', '-')}" for name in options if name not in ("noise", "mesh", "link")]
    found += ["--calibrate"] if calibrate else []
    names = ("--tree", "--assume", "--scheme")
    return found + [name for name, value in zip(names, chosen, strict=True) if value is not None]


def _announce(given: PlannedNetwork) -> None:
    config, weights = given.config, sum(parameter.numel() for parameter in given.model.parameters())
    examples = f"{config.data}" if given.real else f"random numbers in the shape of {config.data}"
    text = f"{config.model} ({weights:,} weights, {len(given.chain)} stages), {len(given.x)} examples: {examples}"
    console.print(text, highlight=False, soft_wrap=True)


def _show(given: PlannedNetwork, plan: hzo.Plan, rows: int, save: Path | None, picture: Path | None) -> None:
    console.print(node_table(plan, rows, console.width))
    for line in totals(plan):
        console.print(line, highlight=False, soft_wrap=True)
    if save is not None:
        hzo.save_plan(plan, save)
        console.print(f"  plan     {save}", highlight=False, soft_wrap=True)
    if picture is not None:
        draw(given.chain, plan, picture)
        console.print(f"  picture  {picture}", highlight=False, soft_wrap=True)


def _checked(given: PlannedNetwork, plan: hzo.Plan) -> bool:
    """The verdict on one gradient by this plan: of the loss, and of backprop."""
    with console.status("checking the gradient"):
        found = hzo.check_gradient(given.chain, loss_fn, given.x, given.y, plan=plan)
        compared = hzo.compare_gradients(given.chain, loss_fn, given.x, given.y, plan=plan)
    holds = print_check(found)
    worst = min(compared.cosines, key=compared.cosines.__getitem__)
    text = f"beside backprop: 1 − cosine {1 - compared.overall:.1e}, at worst {1 - compared.cosine:.1e} ({worst})"
    console.print(text, highlight=False, soft_wrap=True)
    return holds


def _measure(
    given: PlannedNetwork, outcomes: list[PlannedTree], noise: hzo.Noise | None, longest: float
) -> list[PlannedTree]:
    with console.status("measuring") as status:
        exact, one = exact_cotangents(given), forward_seconds(given)
        done: list[PlannedTree] = []
        for outcome in outcomes:
            status.update(f"measuring {outcome.tree}, {len(done) + 1} of {len(outcomes)}")
            done.append(measured(given, outcome, exact, noise, pass_seconds=one, longest=longest))
    return done


def _print_outcomes(outcomes: list[PlannedTree], assume: str, scheme: str) -> None:
    console.print(comparison_table(outcomes, f"assume {assume}, {scheme} differences"))
    for line in explanations(outcomes):
        console.print(line, highlight=False, soft_wrap=True, style="dim")

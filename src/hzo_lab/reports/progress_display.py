"""What a person sees of a run: a live bar in a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from hzo_lab.training import Progress

Watch = Callable[[Progress], None]
PLAIN_SECONDS = 10.0
LIVE_SECONDS = 0.1


def large(number: float) -> str:
    """A count in at most five characters: 940, 12.3 k, 4.56 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def clock(seconds: float | None) -> str:
    """Minutes and seconds, with hours where there are any."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def fields(progress: Progress) -> dict[str, str]:
    """The figures of a run in words, in the order in which they are shown."""
    return {
        "loss": f"{progress.loss:.4f}",
        "train": percent(progress.train_accuracy),
        "test": percent(progress.test_accuracy),
        "cosine": _cosine(progress.cosine),
        "queries": large(progress.queries),
        "forward eq.": large(progress.forward_equivalents),
    }


def _where(progress: Progress) -> str:
    epochs = "" if progress.epochs is None else f"/{progress.epochs}"
    return f"epoch {min(progress.epoch, progress.epochs or progress.epoch)}{epochs}"


@contextmanager
def display(console: Console) -> Iterator[Watch]:
    """A function to call after every step, for as long as the block lasts."""
    if console.is_terminal:
        with _live(console) as watch:
            yield watch
    else:
        yield _plain(console)


def _plain(console: Console) -> Watch:
    last = -PLAIN_SECONDS

    def watch(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        finished = progress.done >= 1
        if now - last < PLAIN_SECONDS and not finished:
            return
        last = now
        figures = "  ".join(f"{name} {value}" for name, value in fields(progress).items())
        left = "" if finished else f"  left {clock(progress.seconds_left)}"
        console.print(
            f"{_where(progress)}  step {progress.step}  {figures}  time {clock(progress.seconds)}{left}",
            highlight=False,
            soft_wrap=True,
        )

    return watch


@contextmanager
def _live(console: Console) -> Iterator[Watch]:
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[times]}", justify="right"),
        console=console,
        expand=True,
        auto_refresh=False,
    )
    task = bar.add_task("starting", total=1.0, times="")
    with Live(Group(bar), console=console, refresh_per_second=10, transient=False) as live:
        last = -LIVE_SECONDS

        def watch(progress: Progress) -> None:
            nonlocal last
            if time.monotonic() - last < LIVE_SECONDS and progress.done < 1:
                return
            last = time.monotonic()
            times = f"{clock(progress.seconds)} gone, {clock(progress.seconds_left)} left"
            bar.update(task, description=_where(progress), completed=progress.done, times=times)
            live.update(Group(bar, _figures(progress)))

        yield watch


def _figures(progress: Progress) -> Table:
    table = Table(box=None, expand=True, pad_edge=False, show_edge=False)
    values = fields(progress)
    for name in values:
        table.add_column(name, justify="right", header_style="dim", no_wrap=True)
    table.add_row(*(Text(value, style="bold") for value in values.values()))
    return table

"""The training loop: gradient, step, log, checkpoint; stopped anywhere, it goes on as if it had not been."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hzo._files import replace_file
from hzo_lab.data import batch_indices
from hzo_lab.errors import CheckpointError
from hzo_lab.records import (
    CURVES,
    METRICS,
    SUMMARY,
    MetricsLog,
    alone_in,
    commit,
    disk_errors,
    environment,
    generator,
    read_metrics,
)
from hzo_lab.training import checkpoint
from hzo_lab.training.learning_rate import relative_rate, set_rate
from hzo_lab.training.loggers import Logger, check_logs, loggers
from hzo_lab.training.plots import run_curves
from hzo_lab.training.run import Run

CHECKPOINT_SECONDS = 60.0

# Of a record in the log, in this order.
FIELDS = (
    "step", "epoch", "lr", "loss", "train_accuracy", "test_loss", "test_accuracy", "cosine", "queries",
    "stage_evaluations", "adjoints", "forward_equivalents", "cost", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """What a display may show after a step. ``total`` is None where a budget ends the run; values not
    measured yet are None, and so is ``seconds_left`` before the first step is done."""

    step: int
    total: int | None
    done: float
    epoch: int
    epochs: int | None
    loss: float
    train_accuracy: float | None
    test_accuracy: float | None
    cosine: float | None
    queries: int
    forward_equivalents: float
    seconds: float
    seconds_left: float | None


@dataclass(frozen=True)
class Result:
    """How a run ended: ``finished`` is False where it was stopped before its end and can be resumed."""

    out: Path
    finished: bool
    step: int
    loss: float
    test_loss: float
    test_accuracy: float
    queries: int
    forward_equivalents: float
    cost: float
    seconds: float
    checkpoint: Path


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    run: Run,
    *,
    max_steps: int | None = None,
    watch: Callable[[Progress], object] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    logs: Sequence[str] = (),
) -> Result:
    """Train to the end, to step ``max_steps``, or until ``stop()``; leaves a checkpoint in any case.

    Args:
        watch: called after every step, with what a display may show.
        stop: asked before every step.
        logs: copies of the log for other programs, of ``loggers.LOGS``.

    Raises:
        CheckpointError: another process trains in this directory, or the disk does not take what is written.
    """
    check_logs(logs)
    commit()  # of the code as it is now: a long run outlives its checkout
    with alone_in(run.out) if run.ranks.first else nullcontext():
        return _train(run, max_steps, watch, stop, logs)


def _train(
    run: Run,
    max_steps: int | None,
    watch: Callable[[Progress], object],
    stop: Callable[[], bool],
    logs: Sequence[str],
) -> Result:
    saved = checkpoint.latest(run.out) if run.ranks.first else None
    if saved is not None and checkpoint.step_of(saved) > run.counters.step:
        raise CheckpointError(
            f"another process went on with the run in {run.out} since it was read here: "
            f"`hzo train --resume {run.out}` goes on from where it is now."
        )
    with on_threads(run.config.threads):
        loss, newest = _steps(run, max_steps, watch, stop, logs)
        test_loss, test_accuracy = run.test()
    result = Result(
        out=run.out,
        finished=run.done >= 1,
        step=run.counters.step,
        loss=loss,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        queries=run.counters.queries,
        forward_equivalents=float(run.counters.forward_equivalents),
        cost=float(run.counters.cost),
        seconds=run.counters.seconds,
        checkpoint=newest,
    )
    if not run.ranks.first:
        return result
    write_summary(run, result)
    if records := read_metrics(run.out / METRICS):
        title = f"{run.config.model} on {run.config.data} by {run.config.method}, seed {run.config.seed}"
        run_curves(records, run.out / CURVES, title=title, method=run.config.method)
    return result


def _steps(
    run: Run,
    max_steps: int | None,
    watch: Callable[[Progress], object],
    stop: Callable[[], bool],
    logs: Sequence[str],
) -> tuple[float, Path]:
    """Train, log and save; returns the last loss and the newest checkpoint."""
    counters = run.counters
    began, before, at_start = time.monotonic(), counters.seconds, run.done
    seen: dict[str, Any] = {"loss": math.nan, "train_accuracy": None, "test_accuracy": None, "cosine": None}
    saved_at = time.monotonic()
    with ExitStack() as stack:
        log: MetricsLog | None = None
        past: list[dict[str, Any]] = []
        if run.ranks.first:
            log = stack.enter_context(MetricsLog(run.out / METRICS, lines=counters.log_lines, size=counters.log_bytes))
            past = read_metrics(log.path)
        for record in past:
            _remember(seen, record)
        copies: list[Logger] = stack.enter_context(loggers(logs if log else (), run.out, FIELDS, past))
        while run.done < 1 and (max_steps is None or counters.step < max_steps) and not run.ranks.any(bool(stop()))[0]:
            record = one_step(run)
            counters.seconds = before + time.monotonic() - began
            _remember(seen, record)
            if log is not None and len(record) > 1:
                record = {**record, "seconds": round(counters.seconds, 3)}
                log.append(record)
                for copy in copies:
                    copy.append(record)
            watch(_progress(run, seen, time.monotonic() - began, at_start))
            every = run.config.checkpoint_every
            due = counters.step % every == 0 if every else counters.position == 0
            # One of them says when a minute is over: their clocks are not one.
            if run.ranks.any(due or (log is not None and time.monotonic() - saved_at > CHECKPOINT_SECONDS))[0]:
                run.save(log)
                saved_at = time.monotonic()
        newest = run.save(log)
    return seen["loss"], newest


def one_step(run: Run) -> dict[str, Any]:
    """One gradient and one update. Returns the record to log; of a step that is not logged, the loss alone.

    Loss, training accuracy and cosine are of the weights before the update, the accuracy on the test split
    after it.
    """
    config, counters = run.config, run.counters
    position = counters.position
    own = () if run.ranks.first else (run.ranks.rank,)
    indices = run.ranks.share(batch_indices(len(run.data.train), run.batch_size, config.seed, counters.epoch, position))
    augment = generator(config.seed, "augment", counters.epoch, position, *own) if config.augment else None
    x, y = run.batch(run.data.train, indices, augment)
    rate = config.lr * relative_rate(config.schedule, run.done)
    set_rate(run.optimizer, rate)
    loss = run.gradient(x, y)

    measure_cosine = (
        config.cosine_every > 0 and config.method != "backprop" and counters.step % config.cosine_every == 0
    )
    cosine = run.cosine() if measure_cosine and run.ranks.first else None
    epoch_ends = position + 1 == run.steps_per_epoch
    epoch = counters.epoch + 1
    counters.step += 1
    counters.epoch, counters.position = (epoch, 0) if epoch_ends else (counters.epoch, position + 1)
    due = counters.step == 1 or counters.step % config.log_every == 0
    logged = due or measure_cosine or epoch_ends or run.done >= 1
    train_accuracy = run.accuracy(x, y) if logged else None
    run.optimizer.step()
    if not logged:
        return {"loss": loss}
    tested = run.ranks.first and (epoch_ends or run.done >= 1)
    test_loss, test_accuracy = run.test() if tested else (None, None)
    return {
        "step": counters.step,
        "epoch": epoch,
        "lr": rate,
        "loss": loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "cosine": cosine,
        "queries": counters.queries,
        "stage_evaluations": counters.stage_evaluations,
        "adjoints": counters.adjoints,
        "forward_equivalents": float(counters.forward_equivalents),
        "cost": float(counters.cost),
    }


def _remember(seen: dict[str, Any], record: Mapping[str, Any]) -> None:
    """Keep the latest of what is measured now and then."""
    seen.update({name: record[name] for name in seen if record.get(name) is not None})


def _progress(run: Run, seen: dict[str, Any], elapsed: float, at_start: float) -> Progress:
    counters, done = run.counters, run.done
    left = elapsed * (1 - done) / (done - at_start) if done > at_start else None
    return Progress(
        step=counters.step,
        total=run.total,
        done=done,
        epoch=counters.epoch + (counters.position > 0),
        epochs=None if run.config.budget is not None else run.config.epochs,
        queries=counters.queries,
        forward_equivalents=float(counters.forward_equivalents),
        seconds=counters.seconds,
        seconds_left=left,
        **seen,
    )


def write_summary(run: Run, result: Result) -> None:
    values = {
        "finished": result.finished,
        "step": result.step,
        "test_accuracy": result.test_accuracy,
        "test_loss": result.test_loss,
        "queries": result.queries,
        "stage_evaluations": run.counters.stage_evaluations,
        "adjoints": run.counters.adjoints,
        "forward_equivalents": result.forward_equivalents,
        "cost": result.cost,
        "seconds": round(result.seconds, 3),
        "checkpoint": str(result.checkpoint.relative_to(run.out)),
        "environment": {**environment(run.device), "threads": run.config.threads},
    }
    with disk_errors(f"writing {run.out / SUMMARY}", f"`hzo train --resume {run.out}`"):
        replace_file(run.out / SUMMARY, (json.dumps(values, indent=2) + "\n").encode())

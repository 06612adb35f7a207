"""Families one after the other, each in a process of its own with limits; results as JSON lines."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

from hzo.errors import InputError
from hzo_lab.records import disk_errors
from hzo_lab.zoo import engine
from hzo_lab.zoo.case import NotBuiltError
from hzo_lab.zoo.registry import Family, preload
from hzo_lab.zoo.trial import RAW, Record, try_family


@dataclass(frozen=True)
class Limits:
    """What one family may use: seconds of a processor, so that a busy machine changes no verdict, and memory.

    A process that sleeps is ended after ``4 · seconds`` of the clock.
    """

    seconds: float = 120.0
    gib: float = 12.0


def read_results(path: Path) -> list[Record]:
    """The records of a file; the last one of a family counts. A line that was cut off by a crash is skipped.

    Raises:
        InputError: the file cannot be read, or its lines are no records of a sweep.
    """
    found: dict[tuple[str, str, str], Record] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; give a file of hzo zoo with --results") from error
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not {"library", "family", "asked"} <= record.keys():
            raise InputError(f"{path} holds no records of hzo zoo; give a file that it wrote with --results")
        found[record["library"], record["family"], record["asked"]] = record
    return list(found.values())


def run(
    chosen: Iterable[Family],
    dtype: torch.dtype,
    path: Path,
    limits: Limits,
    again: bool = False,
    calls: bool = False,
    progress: Callable[[Record], None] = lambda _: None,
) -> list[Record]:
    """Try the families that the file has no record of (all, with ``again``), and append a line for each."""
    asked = str(dtype).removeprefix("torch.")
    done = set() if again else {(r["library"], r["family"]) for r in read_results(path) if r["asked"] == asked}
    made = []
    engine.preload()
    with disk_errors(f"opening {path}", "start again, or choose another --results"):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a", encoding="utf-8")
    with opened as file, disk_errors(f"writing {path}", "start again: what was tried before is kept"):
        for family in chosen:
            if (family.library, family.name) in done:
                continue
            with suppress(NotBuiltError):  # the family's own trial says so
                preload(family.library)
            record = {"asked": asked, **tried(family, dtype, limits, calls)}
            file.write(json.dumps(record, allow_nan=True) + "\n")
            file.flush()
            made.append(record)
            progress(record)
    return made


def tried(family: Family, dtype: torch.dtype, limits: Limits, calls: bool = False) -> Record:
    """Try one family in a process of its own; the last thing that it reported.

    The process is a fork of this one, which has imported the library: a fork takes milliseconds, an import seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report"
        start = time.monotonic()
        process = os.fork()
        if process == 0:
            _child(family, dtype, limits, calls, path)
        status = _wait(process, start + 4 * limits.seconds)
        reports = list(_reports(path))
    record: Record = reports[-1] if reports else {"library": family.library, "family": family.name, "verdict": RAW}
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) not in (signal.SIGKILL, signal.SIGXCPU)
    if not reports or died:
        record |= {"verdict": RAW, "reason": f"the process ended with status {status}"}
    return {**record, "wall_seconds": round(time.monotonic() - start, 2)}


def _child(family: Family, dtype: torch.dtype, limits: Limits, calls: bool, path: Path) -> None:
    """Everything that the forked process does. It never returns."""
    code = 0
    try:
        warnings.simplefilter("ignore")
        size = int(limits.gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        spent = int(time.process_time())  # a fork's clock starts anew, on Linux
        resource.setrlimit(resource.RLIMIT_CPU, (spent + ceil(limits.seconds), spent + ceil(limits.seconds) + 5))
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        with path.open("a", encoding="utf-8") as file:

            def report(record: dict[str, Any]) -> None:
                kept = {key: value for key, value in record.items() if key != "buffers"}
                file.write(json.dumps(kept) + "\n")
                file.flush()

            try_family(family, dtype, report, calls)
    except MemoryError:
        pass  # the last report says at which stage
    except BaseException as error:
        code = 1
        last = {
            "library": family.library,
            "family": family.name,
            "verdict": RAW,
            "reason": f"{type(error).__name__}: {error}",
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(last) + "\n")
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(process: int, until: float) -> int:
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
            return os.waitpid(process, 0)[1]
        time.sleep(0.01)


def _reports(path: Path) -> Iterator[Record]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return

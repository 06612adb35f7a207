"""Files of a run: written so that a kill, a crash or a full disk leaves the old state or the new one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hzo_lab.errors import CheckpointError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CURVES = "curves.png"
LOCK = ".lock"

_NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def disk_errors(doing: str, then: str) -> Iterator[None]:
    """Turn what the file system refuses into an error that says what was being done and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise CheckpointError(f"no space left on the disk while {doing}. Free some, then {then}.") from error
        reason = error.strerror or str(error)
        raise CheckpointError(f"{reason} while {doing}. Make it writable, then {then}.") from error


def refuse_used_directory(out: Path) -> None:
    """A directory that holds anything is never written to by a new run."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"expected {out} to be a directory for the run, it is a file: choose another --out.")
    if not out.is_dir() or not any(path.name != LOCK for path in out.iterdir()):
        return
    if (out / CONFIG).is_file():
        raise CheckpointError(
            f"{out} already holds a run: go on with it by `hzo train --resume {out}`, or choose another --out."
        )
    raise CheckpointError(f"expected {out} to be new or empty, it holds other files: choose another --out.")


def new_run_directory(out: Path) -> None:
    """Make ``out``, or take it if it is empty."""
    refuse_used_directory(out)
    with disk_errors(f"making the run directory {out}", "start again, or choose another --out"):
        out.mkdir(parents=True, exist_ok=True)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which the system releases whatever ends the process. Blocks may be nested.

    Raises:
        CheckpointError: another process holds it, or it cannot be written.
    """
    lock = FileLock(out / LOCK, timeout=0, thread_local=False, is_singleton=True)
    with disk_errors(f"locking the run directory {out}", "try again"):
        try:
            lock.acquire()
        except Timeout:
            raise CheckpointError(
                f"another process is training in {out}: wait until it ends or stop it, or choose another --out."
            ) from None
    try:
        yield
    finally:
        lock.release()


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line; knows how much of it there is, so it can be cut back.

    Unbuffered: what was logged is with the operating system when ``append`` returns.
    """

    def __init__(self, path: Path, *, lines: int = 0, size: int = 0) -> None:
        """Open the log at ``path`` and drop whatever lies beyond its first ``size`` bytes."""
        self.path = path
        self.lines = lines
        self.size = size
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise CheckpointError(
                f"{path} is shorter ({there} bytes) than the checkpoint says ({size}): lines of it are lost. "
                "Restore it, or start a new run with another --out."
            )
        with disk_errors(f"opening {path}", "try again"):
            self._file = path.open("ab", buffering=0)
            self._file.truncate(size)

    def append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        with disk_errors(f"writing {self.path}", f"`hzo train --resume {self.path.parent}`"):
            rest = line
            while rest:
                rest = rest[self._file.write(rest) :]
        self.lines += 1
        self.size += len(line)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a log. A last line that a kill cut short is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Give a directory that `hzo train` wrote.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise CheckpointError(
                f"{path}, line {number}, is not a JSON object: the file is damaged or not a run's log."
            )
        records.append(record)
    return records

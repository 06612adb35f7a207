"""Copies of a run's log for other programs: a table (CSV) and TensorBoard.

``metrics.jsonl`` is the log. A copy is made of it anew when a run is taken up again, so that it never holds lines
of steps that a resumed run takes once more.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from hzo.errors import InputError
from hzo_lab.records import disk_errors

LOGS = ("csv", "tensorboard")
TABLE = "metrics.csv"
EVENTS = "tensorboard"

Record = Mapping[str, Any]


class Logger(Protocol):
    """One copy of the log."""

    def append(self, record: Record) -> None:
        """Add the record of a step."""

    def close(self) -> None:
        """Write what is left, and let the files go."""


class CsvLogger:
    """``metrics.csv``: a line for each record, a column for each field; empty where it was not measured."""

    def __init__(self, run: Path, columns: Sequence[str]) -> None:
        self.path = run / TABLE
        with disk_errors(f"opening {self.path}", "try again"):
            self._file = self.path.open("w", encoding="utf-8", newline="", buffering=1)
        self._writer = csv.DictWriter(self._file, columns, extrasaction="ignore", lineterminator="\n")
        with disk_errors(f"writing {self.path}", "try again"):
            self._writer.writeheader()

    def append(self, record: Record) -> None:
        with disk_errors(f"writing {self.path}", f"`hzo train --resume {self.path.parent}`"):
            self._writer.writerow(record)

    def close(self) -> None:
        with disk_errors(f"closing {self.path}", f"`hzo train --resume {self.path.parent}`"):
            self._file.close()


class TensorBoardLogger:
    """``tensorboard/``: a scalar for each number of a record; look at it with ``tensorboard --logdir runs``.

    Raises:
        InputError: the package tensorboard is not installed.
    """

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (an extra)
        except ModuleNotFoundError as missing:
            raise InputError(
                f'--log tensorboard needs {missing.name}, which is not installed. Run: pip install "hzo[log]"'
            ) from None
        self.path = run / EVENTS
        with disk_errors(f"writing {self.path}", "try again"):
            shutil.rmtree(self.path, ignore_errors=True)
            self._writer = SummaryWriter(str(self.path))

    def append(self, record: Record) -> None:
        with disk_errors(f"writing {self.path}", f"`hzo train --resume {self.path.parent}`"):
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        with disk_errors(f"closing {self.path}", f"`hzo train --resume {self.path.parent}`"):
            self._writer.close()


def check_logs(names: Sequence[str]) -> tuple[str, ...]:
    """The names of logs, each once.

    Raises:
        InputError: an unknown name.
    """
    for name in names:
        if name not in LOGS:
            raise InputError(f"expected --log to be one of {', '.join(LOGS)}, got {name!r}.")
    return tuple(dict.fromkeys(names))


@contextmanager
def loggers(
    names: Sequence[str], run: Path, columns: Sequence[str], before: Sequence[Record]
) -> Iterator[list[Logger]]:
    """The logs of these names, open for as long as the block lasts, with the records of ``before`` in them."""
    with ExitStack() as stack:
        found: list[Logger] = []
        for name in check_logs(names):
            logger: Logger = CsvLogger(run, columns) if name == "csv" else TensorBoardLogger(run)
            stack.callback(logger.close)
            found.append(logger)
            for record in before:
                logger.append(record)
        yield found

"""A finding as files: ``NAME.json`` (what was found, and all that it takes to find it again), ``NAME.csv`` (the rows),
``NAME.png``."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hzo._files import replace_file
from hzo_lab.errors import CheckpointError
from hzo_lab.paper.finding import Finding, Row, Setting
from hzo_lab.records import disk_errors, environment
from hzo_lab.training import save


def prepare_directory(out: Path) -> None:
    """Make ``out``, and know that it can be written to before hours are spent on what goes there.

    Raises:
        CheckpointError: a file of that name, or no right to write.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"expected {out} to be a directory for the records, it is a file: choose another --out.")
    with disk_errors(f"making {out}", "start again, or choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        trial = out / ".writable"
        replace_file(trial, b"")
        trial.unlink()


def command_of(name: str, setting: Setting) -> str:
    """The command that makes the record again. Folders of this machine are DATA and RUNS in it: where they lie says
    nothing to a reader, and all that depends on what they hold is in the record."""
    words = ["hzo", "reproduce", name, "--scale", setting.scale]
    words += ["--data-dir", "DATA"] if setting.data_dir is not None else []
    words += ["--seeds", ",".join(map(str, setting.chosen))] if setting.chosen else []
    words += ["--device", str(setting.device)] if setting.device.type != "cpu" else []
    words += ["--threads", str(setting.threads)] if setting.threads != 1 else []
    words += ["--runs", "RUNS"] * len(setting.runs)
    words += [] if setting.train else ["--no-train"]
    return shlex.join(words)


def write(name: str, setting: Setting, finding: Finding, seconds: float) -> Path:
    """Write the three files of a finding; returns the JSON's path."""
    out = setting.out
    values = {
        "name": name,
        "claim": finding.claim,
        "found": finding.found,
        "verdict": finding.verdict,
        "summary": dict(finding.summary),
        "notes": list(finding.notes),
        "scale": setting.scale,
        "seeds": list(finding.seeds),
        "configuration": dict(finding.configuration),
        "command": command_of(name, setting),
        "environment": environment(setting.device),
        "wall_seconds": round(seconds, 1),
        "rows": f"{name}.csv",
        "plot": f"{name}.png",
    }
    with disk_errors(f"writing the record of {name} in {out}", "run the command again"):
        replace_file(out / f"{name}.csv", rows_as_csv(finding.rows).encode())
        replace_file(out / f"{name}.json", (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
    save(finding.plot, out / f"{name}.png")
    return out / f"{name}.json"


def rows_as_csv(rows: Sequence[Row]) -> str:
    """One line a row, one column for each key that any row has. Eight digits: 1 − cosine may start at the seventh."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value

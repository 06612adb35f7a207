"""Files of a run: a log that survives a kill, a directory that belongs to one process."""

import errno
import subprocess
import sys

import pytest

from hzo_lab.errors import CheckpointError
from hzo_lab.records.files import CONFIG, MetricsLog, alone_in, new_run_directory, read_metrics


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1})
        lines, size = log.lines, log.size
        log.append({"step": 2})
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')  # what a kill leaves
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    with MetricsLog(path, lines=lines, size=size) as log:
        log.append({"step": 2, "again": True})
        assert log.lines == 2
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "again": True}]


def test_a_log_that_lost_lines_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    with pytest.raises(CheckpointError, match="shorter"):
        MetricsLog(path, lines=9, size=900)


def test_a_damaged_log_names_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_metrics(path)


def test_a_full_disk_while_logging_is_a_clear_error(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")

    class Full:
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    log._file.close()
    log._file = Full()
    with pytest.raises(CheckpointError, match="no space left"):
        log.append({"step": 1})


def test_a_directory_with_files_is_not_taken(tmp_path):
    new_run_directory(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="new or empty"):
        new_run_directory(tmp_path / "run")
    (tmp_path / "run" / CONFIG).write_text("{}")
    with pytest.raises(CheckpointError, match="already holds a run"):
        new_run_directory(tmp_path / "run")


def held_by_another(tmp_path):
    """What another process is told that wants the directory."""
    code = "from pathlib import Path; from hzo_lab.records.files import alone_in; "
    code += f"alone_in(Path({str(tmp_path)!r})).__enter__()"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


def test_one_process_holds_a_directory(tmp_path):
    with alone_in(tmp_path), alone_in(tmp_path):  # blocks of one process may be nested
        other = held_by_another(tmp_path)
    assert other.returncode != 0
    assert "another process is training" in other.stderr
    assert held_by_another(tmp_path).returncode == 0

"""``hzo reproduce`` as a person meets it: all claims at smoke scale once, what it writes, what it refuses."""

import csv
import json
import sys

import pytest

from hzo_lab.cli import main
from hzo_lab.paper import registry
from hzo_lab.paper.finding import SCALES

PNG = b"\x89PNG"


def reproduce(*arguments):
    """Run ``hzo reproduce``; returns its exit code."""
    before, sys.argv = sys.argv, ["hzo", "reproduce", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            main.main()
    finally:
        sys.argv = before
    return ended.value.code or 0


def test_all_claims_at_smoke_scale(tmp_path):
    """In one test: whatever runs tests in parallel, they are tried once."""
    assert reproduce("all", "--scale", "smoke", "--out", tmp_path) == 0
    verdicts = {name: check_record(tmp_path, name) for name in registry.names()}
    exact = {name: verdicts[name] for name in ("theorem1", "complexity", "fig4", "spatial")}
    assert exact == dict.fromkeys(exact, "holds")  # whatever the size


def check_record(out, name):
    """Whether a record says all that it takes to find it again; returns its verdict."""
    record = json.loads((out / f"{name}.json").read_text())
    for field in ("claim", "found", "verdict", "summary", "configuration", "seeds", "wall_seconds"):
        assert record[field], (name, field)
    assert record["command"] == f"hzo reproduce {name} --scale smoke"
    assert {"commit", "torch", "python", "hardware", "cores", "threads", "device"} <= record["environment"].keys()
    assert str(out) not in json.dumps(record)  # where it lay on the machine that made it says nothing to others
    with (out / record["rows"]).open() as file:
        assert len(list(csv.DictReader(file))) > 1
    assert (out / record["plot"]).read_bytes().startswith(PNG)
    return record["verdict"]


def test_list_shows_every_claim(capsys):
    assert reproduce("list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in registry.names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig9"], "fig4"),
        (["fig4", "--scale", "huge"], ", ".join(SCALES)),
        (["fig4", "--seeds", "one"], "whole numbers"),
        (["fig4", "--seeds", ","], "at least one seed"),
        (["fig4", "--out", "file"], "choose another --out"),
        (["fig4", "--out", "file/below"], "--out"),
        (["fig4", "--data-dir", "nowhere"], "--data-dir"),
        (["fig4", "--runs", "nowhere"], "--runs"),
        (["fig4", "--device", "cuda:77"], "device"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert reproduce(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]

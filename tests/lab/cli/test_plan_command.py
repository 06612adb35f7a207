"""``hzo plan``: what it shows, keeps, draws and compares, and what it says of things that do not go together."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import hzo
from hzo_lab.cli import main, terminal
from hzo_lab.reports import plan_drawing, plan_report
from hzo_lab.training.recipes import recipe

SMALL = ["--depth", "3", "--width", "6", "--batch-size", "4"]
NOISE = ["--assume", "nothing", "--readout", "1e-3", "--boundaries", "all"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal.console, "width", 120)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``hzo plan``; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hzo", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


def test_the_plan_of_the_main_job_is_shown_without_options(command):
    code, out, err = command()
    assert (code, err) == (0, "")
    assert "tree bisect, assume locality, central differences" in out
    plan = hzo.plan(plan_report.planned_network(recipe()).chain, **hzo.presets.paper)
    assert f"{plan.queries:,} queries" in out
    assert f"{plan.forward_equivalents:,.2f} forward equivalents" in out
    assert re.search(r"… \d+ more …", out)
    table = out.split("one gradient")[0]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 120
    assert "…" not in re.sub(r"… \d+ more …", "", table)


def test_repeats_steps_and_cosines_are_shown(command):
    code, out, _ = command(*SMALL, *NOISE, "--target-cosine", "0.999")
    assert code == 0
    expected = float(re.search(r"lowest cosine ([\d.]+)", out)[1])
    assert 0.999 <= expected < 1
    cosines = [float(row.split()[-1]) for row in out.splitlines() if " coordinate " in row]
    assert min(cosines) == expected
    assert len(cosines) == 5 + 3


def test_a_plan_is_saved_loaded_and_drawn(command):
    code, out, _ = command(*SMALL, *NOISE, "--save", "a.json", "--draw", "a.svg")
    assert code == 0
    assert Path("a.svg").read_text().startswith("<?xml")
    edges = json.loads(Path("a.json").read_text())["edges"]
    assert len(edges) == 8
    again = command(*SMALL, "--load", "a.json", "--save", "b.json", "--draw", "b.svg")
    assert again[0] == 0
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes()
    totals = [text[text.index("one gradient") :].splitlines()[:3] for text in (out, again[1])]
    assert totals[0] == totals[1]


def test_all_trees_beside_each_other(command):
    code, out, _ = command(*SMALL, *NOISE, "--compare", "--target-cosine", "0.999")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if re.search("uniform|optimal", line)]
    assert [row[0] for row in rows] == [t for t in ("flat", "stagewise", "bisect", "4-ary", "planned") for _ in "ab"]
    assert all(float(row[-1]) >= 0.999 for row in rows)
    cost = {(row[0], row[1]): float(row[-2].replace(",", "")) for row in rows}
    for tree, _ in cost:
        assert cost["planned", "optimal"] <= cost[tree, "optimal"] + 0.01
        assert cost[tree, "optimal"] <= cost[tree, "uniform"] * 1.05
    assert "one gradient of 4" not in out  # no plan was asked for


def test_what_is_counted_is_what_was_predicted(command):
    code, out, _ = command(*SMALL, *NOISE, "--compare", "--measure", "--activation", "tanh", "--step", "0.1")
    assert code == 0
    rows = [
        line.split() for line in out.splitlines() if line.startswith((*plan_report.COMPARED[:3], "4-ary", "planned"))
    ]
    assert len(rows) == 5
    for *_, predicted, cosine, counted, expected, measured, took in rows:
        assert predicted == counted
        assert cosine <= expected
        assert 0.95 < float(measured) <= 1
        assert float(took) > 0


def test_a_calibrated_plan_tells_the_time(command):
    code, out, _ = command(*SMALL, *NOISE, "--calibrate", "--measure")
    assert code == 0
    assert re.search(r"lowest cosine [\d.]+ at .*, [\d.e-]+ seconds", out)
    assert "measured" in out
    code, out, _ = command(*SMALL, *NOISE, "--calibrate", "--seconds", "0.5")
    assert code == 0
    assert 0.25 < float(re.search(r", ([\d.e-]+) seconds", out)[1]) <= 0.5


def test_the_exact_cotangents_are_those_of_autograd():
    given = plan_report.planned_network(recipe(depth=2, width=5, batch_size=4))
    exact = plan_report.exact_cotangents(given)
    model, x = given.model.double(), given.x.double().requires_grad_()
    torch.nn.functional.cross_entropy(model(x), given.y).backward()
    torch.testing.assert_close(exact[0], x.grad, rtol=1e-6, atol=1e-9)


def test_a_plan_is_measured_under_its_own_noise(command):
    command(*SMALL, "--assume", "nothing", "--readout", "0.05", "--step", "0.1", "--save", "a.json")
    _, out, _ = command(*SMALL, "--load", "a.json", "--measure")
    (row,) = [line.split() for line in out.splitlines() if line.startswith("loaded")]
    assert float(row[-2]) < 0.999
    _, out, _ = command(*SMALL, "--load", "a.json", "--measure", "--readout", "0")
    (row,) = [line.split() for line in out.splitlines() if line.startswith("loaded")]
    assert float(row[-2]) > 0.999


def test_reasons_stand_in_the_rows(command):
    code, out, _ = command(*SMALL, *NOISE, "--compare", "--measure", "--measure-seconds", "0")
    assert code == 0
    assert "not run: would take about" in " ".join(out.split())
    resnet = ["--data", "cifar10", "--model", "resnet20", "--depth", "8", "--width", "2", "--batch-size", "2"]
    code, out, err = command(*resnet, "--compare", "--assume", "structure")
    assert (code, err) == (0, "")
    assert "random numbers in the shape of cifar10" in out
    assert "samples of a batch influence each other" in " ".join(out.split())
    assert re.search(r"planned +- +[\d.]+", out)
    code, out, _ = command(*SMALL, *NOISE, "--compare", "--budget", "0.01")
    assert code == 1
    assert out.count("the cheapest plan takes") == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draw", "a.pdf"], ".svg or .png"),
        (["--draw", "no/a.png"], "directory that exists"),
        (["--save", "no/a.json"], "directory that exists"),
        (["--load", "none.json"], "not a file"),
        (["--load", "text.json"], "JSON"),
        (["--load", "other.json"], "another chain"),
        (["--load", "other.json", "--tree", "flat", "--calibrate"], "leave out --calibrate, --tree"),
        (["--seconds", "1"], "--calibrate"),
        (["--readout", "-1"], "standard deviation"),
        (["--step", "0"], "positive finite step"),
        (["--target-cosine", "2"], "between 0 and 1"),
        (["--target-cosine", "0.9", "--budget", "9"], "one of target_cosine"),
        (["--budget", "0.001"], "the cheapest plan takes"),
        (["--boundaries", "some"], "'needed', 'all'"),
        (["--repeats", "often"], "'optimal', 'uniform'"),
        (["--memory", "10"], "allows neither"),
        (["--tree", "oak"], "bisect"),
        (["--model", "cnn"], "--model mlp"),
    ],
)
def test_an_error_is_one_line_and_code_2(command, arguments, message):
    Path("text.json").write_text("a plan")
    chain = hzo.trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), torch.randn(2, 2))
    hzo.save_plan(hzo.plan(chain), "other.json")
    code, _, err = command(*SMALL, *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["other.json", "text.json"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tree": "flat", "noise": 1e-3, "target_cosine": 0.99999, "boundaries": "all"},
        {"tree": "stagewise", "assume": "nothing", "noise": 1e-3, "step": 0.1, "repeats": "uniform", "budget": 500.0},
    ],
)
def test_any_plan_can_be_drawn(options):
    for layers in (1, 2, 12):
        model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(layers)))
        chain = hzo.trace(model, torch.randn(2, 3))
        plan_drawing.draw(chain, hzo.plan(chain, **options), Path("a.png"))
        assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_becomes_a_clause():
    assert plan_report.brief("it takes 3 seconds (or so), more than 2; give more") == "it takes 3 seconds, more than 2"
    assert plan_report.brief("x" * 200).endswith("…")


def test_a_mesh_is_reckoned_with(command, tmp_path):
    code, out, _ = command(*SMALL, "--tree", "flat", "--mesh", "1x3", "--calibrate", "--link", "1e-4,1e8")
    assert code == 0
    assert re.search(r"on 1 × 3 processes \(sample × query\), each at most 4 samples, [\d,]+ queries, .* seconds", out)
    assert command(*SMALL, "--tree", "flat", "--save", tmp_path / "plan.json")[0] == 0
    code, out, _ = command(*SMALL, "--load", tmp_path / "plan.json", "--mesh", "2x2")
    assert code == 0
    assert "on 2 × 2 processes" in out
    for mesh in ("3", "2,2", "axb", "0x2"):
        code, _, err = command(*SMALL, "--mesh", mesh)
        assert code == 2
        assert "mesh to be" in err
    code, _, err = command(*SMALL, "--mesh", "99999999999999999999x1")
    assert code == 2
    assert "at most 10,000,000 processes, got 99999999999999999999 × 1" in " ".join(err.split())


def test_the_verdict_on_a_gradient(command):
    code, out, _ = command(*SMALL, "--check")
    assert code == 0
    assert "the gradient agrees with the loss" in out
    found = re.search(r"beside backprop: 1 − cosine (\S+), at worst (\S+) \(", out)
    assert float(found[1]) <= float(found[2]) < 1e-6


def test_the_verdict_on_a_wrong_gradient(command, monkeypatch):
    from hzo.rules.base import rules

    addmm = torch.ops.aten.addmm.default
    right = rules[addmm].vjp
    wrong = lambda call: {k: g if g is None else 2 * g for k, g in right(call).items()}  # noqa: E731
    monkeypatch.setitem(rules, addmm, dataclasses.replace(rules[addmm], vjp=wrong))
    code, out, _ = command(*SMALL, "--check", "--assume", "structure")
    assert code == 3
    assert "DISAGREES" in out
    assert "aten.addmm.default" in out

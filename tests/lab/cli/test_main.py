"""The command line, as a person meets it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hzo_lab.cli import main, terminal

SMALL = ["--depth", "2", "--width", "8", "--batch-size", "64", "--epochs", "1"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every command runs in a directory of its own, on a wide page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)


@pytest.fixture
def hzo(monkeypatch, capsys):
    """Run a command line; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hzo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


def test_train_leaves_a_run_directory_and_says_where(hzo):
    code, out, _ = hzo("train", *SMALL, "--seed", 3)
    assert code == 0
    assert "test accuracy" in out
    run = Path("runs/digits-mlp-hzo-3")
    for name in ("config.json", "metrics.jsonl", "curves.png", "summary.json"):
        assert (run / name).is_file()
    assert str(run / "curves.png") in out
    assert list(run.glob("checkpoints/*/weights.safetensors"))
    config = json.loads((run / "config.json").read_text())
    assert (config["tree"], config["assume"], config["scheme"], config["seed"]) == ("bisect", "locality", "central", 3)


@pytest.mark.parametrize("method", ["hzo", "backprop"])
def test_train_tests_the_gradient_before_the_first_step(hzo, method):
    code, out, _ = hzo("train", *SMALL, "--method", method, "--check", "--max-steps", 1, "--out", "a")
    assert code == 0
    assert "the gradient agrees with the loss" in out
    plain = hzo("train", *SMALL, "--method", method, "--max-steps", 1, "--out", "b")
    assert plain[0] == 0
    kept = [json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[0]) for run in ("a", "b")]
    for record in kept:
        record.pop("seconds")
    assert kept[0] == kept[1]  # the test left no trace


def test_train_does_not_begin_with_a_gradient_that_disagrees(hzo, monkeypatch):
    from hzo.rules.base import rules

    addmm = torch.ops.aten.addmm.default
    right = rules[addmm].vjp
    wrong = lambda call: {k: g if g is None else 2 * g for k, g in right(call).items()}  # noqa: E731
    monkeypatch.setitem(rules, addmm, dataclasses.replace(rules[addmm], vjp=wrong))
    code, out, _ = hzo("train", *SMALL, "--check", "--out", "a")
    assert code == 3
    assert "the gradient DISAGREES with the loss" in out
    assert "aten.addmm.default" in out
    assert not Path("a/metrics.jsonl").exists()


def test_estimates_that_are_right_on_average_are_not_tested(hzo):
    code, _, err = hzo("train", *SMALL, "--check", "--method", "spsa", "--out", "a")
    assert code == 2
    assert "right on average" in err
    assert not Path("a").exists()


def test_the_default_is_the_preset_of_the_paper():
    from hzo import presets
    from hzo_lab.training.recipes import recipe

    main_job = recipe()
    assert (main_job.data, main_job.model, main_job.method) == ("digits", "mlp", "hzo")
    assert {"tree": main_job.tree, "assume": main_job.assume, "scheme": main_job.scheme} == dict(presets.paper)


def test_a_second_run_takes_another_directory(hzo):
    for _ in range(2):
        assert hzo("train", *SMALL, "--method", "backprop", "--max-steps", 1)[0] == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["digits-mlp-backprop-0", "digits-mlp-backprop-0-run2"]


def test_stop_and_resume(hzo):
    code, out, _ = hzo("train", *SMALL, "--max-steps", 3, "--out", "a")
    assert code == 0
    assert "hzo train --resume a" in out
    code, out, _ = hzo("train", "--resume", "a")
    assert code == 0
    assert "from step 3" in out
    assert json.loads(Path("a/summary.json").read_text())["finished"]


def test_what_a_resumed_run_depends_on_cannot_change(hzo):
    hzo("train", *SMALL, "--max-steps", 1, "--out", "a")
    assert hzo("train", "--resume", "a", "--epochs", 1, "--max-steps", 2)[0] == 0  # the same value is no change
    code, _, err = hzo("train", "--resume", "a", "--batch-size", 9)
    assert code == 2
    assert "--batch-size" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "mnist"], "digits, cifar10, imagefolder"),
        (["train", "--data", "cifar10"], "--data-dir"),
        (["train", "--data", "cifar10", "--data-dir", "nowhere"], "does not exist"),
        (["train", "--model", "cnn"], "--model mlp"),
        (["train", "--tree", "oak"], "bisect"),
        (["train", "--tree", "1"], "2 or more"),
        (["train", "--lr", "nan"], "lr"),
        (["train", "--device", "cuda:77"], "device"),
        (["train", "--resume", "nowhere"], "start a new run"),
        (["train", "--resume", "a", "--out", "b"], "not both"),
        (["train", "--out", "used"], "--out"),
        (["train", "--log", "xml"], "csv, tensorboard"),
        (["compare", "--methods", "magic"], "magic"),
        (["compare", "--methods", ""], "at least one"),
        (["compare", "--seeds", "a"], "whole numbers"),
        (["compare", "--lr", "fast"], "METHOD=NUMBER"),
        (["compare", "--lr", "magic=1"], "magic"),
    ],
)
def test_an_error_is_one_line_and_code_2(hzo, arguments, message):
    Path("used").mkdir()
    Path("used/file").write_text("x")
    code, _, err = hzo(*arguments)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(p.name for p in Path().iterdir()) == ["used"]


def test_a_wrong_option_is_explained(hzo):
    code, _, err = hzo("train", "--epochs", "many")
    assert code == 2
    assert "--epochs" in err


def test_ctrl_c_saves_and_says_how_to_go_on(hzo, monkeypatch):
    @contextmanager
    def display(console):
        yield lambda progress: signal.raise_signal(signal.SIGINT) if progress.step == 4 else None

    monkeypatch.setattr(terminal, "display", display)
    before = signal.getsignal(signal.SIGINT)
    code, out, _ = hzo("train", *SMALL, "--out", "a")
    assert code == 130
    assert "hzo train --resume a" in out
    assert signal.getsignal(signal.SIGINT) is before
    assert Path("a/checkpoints/step-00000004").is_dir()


def test_a_second_ctrl_c_stops_at_once(hzo, monkeypatch):
    @contextmanager
    def display(console):
        def watch(progress):
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

        yield watch

    monkeypatch.setattr(terminal, "display", display)
    code, out, _ = hzo("train", *SMALL, "--out", "a")
    assert code == 130
    assert "Stopped at once" in out


def test_compare_prints_one_table(hzo):
    code, out, _ = hzo(
        "compare",
        *SMALL,
        "--methods",
        "hzo,backprop",
        "--seeds",
        "0,1",
        "--out",
        "c",
        "--lr",
        "0.05",
        "--lr",
        "hzo=0.04",
    )
    assert code == 0
    assert "accuracy, %" in out
    assert "±" in out
    assert json.loads(Path("c/hzo-seed1/config.json").read_text())["lr"] == 0.04
    assert json.loads(Path("c/backprop-seed1/config.json").read_text())["lr"] == 0.05
    code, again, _ = hzo("compare", "--resume", "c")
    assert code == 0
    assert "±" in again


def test_the_version_is_printed(hzo):
    code, out, _ = hzo("--version")
    assert code == 0
    assert out.startswith("hzo " + __import__("hzo").__version__)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_values(hzo, monkeypatch, shell):
    monkeypatch.setenv("_HZO_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    for begun, completed in (("hzo train --method s", "spsa"), ("hzo comp", "compare"), ("hzo train --lo", "--log")):
        monkeypatch.setenv("COMP_WORDS", begun)
        monkeypatch.setenv("COMP_CWORD", str(len(begun.split()) - 1))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", begun)
        assert completed in hzo()[1]


def test_plan_is_printed_without_data(hzo):
    code, out, _ = hzo("plan", "--depth", "3", "--width", "4")
    assert code == 0
    assert "bisect" in out
    assert "forward equivalents" in out


def test_without_the_extra_it_says_what_to_install(hzo, monkeypatch):
    monkeypatch.delitem(sys.modules, "hzo_lab.cli.commands", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    code, _, err = hzo("train")
    assert code == 2
    assert 'pip install "hzo[train]"' in err


def test_the_version_needs_no_extra(hzo, monkeypatch):
    monkeypatch.delitem(sys.modules, "hzo_lab.cli.commands", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    code, out, _ = hzo("--version")
    assert (code, out) == (0, f"hzo {__import__('hzo').__version__}\n")


def test_the_module_runs_as_a_program(tmp_path):
    source = Path(main.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    ended = subprocess.run(
        [sys.executable, "-m", "hzo", "train", *SMALL, "--max-steps", "2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Stopped at step 2 as asked" in ended.stdout
    assert "\x1b" not in ended.stdout  # plain lines where there is no terminal

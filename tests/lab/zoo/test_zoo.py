"""The zoo's harness, on families that torch alone can make: its verdicts are only worth what it catches."""

import json
import sys

import pytest
import torch
from torch import Tensor, nn

from hzo.errors import InputError, TapeError
from hzo_lab.errors import CheckpointError
from hzo_lab.zoo import command, engine, registry, trial
from hzo_lab.zoo.case import Case, NotBuiltError, distance_to_waves
from hzo_lab.zoo.command import main
from hzo_lab.zoo.comparison import largest_difference, tolerance
from hzo_lab.zoo.registry import Family
from hzo_lab.zoo.runner import Limits, read_results, run, tried
from hzo_lab.zoo.shrinking import shrunk
from hzo_lab.zoo.table import counts, table

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="one process a family needs fork")
LSTM = Family("recurrent", "lstm/two-layers-dropout")
LIMITS = Limits(seconds=60, gib=12)


def by_backprop(call, change=lambda model_grad: model_grad):
    """A stand-in for hzo's gradient: autograd's, changed."""
    loss = call()
    loss.backward()
    change(loss)
    return engine.Step(0.1)


def case_of(model, call=None):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Case(model.double(), call or (lambda: model(x).square().mean()))


def verdict_of(monkeypatch, case, gradient):
    monkeypatch.setattr(trial, "build", lambda *_: case)
    monkeypatch.setattr(trial.engine, "gradient", gradient)
    reports = []
    monkeypatch.setattr(torch, "set_default_dtype", lambda _: None)
    trial.try_family(Family("any", "any"), torch.float64, reports.append)
    return reports[-1]


def test_hzo_is_right_about_a_recurrent_network_with_dropout():
    record = tried(LSTM, torch.float64, LIMITS)
    assert record["verdict"] == "right", record
    assert record["error"] < 1e-9
    assert 0 < record["forward_equivalents"] < 100
    assert record["share_by_queries"] == 0
    assert {"first_seconds", "second_seconds", "backprop_seconds", "wall_seconds"} <= record.keys()


def test_autograd_itself_is_right(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    assert verdict_of(monkeypatch, case_of(model), by_backprop)["verdict"] == "right"


@pytest.mark.parametrize("share", [1 + 1e-5, 0.0, -1.0])
def test_a_gradient_that_is_off_is_wrong(monkeypatch, share):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    record = verdict_of(
        monkeypatch, case_of(model), lambda call: by_backprop(call, lambda _: model[0].weight.grad.mul_(share))
    )
    assert record["verdict"] == "WRONG"
    assert record["worst_parameter"] == "0.weight"


def test_a_missing_gradient_is_wrong(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    assert (
        verdict_of(
            monkeypatch, case_of(model), lambda call: by_backprop(call, lambda _: setattr(model[2].bias, "grad", None))
        )["verdict"]
        == "WRONG"
    )


def test_a_gradient_where_autograd_has_none_is_wrong(monkeypatch):
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    x = torch.ones(4, 3, dtype=torch.float64)
    assert (
        verdict_of(
            monkeypatch,
            case_of(model, lambda: model[0](x).sum()),
            lambda call: by_backprop(
                call, lambda _: setattr(model[1].bias, "grad", torch.ones(2, dtype=torch.float64))
            ),
        )["verdict"]
        == "WRONG"
    )


def test_nan_is_wrong(monkeypatch):
    model = nn.Linear(3, 2)
    record = verdict_of(
        monkeypatch, case_of(model), lambda call: by_backprop(call, lambda _: model.bias.grad.fill_(float("nan")))
    )
    assert record["verdict"] == "WRONG"
    assert "not finite" in record["reason"]


def test_a_second_gradient_that_is_off_is_wrong(monkeypatch):
    model, turns = nn.Linear(3, 2), []

    def later(call):
        step = by_backprop(call)
        turns.append(1)
        if len(turns) == 2:
            model.weight.grad.mul_(1.01)
        return step

    record = verdict_of(monkeypatch, case_of(model), later)
    assert record["verdict"] == "WRONG"
    assert "second gradient" in record["reason"]


def test_a_buffer_that_was_moved_twice_is_wrong(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    record = verdict_of(monkeypatch, case_of(model), lambda call: (call(), by_backprop(call))[1])
    assert record["verdict"] == "WRONG"
    assert "running_mean" in record["reason"]


def test_other_random_numbers_are_wrong(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    assert (
        verdict_of(monkeypatch, case_of(model), lambda call: (torch.rand(1), by_backprop(call))[1])["verdict"]
        == "WRONG"
    )


@pytest.mark.parametrize(
    ("error", "verdict"), [(TapeError("no rule"), "refused"), (RuntimeError("shape"), "raw"), (KeyError("x"), "raw")]
)
def test_errors_have_verdicts_of_their_own(monkeypatch, error, verdict):
    def fails(_):
        raise error

    record = verdict_of(monkeypatch, case_of(nn.Linear(3, 2)), fails)
    assert record["verdict"] == verdict
    assert type(error).__name__ in record["reason"]


def test_what_backprop_cannot_repeat_is_not_judged(monkeypatch):
    model, turn = nn.Linear(3, 2), iter(range(100))
    x = torch.ones(4, 3, dtype=torch.float64)
    record = verdict_of(monkeypatch, case_of(model, lambda: model(x).sum() * next(turn)), by_backprop)
    assert record["verdict"] == "not built"
    assert "second time" in record["reason"]


def test_the_floor_hides_rounding_and_no_more():
    """A gradient of a millionth of the largest is judged by its own size; below that it is zero up to rounding."""
    large = torch.ones(4, dtype=torch.float64)
    for size, expected in ((1e-5, 0.02), (1e-9, 0.02 * 1e-3)):
        small = torch.full((4,), size, dtype=torch.float64)
        found = {"large": large, "small": small * 1.02}
        assert largest_difference(found, {"large": large, "small": small}, 1e-6).worst == pytest.approx(expected)


def test_a_float64_model_that_computes_in_float32_keeps_the_floor():
    assert tolerance(torch.float64, torch.float32).floor == tolerance(torch.float64, torch.float64).floor == 1e-6
    assert tolerance(torch.float64, torch.float32).error == 1e-4
    assert tolerance(torch.float32, torch.bfloat16) == tolerance(torch.bfloat16, torch.bfloat16)


def test_a_family_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(trial, "build", lambda *_: Case(nn.Linear(1, 1), hang))
    record = tried(LSTM, torch.float64, Limits(seconds=1.0))
    assert record["verdict"] == "not built"
    assert record["wall_seconds"] < 10


def hang() -> Tensor:
    while True:
        pass


def test_a_gradient_that_does_not_end_is_slow(monkeypatch):
    monkeypatch.setattr(trial.engine, "gradient", lambda _: hang())
    assert tried(LSTM, torch.float64, Limits(seconds=5.0))["verdict"] == "slow"


def test_a_process_that_dies_is_raw(monkeypatch):
    import os
    import signal

    monkeypatch.setattr(trial.engine, "gradient", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert tried(LSTM, torch.float64, LIMITS)["verdict"] == "raw"


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path):
    path, chosen = tmp_path / "r.jsonl", [Family("recurrent", n) for n in ("rnn/one", "gru/one")]
    assert len(run(chosen[:1], torch.float64, path, LIMITS)) == 1
    with path.open("a", encoding="utf-8") as file:
        file.write('{"library": "recurrent", "fam')  # killed while it wrote
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert [r["family"] for r in run(chosen, torch.float64, path, LIMITS)] == ["gru/one"]
    assert not run(chosen, torch.float64, path, LIMITS)
    assert {r["verdict"] for r in read_results(path)} == {"right"}
    assert len(run(chosen, torch.float32, path, LIMITS)) == 2, "another dtype is another question"


def test_the_command_prints_and_answers(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    assert main(["--results", str(path), "--all-right", "recurrent:rnn/one"]) == 0
    assert "1 right" in capsys.readouterr().out
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[0] |= {"verdict": "WRONG", "reason": "a | b"}
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert main(["--results", str(path), "recurrent:rnn/one"]) == 1, "what is recorded counts"
    assert main(["--results", str(path), "--table", "--markdown"]) == 0
    assert "a \\| b" in capsys.readouterr().out


def test_a_library_that_is_missing_is_said_to_be():
    with pytest.raises(NotBuiltError, match=r"not installed|no head"):
        registry.build(Family("transformers", "no-such-model/causal-lm"), torch.float64)


def test_tables_take_records_of_every_verdict():
    records = [{"library": "l", "family": v, "verdict": v, "reason": ""} for v in trial.VERDICTS]
    assert all(v in table(records) for v in trial.VERDICTS)
    assert counts(records).splitlines()[0].startswith("l: 5 tried: 1 right, 1 WRONG")


def test_a_page_counts_and_says_every_cause(tmp_path):
    right = {"library": "l", "family": "good", "verdict": "right", "error": 2e-9, "forward_equivalents": 3.2}
    bad = {"library": "l", "family": "bad", "verdict": "refused", "reason": "a `cause` | of [it]"}
    absent = {"library": "m", "family": "gone", "verdict": "not built", "reason": "r" * 500}
    path, out = tmp_path / "r.jsonl", tmp_path / "page.md"
    path.write_text("\n".join(json.dumps({"asked": "float64", **r}) for r in (right, bad, absent)), encoding="utf-8")
    assert main(["--results", str(path), "--page", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "| l | 2 | 1 | 50.0 % | 2e-09 | 3 | 1 refused | 0 |" in text
    assert "| m | 0 | 0 |  |  |  | 0 | 1 |" in text
    assert "| all | 2 | 1 | 50.0 % |" in text
    assert "- `l:bad`, refused: `a 'cause' | of [it]`" in text
    assert "`m:gone`, not built: `" + "r" * 160 + "…`" in text


def test_sizes_shrink_together():
    before = {
        "hidden_size": 4096,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "eos_token_id": 31999,
        "layer_types": ["a", "a", "b", "a", "a", "b"],
        "hidden_dropout": 0.1,
        "use_cache": True,
        "id2label": {0: "LABEL_0"},
        "vision_config": {"image_size": 224, "patch_size": 14, "depths": [2, 2, 18, 2], "num_channels": 3},
    }
    after = {**before, **shrunk(before)}
    assert after["num_hidden_layers"] == len(after["layer_types"]) == 3, "a layer of each kind"
    assert after["hidden_size"] % after["num_attention_heads"] == 0
    assert after["eos_token_id"] < after["vocab_size"] == 128
    assert after["vision_config"] == {"image_size": 32, "patch_size": 8, "depths": [2, 2, 2, 2], "num_channels": 3}
    assert after["hidden_dropout"] == 0.1
    assert after["use_cache"] is True


@pytest.mark.parametrize("last", [nn.LayerNorm(6), nn.Softmax(-1)], ids=["layer norm", "softmax"])
def test_the_loss_of_a_model_without_one_depends_on_normalized_outputs(last):
    first = nn.Linear(3, 6).double()
    model = nn.Sequential(first, last.double())
    distance_to_waves((model(torch.randn(4, 3, dtype=torch.float64)), {"unused": [torch.ones(2)]})).backward()
    assert first.weight.grad.norm() > 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "a"], "K/N"),
        (["--shard", "2/2"], "from 0 to N - 1"),
        (["--shard", "0/0"], "K/N"),
        (["--seconds", "-1"], "above 0"),
        (["--gib", "much"], "above 0"),
        (["--dtype", "int8"], "float64"),
        (["nosuch"], "'nosuch' fits no family"),
        (["recurrent:*", "nosuch:*"], "'nosuch:*' fits no family"),
    ],
)
def test_wrong_options_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_files_that_are_no_results_are_explained(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    with pytest.raises(InputError, match="no records of hzo zoo"):
        command.main(["--results", str(other), "--table"])
    with pytest.raises(InputError, match="cannot be read"):
        command.main(["--results", str(tmp_path), "--table"])
    with pytest.raises(CheckpointError, match="while opening"):
        command.main(["recurrent:*", "--results", str(other / "below.jsonl")])


def test_a_sweep_that_is_stopped_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", stopped)
    assert command.main(["recurrent:*", "--results", str(tmp_path / "r.jsonl")]) == 130
    assert "the same command goes on" in capsys.readouterr().out

"""Checkpoints: whole or absent, refused when damaged or foreign, and safe from a full disk."""

import errno
import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from hzo._files import replace_file
from hzo_lab.errors import CheckpointError
from hzo_lab.training import checkpoint
from hzo_lab.training.checkpoint import HASHES, OPTIMIZER, STATE, WEIGHTS, Counters


def trained(optimizer="sgd", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    }
    made = kinds[optimizer](model.parameters())
    step(model, made)
    return model, made


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


def files(run):
    return {p.relative_to(run): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_what_is_saved_goes_on_to_the_same_bits(tmp_path, optimizer):
    model, made = trained(optimizer)
    checkpoint.save(tmp_path, model, made, Counters(step=1))
    for _ in range(3):
        step(model, made)
    other, remade = trained(optimizer, seed=9)
    counters = checkpoint.load(checkpoint.latest(tmp_path), other, remade)
    assert counters.step == 1
    for _ in range(3):
        step(other, remade)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_counters_come_back_exactly(tmp_path):
    from fractions import Fraction

    model, made = trained()
    counters = Counters(step=7, queries=10**15 + 1, cost=Fraction(10**20, 3), last_cost=Fraction(1, 7), seconds=1.25)
    checkpoint.save(tmp_path, model, made, counters)
    assert checkpoint.load(checkpoint.latest(tmp_path), model, made) == counters


def test_random_numbers_go_on(tmp_path):
    import random

    import numpy as np

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss()

    model, made = trained()
    draw()
    checkpoint.save(tmp_path, model, made, Counters())
    expected = draw()
    draw()
    checkpoint.load(checkpoint.latest(tmp_path), model, made)
    assert draw() == expected


def test_tied_and_low_precision_weights(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).bfloat16()
    model[1].weight = model[0].weight
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = checkpoint.save(tmp_path, model, made, Counters())
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.zero_()
    checkpoint.load(saved, model, made)
    assert torch.equal(model[1].weight, before)
    assert checkpoint.read_weights(saved)["0.weight"].dtype == torch.bfloat16


def test_only_the_newest_are_kept(tmp_path):
    model, made = trained()
    for number in range(5):
        checkpoint.save(tmp_path, model, made, Counters(step=number))
    assert [p.name for p in checkpoint._steps(tmp_path)] == ["step-00000003", "step-00000004"]


def test_what_a_kill_left_half_written_is_cleared(tmp_path):
    model, made = trained()
    checkpoint.save(tmp_path, model, made, Counters(step=1))
    partial = tmp_path / checkpoint.FOLDER / ".writing-00000002"
    partial.mkdir()
    (partial / WEIGHTS).write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    assert not partial.exists()


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE, HASHES])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        lambda content: pickle.dumps({"weights": [1, 2]}),
        None,
    ],
    ids=["truncated", "empty", "flipped", "foreign", "missing"],
)
def test_damage_is_found_named_and_changes_nothing(tmp_path, name, damage):
    model, made = trained()
    saved = checkpoint.save(tmp_path, model, made, Counters(step=1))
    path = saved / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    other, remade = trained(seed=5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match="damaged") as caught:
        checkpoint.load(saved, other, remade)
    assert str(path.parent) in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "state", [[], {"format": "other"}, {"format": checkpoint.FORMAT}, {"format": checkpoint.FORMAT, "optimizer": 1}]
)
def test_a_foreign_state_is_refused(tmp_path, state):
    model, made = trained()
    saved = checkpoint.save(tmp_path, model, made, Counters(step=1))
    content = json.dumps(state).encode()
    (saved / STATE).write_bytes(content)
    hashes = json.loads((saved / HASHES).read_text())
    (saved / HASHES).write_text(json.dumps({**hashes, STATE: hashlib.sha256(content).hexdigest()}))
    with pytest.raises(CheckpointError, match="damaged or not of a checkpoint"):
        checkpoint.load(saved, model, made)


def test_another_network_is_refused(tmp_path):
    model, made = trained()
    saved = checkpoint.save(tmp_path, model, made, Counters(step=1))
    other = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(CheckpointError, match=r"another network.*0\.bias"):
        checkpoint.load(saved, other, torch.optim.SGD(other.parameters()))


def full_disk(monkeypatch, name):
    """Let ``name`` hit a full disk after half of its bytes."""
    original = Path.open

    def opened(self, mode="r", *args, **kwargs):
        file = original(self, mode, *args, **kwargs)
        if self.name.endswith(name) and "w" in mode:
            write = file.write

            def half(content):
                write(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")

            return _Wrapped(file, half)
        return file

    monkeypatch.setattr(Path, "open", opened)


class _Wrapped:
    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE, HASHES])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, name):
    model, made = trained()
    checkpoint.save(tmp_path, model, made, Counters(step=1))
    before = files(tmp_path)
    with monkeypatch.context() as patched:
        full_disk(patched, name)
        with pytest.raises(CheckpointError, match=r"no space left.*step 2.*hzo train --resume"):
            checkpoint.save(tmp_path, model, made, Counters(step=2))
    assert files(tmp_path) == before
    checkpoint.load(checkpoint.latest(tmp_path), model, made)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    replace_file(path, b"old")
    full_disk(monkeypatch, "config.json.writing")
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new content")
    assert files(tmp_path) == {Path("config.json"): b"old"}

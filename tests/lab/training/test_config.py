"""The configuration of a run: JSON round trip, defaults, clear refusals."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hzo.errors import InputError
from hzo_lab.errors import CheckpointError
from hzo_lab.training.config import METHODS, TrainConfig, from_dict, read_config, to_json
from hzo_lab.training.recipes import recipe


@given(
    method=st.sampled_from(METHODS),
    tree=st.one_of(st.sampled_from(["flat", "bisect", "stagewise"]), st.integers(2, 9)),
    lr=st.floats(1e-9, 1e3),
    budget=st.one_of(st.none(), st.floats(1e-3, 1e12)),
    seed=st.integers(0, 2**40),
)
def test_json_round_trip(method, tree, lr, budget, seed):
    config = TrainConfig(method=method, tree=tree, lr=lr, budget=budget, seed=seed)
    assert from_dict(json.loads(to_json(config))) == config


def test_missing_fields_take_their_default():
    assert from_dict({"seed": 7}) == TrainConfig(seed=7)


def test_unknown_fields_are_named():
    with pytest.raises(InputError, match=r"epochz, sead.*Known are data"):
        from_dict({"epochz": 3, "sead": 1})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data", "mnist", "digits, cifar10, imagefolder"),
        ("method", "magic", "hzo, backprop"),
        ("epochs", 0, "at least 1"),
        ("epochs", 2.5, "to be int"),
        ("epochs", True, "to be int"),
        ("lr", 0.0, "more than 0"),
        ("lr", float("nan"), "more than 0"),
        ("lr", "fast", "to be float"),
        ("seed", -1, "at least 0"),
        ("depth", 100_000, "at most 10,000"),
        ("tree", "oak", "planned, flat"),
        ("tree", 1, "2 or more"),
        ("data_dir", 3, "str or null"),
        ("budget", 0, "more than 0"),
        ("activation", "swish", "relu, gelu"),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_what_came(field, value, message):
    with pytest.raises(InputError, match=message) as caught:
        TrainConfig(**{field: value})
    assert field in str(caught.value)
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)


def test_a_whole_number_may_stand_for_a_real_one():
    assert TrainConfig(lr=1).lr == 1


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1, 2]"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises((CheckpointError, InputError), match=r"config\.json"):
        read_config(path)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="start a new run"):
        read_config(tmp_path / "config.json")


def test_recipes_fill_in_and_what_is_given_wins():
    assert recipe() == TrainConfig()
    images = recipe(data="cifar10", epochs=None)
    assert (images.model, images.batch_size) == ("cnn", 128)
    assert recipe(data="cifar10", batch_size=7, model="resnet20").batch_size == 7
    assert recipe(data="cifar10", model="resnet20").lr > recipe(data="cifar10").lr
    assert recipe(method="spsa").lr < recipe().lr
    assert recipe(method="spsa", lr=3.0).lr == 3.0


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 3

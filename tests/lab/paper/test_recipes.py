"""Trainings of record: one for each arm at each scale, the same for both methods."""

import pytest

from hzo_lab.paper import recipes
from hzo_lab.paper.finding import SCALES, Setting
from hzo_lab.paper.trained import run_key


@pytest.fixture
def at(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "imagenet_folder", lambda folder: folder)  # no data are read here

    def made(scale, data, arm, method="hzo"):
        return recipes.training(Setting(scale=scale, out=tmp_path, data_dir=tmp_path), data, arm, method, 3)

    return made


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("data", ["cifar10", "imagenet"])
@pytest.mark.parametrize("arm", recipes.ARMS)
def test_both_methods_have_one_recipe(at, scale, data, arm):
    ours, exact = run_key(at(scale, data, arm)), run_key(at(scale, data, arm, "backprop"))
    assert ours.pop("method") == "hzo"
    assert exact.pop("method") == "backprop"
    assert ours["tree"] == ("planned" if arm == "full" else "bisect")
    assert {key: ours[key] for key in exact} == exact


@pytest.mark.parametrize("data", ["cifar10", "imagenet"])
def test_a_night_is_longer_and_shares_what_it_does_not_change(at, data):
    assert at("long", data, "full").epochs > at("cpu", data, "full").epochs
    assert at("long", data, "full").model == at("cpu", data, "full").model
    assert at("long", "cifar10", "budget") == at("cpu", "cifar10", "budget")

"""Where the images are, and what a record must say of them."""

import numpy as np
import pytest

from hzo.errors import InputError
from hzo_lab.errors import DataError
from hzo_lab.paper import registry
from hzo_lab.paper.finding import Setting
from hzo_lab.paper.images import CIFAR_FOLDER, imagenet_folder, images, notes_on_cifar


def test_inexact_images_are_named(tmp_path):
    assert notes_on_cifar(tmp_path) == ()
    folder = tmp_path / CIFAR_FOLDER
    folder.mkdir()
    np.save(folder / "inexact_train_indices.npy", np.array([4298, 5949]))
    np.save(folder / "inexact_test_indices.npy", np.array([1259]))
    (note,) = notes_on_cifar(tmp_path)
    assert "3 images" in note
    assert all(str(index) in note for index in (4298, 5949, 1259))
    (folder / "inexact_test_indices.npy").write_text("x")
    with pytest.raises(DataError, match="NumPy"):
        notes_on_cifar(tmp_path)


def tree(folder):
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)


def test_imagenet_is_the_folder_or_the_one_in_it(tmp_path):
    with pytest.raises(DataError, match="found none"):
        imagenet_folder(tmp_path)
    tree(tmp_path / "imagenette2")
    assert imagenet_folder(tmp_path) == tmp_path / "imagenette2"
    tree(tmp_path / "other")
    with pytest.raises(DataError, match="imagenette2, other"):
        imagenet_folder(tmp_path)
    tree(tmp_path)
    assert imagenet_folder(tmp_path) == tmp_path


def test_digits_stand_in_and_the_record_says_so(tmp_path):
    found = images(Setting(scale="cpu", out=tmp_path))
    assert found.shape == (1, 8, 8)
    assert "not on CIFAR-10" in found.notes[0]


def test_data_are_looked_for_before_the_first_hour(tmp_path):
    with pytest.raises(DataError, match="--data-dir"):
        registry.check_data(registry.find("all"), Setting(scale="cpu", out=tmp_path))
    with pytest.raises(DataError, match="CIFAR-10"):
        registry.check_data(registry.find("fig2"), Setting(scale="cpu", out=tmp_path, data_dir=tmp_path))
    registry.check_data(registry.find("all"), Setting(scale="smoke", out=tmp_path))
    registry.check_data(registry.find("theorem1"), Setting(scale="cpu", out=tmp_path))
    with pytest.raises(InputError, match="theorem1"):
        registry.find("theorem2")

"""Data sets: what is read, what is refused, and batches that depend on (seed, epoch, position) alone."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from hzo.errors import InputError
from hzo_lab.data import registry
from hzo_lab.data.cifar10 import TEST_FILE, TRAIN_FILES, load_cifar10
from hzo_lab.data.dataset import batch_indices, batches_per_epoch, crop_and_flip, epoch_order, make_batch
from hzo_lab.data.imagefolder import decode_image, load_imagefolder
from hzo_lab.errors import DataError

CPU = torch.device("cpu")


def write_cifar(folder, count=20, protocol=4):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*TRAIN_FILES, TEST_FILE):
        entry = {
            b"batch_label": name.encode(),
            b"labels": rng.integers(0, 10, count).tolist(),
            b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=protocol))
    return folder


def write_tree(folder, classes=("cat", "dog"), count=3, size=(20, 16)):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


# digits


def test_digits_are_split_by_class_and_standardised():
    digits = registry.load("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert set(torch.bincount(digits.test.labels).tolist()) <= {35, 36, 37}
    x, y = make_batch(digits, digits.train, torch.arange(1437), device=CPU, dtype=torch.float64)
    assert x.shape == (1437, 64)
    assert y.dtype == torch.int64
    assert abs(float(x.mean())) < 1e-5
    assert float(x.std()) == pytest.approx(1, abs=1e-3)


def test_no_digit_is_in_both_splits():
    digits = registry.load("digits")
    train = {tuple(row.tolist()) for row in digits.train.fetch(torch.arange(1437))}
    test = {tuple(row.tolist()) for row in digits.test.fetch(torch.arange(360))}
    assert not train & test


# CIFAR-10


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("inside", [True, False])
def test_cifar_in_every_pickle_protocol_and_place(tmp_path, protocol, inside):
    folder = write_cifar(tmp_path / "cifar-10-batches-py", protocol=protocol)
    loaded = load_cifar10(folder if inside else tmp_path)
    assert (len(loaded.train), len(loaded.test), loaded.shape) == (100, 20, (3, 32, 32))
    first = pickle.loads((folder / TRAIN_FILES[0]).read_bytes())  # our own file
    image = loaded.train.fetch(torch.tensor([0]))[0]
    assert image.dtype == torch.uint8
    assert image.reshape(-1).tolist() == first[b"data"][0].tolist()
    assert loaded.train.labels[:20].tolist() == first[b"labels"]


def test_cifar_channel_statistics_are_exact(tmp_path):
    write_cifar(tmp_path / "c")
    loaded = load_cifar10(tmp_path / "c")
    raw = loaded.train.fetch(torch.arange(100)).double()
    assert loaded.mean.flatten().tolist() == pytest.approx(raw.mean((0, 2, 3)).tolist(), rel=1e-6)
    assert loaded.std.flatten().tolist() == pytest.approx(raw.std((0, 2, 3), correction=0).tolist(), rel=1e-6)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    folder = write_cifar(tmp_path / "c")
    trap = tmp_path / "trap"
    (folder / TRAIN_FILES[2]).write_bytes(pickle.dumps({b"data": Malicious(trap), b"labels": []}))
    with pytest.raises(DataError, match=r"data_batch_3.*mkdir"):
        load_cifar10(folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    "call",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c_codecs\ndecode\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
    ],
)
def test_nothing_but_arrays_is_constructed(tmp_path, call):
    folder = write_cifar(tmp_path / "c")
    (folder / TEST_FILE).write_bytes(call)
    with pytest.raises(DataError, match="test_batch"):
        load_cifar10(folder)


def _entry(**changes):
    entry = {b"data": np.zeros((4, 3072), dtype=np.uint8), b"labels": [0, 1, 2, 3]}
    return {**entry, **{key.encode(): value for key, value in changes.items()}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x1f\x8b not a pickle", "truncated or not"),
        (pickle.dumps(_entry())[:-200], "truncated"),
        (pickle.dumps([1, 2]), "expected a dictionary"),
        (pickle.dumps({b"data": 1}), "expected a dictionary"),
        (pickle.dumps(_entry(data=np.zeros((4, 3072)))), "uint8"),
        (pickle.dumps(_entry(data=np.zeros((4, 100), dtype=np.uint8))), "3072"),
        (pickle.dumps(_entry(labels=[0, 1])), "one label for each"),
        (pickle.dumps(_entry(labels=[0, 1, 2, 10])), "from 0 to 9"),
        (pickle.dumps(_entry(labels=["a", "b", "c", "d"])), "whole numbers"),
    ],
)
def test_truncated_and_foreign_files_are_named(tmp_path, content, message):
    folder = write_cifar(tmp_path / "c")
    (folder / TRAIN_FILES[1]).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_cifar10(folder)
    assert str(folder / TRAIN_FILES[1]) in str(caught.value)


def test_a_missing_part_is_named(tmp_path):
    folder = write_cifar(tmp_path / "c")
    (folder / TRAIN_FILES[4]).unlink()
    with pytest.raises(DataError, match=r"data_batch_5.*missing"):
        load_cifar10(folder)


def test_a_packed_archive_says_unpack_it(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"unpack .*tar"):
        load_cifar10(tmp_path)


# ImageFolder


def test_imagefolder_reads_classes_in_order_and_caches(tmp_path):
    write_tree(tmp_path)
    loaded = load_imagefolder(tmp_path, 8)
    assert loaded.classes == ("cat", "dog")
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    once = loaded.train.fetch(torch.tensor([4, 0]))
    assert once.shape == (2, 3, 8, 8)
    assert torch.equal(once[1], torch.from_numpy(decode_image(tmp_path / "train/cat/0.png", 8)))
    (tmp_path / "train/cat/0.png").unlink()
    assert torch.equal(loaded.train.fetch(torch.tensor([4, 0])), once)


def test_imagefolder_without_a_cache_gives_the_same(tmp_path, monkeypatch):
    write_tree(tmp_path)
    cached = load_imagefolder(tmp_path, 8).train.fetch(torch.arange(6))
    monkeypatch.setattr("hzo_lab.data.imagefolder.CACHE_BYTES", 0)
    assert torch.equal(load_imagefolder(tmp_path, 8).train.fetch(torch.arange(6)), cached)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(9, 40), (40, 9), (5, 5), (64, 64)])
def test_images_of_every_mode_and_size_become_squares(tmp_path, mode, size):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, size, 1 if mode in "LP" else None).save(tmp_path / f"x.{suffix}")
    assert decode_image(tmp_path / f"x.{suffix}", 16).shape == (3, 16, 16)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not an image", lambda b: b""])
def test_a_broken_image_is_named(tmp_path, damage):
    write_tree(tmp_path, size=(80, 80))
    path = tmp_path / "train/dog/1.png"
    path.write_bytes(damage(path.read_bytes()))
    loaded = load_imagefolder(tmp_path, 16)
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        loaded.train.fetch(torch.arange(6))
    assert str(path) in str(caught.value)


def test_trees_that_are_none_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"train.*missing"):
        load_imagefolder(tmp_path, 8)
    write_tree(tmp_path)
    (tmp_path / "val/bird").mkdir()
    with pytest.raises(DataError, match=r"same classes.*bird"):
        load_imagefolder(tmp_path, 8)
    (tmp_path / "train/bird").mkdir()
    with pytest.raises(DataError, match="bird, found none"):
        load_imagefolder(tmp_path, 8)


# By name, and batches


def test_names_and_folders_are_checked(tmp_path):
    with pytest.raises(InputError, match="mnist"):
        registry.load("mnist")
    with pytest.raises(DataError, match="--data-dir"):
        registry.load("cifar10")
    with pytest.raises(DataError, match="does not exist"):
        registry.load("imagefolder", tmp_path / "nowhere")


def test_the_order_is_a_function_of_seed_and_epoch():
    assert torch.equal(epoch_order(50, 3, 1), epoch_order(50, 3, 1))
    assert not torch.equal(epoch_order(50, 3, 1), epoch_order(50, 3, 2))
    assert not torch.equal(epoch_order(50, 3, 1), epoch_order(50, 4, 1))
    assert sorted(epoch_order(50, 3, 1).tolist()) == list(range(50))


def test_an_epoch_is_made_of_whole_batches():
    assert batches_per_epoch(50, 16) == 3
    assert batches_per_epoch(10, 16) == 1
    seen = torch.cat([batch_indices(50, 16, 0, 0, position) for position in range(3)])
    assert len(set(seen.tolist())) == 48


def test_crops_are_windows_of_the_padded_image_and_some_are_mirrored():
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).reshape(2, 3, 6, 6).repeat(20, 1, 1, 1) + 1
    cropped = crop_and_flip(images, 2, torch.Generator().manual_seed(0))
    assert torch.equal(cropped, crop_and_flip(images, 2, torch.Generator().manual_seed(0)))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    mirrored = 0
    for image, whole in zip(cropped, padded, strict=True):
        windows = [whole[:, i : i + 6, j : j + 6] for i in range(5) for j in range(5)]
        straight = any(torch.equal(image, window) for window in windows)
        mirror = any(torch.equal(image, window.flip(2)) for window in windows)
        assert straight != mirror
        mirrored += mirror
    assert 5 < mirrored < 35


def test_a_batch_is_normalised_and_augmented_only_where_asked(tmp_path):
    loaded = load_cifar10(write_cifar(tmp_path / "c"))
    plain, y = make_batch(loaded, loaded.train, torch.arange(30), device=CPU, dtype=torch.bfloat16)
    assert plain.dtype == torch.bfloat16
    assert y.tolist() == loaded.train.labels[:30].tolist()
    random = torch.Generator().manual_seed(0)
    shifted, _ = make_batch(loaded, loaded.train, torch.arange(30), device=CPU, dtype=torch.bfloat16, augment=random)
    assert not torch.equal(plain, shifted)


@pytest.mark.skipif("HZO_DATA_DIR" not in os.environ, reason="needs the real data sets: set HZO_DATA_DIR")
def test_the_real_data_sets():
    from pathlib import Path

    folder = Path(os.environ["HZO_DATA_DIR"])
    cifar = registry.load("cifar10", folder)
    assert (len(cifar.train), len(cifar.test)) == (50_000, 10_000)
    assert torch.bincount(cifar.train.labels).tolist() == [5000] * 10
    assert (cifar.mean.flatten() / 255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
    tree = registry.load("imagefolder", folder / "imagenet10", image_size=64)
    assert (len(tree.train), len(tree.test)) == (9469, 3925)
    assert tree.train.fetch(torch.tensor([0, 9468])).shape == (2, 3, 64, 64)

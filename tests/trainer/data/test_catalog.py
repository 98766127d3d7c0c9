"""Data sets on disk: miniature archives of every format, and the errors when they are missing or damaged. Real ones are
read from the folder that the environment variable CRL_DATA names."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data.torchvision_sets import CIFAR10_CLASSES, FASHION_MNIST_CLASSES
from crl_diffusion.errors import OptionError
from crl_diffusion.files import read_rows
from crl_diffusion.training import loop
from helpers.image_folders import load, noise, write_tree
from helpers.permissions import permissions_hold
from PIL import Image

MNISTS = [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]


def refused(name: str, root: Path, **settings: Any) -> str:
    with pytest.raises(OptionError) as caught:
        load(name, root, **settings)
    text = str(caught.value)
    assert text.startswith(f"--data {name}: ")
    assert "\n" not in text
    return text


# Miniatures


def write_mnist(root: Path, folder: str, train: int = 40, test: int = 20) -> dict[str, np.ndarray]:
    raw, written = root / folder / "raw", {}
    raw.mkdir(parents=True)
    for seed, (part, n) in enumerate({"train": train, "t10k": test}.items()):
        pixels, labels = noise(seed, n, 28, 28), (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + labels.tobytes())
        written[part] = pixels
    return written


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """With checksums of its own: torchvision reads nothing else."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    sums: dict[str, str] = {}
    written: dict[str, np.ndarray] = {}

    def put(name: str, entry: dict[str, Any]) -> None:
        content = pickle.dumps(entry, protocol=2)
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()

    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        written[name] = noise(seed, 20, 3, 32, 32)
        put(name, {"data": written[name].reshape(20, -1), "labels": [i % 10 for i in range(20)]})
    put("batches.meta", {"label_names": list(CIFAR10_CLASSES)})
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return written


def write_imagenet32(root: Path, kind: str, classes: int = 6) -> dict[str, np.ndarray]:
    """In the official layout, images in no order of their labels; returns each batch in the order of its labels."""
    train, test = ("Imagenet32_train_npz", "Imagenet32_val_npz") if kind == "npz" else ("imagenet32", "imagenet32")
    if kind == "pickle":
        train, test = "Imagenet32_train", "Imagenet32_val"
    written = {}
    for seed, name in enumerate([*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"]):
        folder = root / (test if name == "val_data" else train)
        folder.mkdir(exist_ok=True)
        labels = [1 + (seed + i) % classes for i in range(3 * classes)]
        pixels = noise(seed, len(labels), 3, 32, 32)
        written[name] = pixels[np.argsort(labels, kind="stable")]
        entry: dict[str, Any] = {"data": pixels.reshape(len(pixels), -1), "labels": labels}
        if name != "val_data":
            entry["mean"] = pixels.reshape(len(pixels), -1).mean(0)
        if kind == "npz":
            np.savez(folder / f"{name}.npz", **entry)
        else:
            (folder / name).write_bytes(pickle.dumps(entry, protocol=3))
    return written


# Formats


@pytest.mark.parametrize(("name", "folder"), MNISTS)
def test_mnist_files_are_read(name: str, folder: str, tmp_path: Path) -> None:
    written = write_mnist(tmp_path, folder)
    loaded = load(name, tmp_path, image_size=32)
    assert loaded.name == name
    for part, pixels in ((loaded.train, written["train"]), (loaded.test, written["t10k"])):
        assert torch.equal(part.pixels[:, 0, 2:30, 2:30], torch.from_numpy(pixels))
        assert part.labels.tolist() == [i % 10 for i in range(len(pixels))]
    assert load(name, tmp_path).shape == (1, 16, 16)
    assert loaded.class_names == {"mnist": (), "fashion_mnist": FASHION_MNIST_CLASSES}[name]


def test_cifar10_batches_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar10(tmp_path, monkeypatch)
    loaded = load("cifar10", tmp_path)
    assert (loaded.name, loaded.classes, loaded.shape) == ("cifar10", 10, (3, 32, 32))
    assert loaded.class_names == CIFAR10_CLASSES
    train = np.concatenate([written[f"data_batch_{i}"] for i in range(1, 6)])
    assert torch.equal(loaded.train.pixels, torch.from_numpy(train))
    assert torch.equal(loaded.test.pixels, torch.from_numpy(written["test_batch"]))
    assert loaded.train.labels.tolist() == [i % 10 for i in range(20)] * 5
    small = load("cifar10", tmp_path, image_size=16).train.pixels
    assert (
        small.double() - torch.from_numpy(train).double().view(100, 3, 16, 2, 16, 2).mean((3, 5))
    ).abs().max() <= 0.5


def test_a_jpeg_copy_of_cifar10_has_another_name(tmp_path: Path) -> None:
    write_tree(tmp_path / "cifar10_jpeg", CIFAR10_CLASSES)
    loaded = load("cifar10", tmp_path)
    assert (loaded.name, loaded.classes) == ("cifar10-jpeg", 10)
    assert loaded.train.labels.tolist() == [c for c in range(10) for _ in range(3)]
    assert torch.equal(loaded.train.pixels[7].permute(1, 2, 0), torch.from_numpy(noise(201, 32, 32, 3)))


@pytest.mark.parametrize("kind", ["pickle", "npz", "one folder"])
def test_archives_of_downsampled_imagenet_are_read(kind: str, tmp_path: Path) -> None:
    written = write_imagenet32(tmp_path, kind)
    loaded = load("imagenet32", tmp_path, tasks=3, classes_per_task=2)
    assert (loaded.name, loaded.classes, loaded.shape) == ("imagenet32", 1000, (3, 32, 32))
    train = np.concatenate([written[f"train_data_batch_{i}"] for i in range(1, 11)])
    assert torch.equal(loaded.train.pixels, torch.from_numpy(train))
    assert loaded.train.labels.tolist() == [c for _ in range(10) for c in range(6) for _ in range(3)]  # from 0
    assert torch.equal(loaded.test.pixels, torch.from_numpy(written["val_data"]))
    small = load("imagenet32", tmp_path, tasks=3, classes_per_task=2, image_size=16).train.pixels
    assert (
        small.double() - torch.from_numpy(train).double().view(180, 3, 16, 2, 16, 2).mean((3, 5))
    ).abs().max() <= 0.5


def test_a_tree_of_imagenet_is_another_data_set(tmp_path: Path) -> None:
    write_tree(tmp_path / "imagenet", ("n01", "n02"), held_out="val")
    loaded = load("imagenet32", tmp_path, tasks=2, classes_per_task=1)
    assert (loaded.name, loaded.classes) == ("imagenet32-tree", 2)
    with pytest.raises(OptionError, match=r"--tasks is 20 .* has 2 classes"):
        load("imagenet32", tmp_path)


def test_pictures_in_a_folder_are_cropped_to_the_middle_square_and_averaged(tmp_path: Path) -> None:
    write_tree(tmp_path, ("a", "b"), side=(40, 24))
    file = tmp_path / "train" / "a" / "0.png"
    pixels = np.asarray(Image.open(file))
    loaded = load("folder", tmp_path, image_size=12, tasks=1)
    assert loaded.shape == (3, 12, 12)
    means = torch.from_numpy(pixels[:, 8:32].copy()).double().view(12, 2, 12, 2, 3).mean((1, 3)).permute(2, 0, 1)
    assert (loaded.train.pixels[0].double() - means).abs().max() <= 0.5 + 1e-9
    assert load("folder", tmp_path, image_size=48, tasks=1).shape == (3, 48, 48)  # enlarged
    Image.new("L", (24, 24), 77).save(file)  # grey pictures have three equal channels
    assert load("folder", tmp_path, image_size=12, tasks=1).train.pixels[0].unique().tolist() == [77]


def test_the_name_of_a_folder_depends_on_its_files_and_not_on_its_place(tmp_path: Path) -> None:
    write_tree(tmp_path / "one" / "birds", ("a", "b"))
    shutil.copytree(tmp_path / "one" / "birds", tmp_path / "two" / "birds")
    name = load("folder", tmp_path / "one" / "birds", tasks=1).name
    assert name.startswith("folder-birds-")
    os.utime(tmp_path / "two" / "birds" / "train" / "a" / "0.png", (1, 1))
    assert load("folder", tmp_path / "two" / "birds", tasks=1).name == name
    (tmp_path / "two" / "birds" / "train" / "a" / "0.png").unlink()
    assert load("folder", tmp_path / "two" / "birds", tasks=1).name != name


# Missing and damaged files


@pytest.mark.parametrize(("name", "folder"), MNISTS)
def test_missing_mnist_files_are_an_error_that_says_what_to_do(name: str, folder: str, tmp_path: Path) -> None:
    text = refused(name, tmp_path)
    for part in (str(tmp_path / folder / "raw"), "t10k-labels-idx1-ubyte", "--data-root", "download=True"):
        assert part in text
    write_mnist(tmp_path, folder)
    (tmp_path / folder / "raw" / "t10k-labels-idx1-ubyte").unlink()
    assert "of which t10k-labels-idx1-ubyte is missing" in refused(name, tmp_path)


@pytest.mark.parametrize("damage", ["short", "empty", "gzip", "labels"])
def test_damaged_mnist_files_are_refused(damage: str, tmp_path: Path) -> None:
    write_mnist(tmp_path, "MNIST")
    raw = tmp_path / "MNIST" / "raw"
    file = raw / "train-images-idx3-ubyte"
    content = file.read_bytes()
    if damage == "labels":
        shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    else:
        file.write_bytes({"short": content[:-9], "empty": b"", "gzip": gzip.compress(content)}[damage])
    text = refused("mnist", tmp_path)
    assert "damaged" in text
    assert repr(str(raw if damage == "labels" else file)) in text
    assert "download=True" in text


def test_an_mnist_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    write_mnist(tmp_path, "MNIST")
    file = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    file.chmod(0)
    with permissions_hold():
        text = refused("mnist", tmp_path)
    assert text.startswith(f"--data mnist: {str(file)!r} cannot be read (Permission denied); make it readable")


def test_a_missing_cifar10_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = refused("cifar10", tmp_path)
    for part in ("cifar-10-batches-py", "test_batch", "cifar10_jpeg/train/CLASS", "truck", "download=True"):
        assert part in text
    write_cifar10(tmp_path, monkeypatch)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1] + b"?")
    assert "damaged" in refused("cifar10", tmp_path)
    batch.unlink()
    assert "data_batch_3 is missing" in refused("cifar10", tmp_path)


def test_a_jpeg_copy_must_have_the_ten_classes(tmp_path: Path) -> None:
    write_tree(tmp_path / "cifar10_jpeg", ("aeroplane", *CIFAR10_CLASSES[1:]))
    text = refused("cifar10", tmp_path)
    assert "aeroplane" in text
    assert "expected airplane" in text


def test_a_missing_imagenet32_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    text = refused("imagenet32", tmp_path)
    for part in (
        "Imagenet32_train/train_data_batch_1",
        "Imagenet32_val_npz/val_data.npz",
        "image-net.org",
        "val/CLASS",
    ):
        assert part in text
    write_imagenet32(tmp_path, "pickle")
    (tmp_path / "Imagenet32_train" / "train_data_batch_7").unlink()
    assert "Imagenet32_train/train_data_batch_7 is missing" in refused("imagenet32", tmp_path)


class Runs:
    """Unpickled by code that does not care, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.file}'",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("short", "train_data_batch_2"),
        ("code", "it asks for posix.system" if os.name == "posix" else "it asks for nt.system"),
        ("list", "it holds a list"),
        ("no labels", "KeyError: 'labels'"),
        ("larger images", "expected uint8 (N, 3072)"),
        ("floats", "data is float64"),
        ("labels from 0", "labels are 0 to 5, expected 1 to 1000"),
        ("fewer labels", "expected integers (18,)"),
        ("no pickle", "train_data_batch_2"),
    ],
)
def test_pickles_that_are_not_the_official_format_are_refused(damage: str, message: str, tmp_path: Path) -> None:
    write_imagenet32(tmp_path, "pickle")
    file = tmp_path / "Imagenet32_train" / "train_data_batch_2"
    entry = pickle.loads(file.read_bytes())
    trap = tmp_path / "ran"
    content = {
        "short": file.read_bytes()[:1000],
        "code": pickle.dumps({**entry, "mean": Runs(trap)}),
        "list": pickle.dumps([entry]),
        "no labels": pickle.dumps({"data": entry["data"]}),
        "larger images": pickle.dumps({**entry, "data": np.zeros((18, 3 * 64 * 64), np.uint8)}),
        "floats": pickle.dumps({**entry, "data": entry["data"] / 255}),
        "labels from 0": pickle.dumps({**entry, "labels": [label - 1 for label in entry["labels"]]}),
        "fewer labels": pickle.dumps({**entry, "labels": entry["labels"][:-1]}),
        "no pickle": b"<html>Please log in</html>",
    }[damage]
    file.write_bytes(content)
    text = refused("imagenet32", tmp_path, tasks=3, classes_per_task=2)
    assert message in text
    assert str(file) in text
    assert not trap.exists()
    assert not list((tmp_path / ".crl-diffusion").glob("imagenet32-*"))  # nothing half-made has the copy's name


@pytest.mark.parametrize("damage", ["short", "objects", "no archive"])
def test_damaged_npz_files_are_refused(damage: str, tmp_path: Path) -> None:
    write_imagenet32(tmp_path, "npz")
    file = tmp_path / "Imagenet32_val_npz" / "val_data.npz"
    if damage == "objects":
        np.savez(file, data=np.array([{}]), labels=[1])
    else:
        file.write_bytes(file.read_bytes()[:500] if damage == "short" else b"nothing")
    assert str(file) in refused("imagenet32", tmp_path, tasks=3, classes_per_task=2)


def test_a_wrong_folder_is_an_error_that_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    assert "there are no images of val" in refused("folder", tmp_path)
    (tmp_path / "train").mkdir()
    assert "holds no folders; expected one for each class" in refused("folder", tmp_path)
    write_tree(tmp_path / "good", ("a", "b"))
    shutil.copytree(tmp_path / "good" / "train", tmp_path / "train", dirs_exist_ok=True)
    shutil.copytree(tmp_path / "good" / "train" / "a", tmp_path / "val" / "a")
    assert "must hold the same classes, but only one of them has b" in refused("folder", tmp_path)
    (tmp_path / "val" / "b").mkdir()
    (tmp_path / "val" / "b" / "notes.txt").write_text("no image")
    assert "no images of b" in refused("folder", tmp_path)
    shutil.copy(tmp_path / "train" / "a" / "0.png", tmp_path / "val" / "b" / "x.png")
    with open(tmp_path / "val" / "b" / "x.png", "r+b") as file:
        file.truncate(700)
    text = refused("folder", tmp_path, tasks=1)
    assert f"the image {str(tmp_path / 'val' / 'b' / 'x.png')!r} cannot be read" in text
    assert "give --skip-unreadable to leave it out" in text


@pytest.mark.parametrize(("suffix", "pixels"), [(".png", np.uint16), (".tif", np.float32)])
def test_images_of_more_than_8_bits_are_refused_and_not_cut_off(tmp_path: Path, suffix: str, pixels: type) -> None:
    write_tree(tmp_path, ("a", "b"))
    deep = tmp_path / "train" / "a" / f"deep{suffix}"
    Image.fromarray(np.arange(1024).reshape(32, 32).astype(pixels)).save(deep)
    text = refused("folder", tmp_path, tasks=1)
    assert f"the image {str(deep)!r} cannot be read (Pillow's mode " in text
    assert "save it with 8 bits a channel" in text


def test_a_size_that_the_model_cannot_halve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--image-size is 28, and --model paper halves .* 3 time.*a multiple of 8"):
        load("folder", tmp_path, image_size=28, model="paper", tasks=1, classes_per_task=1)


# Whole runs

TINY: dict[str, Any] = {
    "model": "mini",
    "image_size": 16,
    "steps": 3,
    "batch": 4,
    "replay_batch": 4,
    "pool": 1,
    "pool_steps": 1,
    "eval_samples": 2,
    "eval_steps": 1,
    "fisher_samples": 4,
    "device": "cpu",
}


def write_jpeg_cifar10(root: Path, n: int) -> None:
    """n images of each class and part: CIFAR-10's where CRL_DATA has the JPEG copy, else noise."""
    given = Path(os.environ.get("CRL_DATA", "")) / "cifar10_jpeg"
    if not (given / "train").is_dir():
        write_tree(root, CIFAR10_CLASSES, n, suffix=".jpg")
        return
    for part in ("train", "test"):
        for name in CIFAR10_CLASSES:
            (root / part / name).mkdir(parents=True)
            for file in sorted((given / part / name).iterdir())[:n]:
                shutil.copy(file, root / part / name)


@pytest.mark.filterwarnings("ignore:only .* of the trace of the Fisher", "ignore:the mean gradient is mostly noise")
def test_a_jpeg_copy_of_cifar10_runs_from_files_to_summary(tmp_path: Path) -> None:
    write_jpeg_cifar10(tmp_path / "cifar10_jpeg", 12)
    config = RunConfig(method="gd+rank1", data="cifar10", per_class=8, **TINY)
    summary = loop.train(config, tmp_path / "run", tmp_path, say=lambda line: None)
    assert np.isfinite(summary["average_fid"])
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert [(row["after_task"], row["task"]) for row in rows] == [(i, j) for i in range(1, 6) for j in range(1, i + 1)]
    assert {row["held_out_images"] for row in rows} == {24}
    assert all("cifar10-jpeg" in row["extractor"] for row in rows)


def test_twenty_tasks_of_a_folder_run_from_files_to_summary(tmp_path: Path) -> None:
    """CIFAR-10's images dealt into the 40 classes of an ImageNet-like tree, two to a task."""
    write_jpeg_cifar10(tmp_path / "cifar10", 24)
    root = tmp_path / "tree"
    for part in ("train", "val"):
        for c in range(40):
            (root / part / f"n{c:08}").mkdir(parents=True)
            images = tmp_path / "cifar10" / {"val": "test"}.get(part, part) / CIFAR10_CLASSES[c % 10]
            for file in sorted(images.iterdir())[c // 10 * 6 : c // 10 * 6 + 6]:
                shutil.copy(file, root / part / f"n{c:08}")
    config = RunConfig(
        method="fine-tune", data="folder", tasks=20, class_order=5, **{**TINY, "image_size": 8, "model": "mlp"}
    )
    summary = loop.train(config, tmp_path / "run", root, say=lambda line: None)
    assert np.isfinite(summary["average_fid"])
    assert np.isfinite(summary["forgetting"])
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert len(rows) == 20 * 21 // 2


# Real files


def real(folder: str) -> Path:
    root = os.environ.get("CRL_DATA")
    if root is None or not (Path(root) / folder).is_dir():
        pytest.skip(f"the environment variable CRL_DATA names no folder with {folder} in it (it is {root!r})")
    return Path(root)


@pytest.mark.parametrize(("name", "folder"), MNISTS)
@pytest.mark.parametrize("size", [16, 32])
def test_real_mnist_files_load(name: str, folder: str, size: int) -> None:
    loaded = load(name, real(f"{folder}/raw"), image_size=size)
    assert loaded.train.pixels.shape == (60_000, 1, size, size)
    assert loaded.test.pixels.shape == (10_000, 1, size, size)
    assert loaded.test.labels.bincount(minlength=10).min() > 800
    # An image is mostly border in MNIST and mostly cloth in FashionMNIST: the files are not swapped, nor inverted.
    border = max(size / 28, 1) ** 2
    mean = float(loaded.train.pixels[:2000].float().mean()) * border
    low, high = {"mnist": (25, 45), "fashion_mnist": (60, 90)}[name]
    assert low < mean < high


def test_real_cifar10_batches_load() -> None:
    loaded = load("cifar10", real("cifar-10-batches-py"))
    assert loaded.name == "cifar10"
    assert loaded.train.labels.bincount().tolist() == [5000] * 10
    assert loaded.test.labels.bincount().tolist() == [1000] * 10
    # Published channel means of the training images, times 255: red 125.3, green 123.0, blue 113.9.
    means = loaded.train.pixels[::10].double().mean((0, 2, 3))
    assert (means - torch.tensor([125.3, 123.0, 113.9])).abs().max() < 2

"""Data sets: splits, tasks, sizes, and what is said when they are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from crl_diffusion import data
from crl_diffusion.method import OptionError


def test_pixels_survive_the_way_to_floats_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = data.to_float(pixels)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(data.to_pixels(floats), pixels)
    assert data.to_pixels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_digits_are_split_class_by_class(digits: data.Data) -> None:
    from sklearn.datasets import load_digits

    counts = torch.from_numpy(load_digits().target).bincount()
    assert torch.equal(digits.test.labels.bincount(), counts // 3)
    assert torch.equal(digits.train.labels.bincount() + digits.test.labels.bincount(), counts)
    assert digits.shape == (1, 8, 8)
    assert digits.train.pixels.dtype == torch.uint8


def test_tasks_are_pairs_of_classes_in_their_original_order(digits: data.Data) -> None:
    assert [task.classes for task in digits.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    for task in digits.tasks:
        assert set(task.train.labels.tolist()) == set(task.test.labels.tolist()) == set(task.classes)
    assert sum(len(task.train.labels) for task in digits.tasks) == len(digits.train.labels)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_missing_files_are_named_with_what_to_do(name: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        data.load(name, tmp_path)
    text = str(caught.value)
    assert "\n" not in text
    for part in (name, str(tmp_path / folder / "raw"), "t10k-labels-idx1-ubyte", "--data-root", "download=True"):
        assert part in text


def test_a_size_that_is_not_offered_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--image-size is 9, but digits comes in 8 pixels"):
        data.load("digits", Path("unused"), image_size=9)


def test_smaller_is_the_mean_of_areas_and_larger_a_black_border() -> None:
    pixels = torch.randint(0, 256, (2, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = data.Images(pixels, torch.zeros(2, dtype=torch.int64))
    small = data._resize(images, 14).pixels
    means = pixels.double().view(2, 1, 14, 2, 14, 2).mean((3, 5))
    assert (small.double() - means).abs().max() <= 0.5
    large = data._resize(images, 32).pixels
    assert torch.equal(large[..., 2:30, 2:30], pixels)
    assert int(large.long().sum()) == int(pixels.long().sum())


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("size", [16, 32])
def test_real_files_load(name: str, size: int) -> None:
    root = os.environ.get("CRL_DATA")
    folder = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
    if root is None or not (Path(root) / folder / "raw").is_dir():
        pytest.skip(f"the environment variable CRL_DATA names no folder with {folder}/raw in it (it is {root!r})")
    loaded = data.load(name, Path(root), size)
    assert loaded.train.pixels.shape == (60_000, 1, size, size)
    assert loaded.test.pixels.shape == (10_000, 1, size, size)
    assert loaded.test.labels.bincount(minlength=10).min() > 800
    # An image is mostly border in MNIST and mostly cloth in FashionMNIST: the files are not swapped, nor inverted.
    border = max(size / 28, 1) ** 2
    mean = float(loaded.train.pixels[:2000].float().mean()) * border
    low, high = {"mnist": (25, 45), "fashion_mnist": (60, 90)}[name]
    assert low < mean < high

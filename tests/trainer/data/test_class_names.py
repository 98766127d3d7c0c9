"""Names of classes: those of folders, in the order of their labels, and of the data sets that publish some."""

from __future__ import annotations

from pathlib import Path

import pytest
from crl_diffusion.data.torchvision_sets import CIFAR10_CLASSES, FASHION_MNIST_CLASSES
from helpers.image_folders import load, write_tree


def test_a_class_of_a_folder_has_the_name_of_its_folder(tmp_path: Path) -> None:
    write_tree(tmp_path, ("日本", "b", "café au lait", "B"))
    loaded = load("folder", tmp_path, image_size=8, tasks=2)
    assert loaded.class_names == ("B", "b", "café au lait", "日本")  # in the order of the labels
    assert load("digits", tmp_path).class_names == ()


def test_data_sets_of_torchvision_have_their_published_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed (extra trainer)")
    assert tuple(datasets.FashionMNIST.classes) == FASHION_MNIST_CLASSES
    write_tree(tmp_path / "cifar10_jpeg", CIFAR10_CLASSES)
    assert load("cifar10", tmp_path, image_size=16).class_names == CIFAR10_CLASSES

"""The data sets by name, and how each is read from disk.

A reader takes the data root and an image size and, for a folder of images, whether unreadable files are left out. It
returns a `Dataset`, or raises an OptionError that names the missing or damaged files and what to do. Small sets are
read into memory; folders of image files and the archives of downsampled ImageNet are decoded once and mapped, see
`cache.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from crl_diffusion.data.dataset import CatalogEntry, Dataset, in_memory
from crl_diffusion.data.folder import read_folder
from crl_diffusion.data.imagenet32 import read_imagenet32
from crl_diffusion.data.images import rank_in_class
from crl_diffusion.data.torchvision_sets import FASHION_MNIST_CLASSES, read_cifar10, read_mnist


def _digits(root: Path, size: int) -> Dataset:
    """scikit-learn's 1,797 digits of 8x8 pixels, 0 to 16. Every third image of each class is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = rank_in_class(labels) % 3 == 2
    return in_memory("digits", (pixels[~held_out], labels[~held_out]), (pixels[held_out], labels[held_out]), size)


DATASETS: dict[str, CatalogEntry] = {
    "digits": CatalogEntry(_digits, (8,), validation_every=4),
    "mnist": CatalogEntry(read_mnist("MNIST", "mnist"), (16, 32)),
    "fashion_mnist": CatalogEntry(read_mnist("FashionMNIST", "fashion_mnist", FASHION_MNIST_CLASSES), (16, 32)),
    "cifar10": CatalogEntry(read_cifar10, (16, 32)),
    "imagenet32": CatalogEntry(read_imagenet32, (16, 32)),
    "folder": CatalogEntry(read_folder, ()),
}

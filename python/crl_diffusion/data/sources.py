"""Data sets as they lie on disk: what each consists of, how it is read, and what is said when it is missing or damaged.

A reader takes the data root and an image size and returns a `Source`. Small sets are read into memory; folders of image
files and the archives of downsampled ImageNet are decoded once and mapped, see `cache.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from crl_diffusion.data.folder import read_folder
from crl_diffusion.data.imagenet32 import read_imagenet32
from crl_diffusion.data.images import rank_in_class
from crl_diffusion.data.source import Preset, Source, in_memory
from crl_diffusion.data.torchvision_sets import read_cifar10, read_mnist


def _digits(root: Path, size: int) -> Source:
    """scikit-learn's 1,797 digits of 8x8 pixels, 0 to 16. Of each class every third image is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = rank_in_class(labels) % 3 == 2
    return in_memory("digits", (pixels[~held_out], labels[~held_out]), (pixels[held_out], labels[held_out]), size)


DATASETS: dict[str, Preset] = {
    "digits": Preset(_digits, (8,), validation_every=4),
    "mnist": Preset(read_mnist("MNIST", "mnist"), (16, 32)),
    "fashion_mnist": Preset(read_mnist("FashionMNIST", "fashion_mnist"), (16, 32)),
    "cifar10": Preset(read_cifar10, (16, 32)),
    "imagenet32": Preset(read_imagenet32, (16, 32)),
    "folder": Preset(read_folder, ()),
}

"""A data set as read from disk, before it is cut into tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from crl_diffusion.data.images import Images, resize


class Source(NamedTuple):
    """A data set at one image size. `name` tells variants apart whose images, and so whose FIDs, differ."""

    name: str
    classes: int
    train: Images
    test: Images


class Preset(NamedTuple):
    """How a data set is read, the image sizes that it offers, and that every n-th training image can validate."""

    read: Callable[[Path, int], Source]  # data root, image size
    sizes: tuple[int, ...]  # none: any
    validation_every: int = 12


def in_memory(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], size: int) -> Source:
    """From the pixels, uint8 (N, C, S, S), and labels of both parts; ten classes."""
    (train_pixels, train_labels), (test_pixels, test_labels) = train, test
    return Source(
        name, 10, Images(resize(train_pixels, size), train_labels), Images(resize(test_pixels, size), test_labels)
    )

"""A data set as read from disk, before it is cut into tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from crl_diffusion.data.images import Images, resize


class Dataset(NamedTuple):
    """A data set at one image size. Variants with other images, and so with other FIDs, have another `name`."""

    name: str
    classes: int
    train: Images
    test: Images
    class_names: tuple[str, ...] = ()  # by class number; empty: the numbers are the names
    notes: tuple[str, ...] = ()  # what was chosen or left out when the files were read, a line each


class CatalogEntry(NamedTuple):
    """A data set by name: its reader, the image sizes that it offers, and which training images can validate."""

    read: Callable[..., Dataset]  # (data root, image size), and for folder whether to skip unreadable files
    sizes: tuple[int, ...]  # empty: any size
    validation_every: int = 12  # every n-th image of each class


def in_memory(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], size: int) -> Dataset:
    """A data set of ten classes from the pixels, uint8 (N, C, S, S), and the labels of both parts."""
    (train_pixels, train_labels), (test_pixels, test_labels) = train, test
    return Dataset(
        name, 10, Images(resize(train_pixels, size), train_labels), Images(resize(test_pixels, size), test_labels)
    )
